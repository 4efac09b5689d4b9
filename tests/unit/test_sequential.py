import itertools
import math
import random
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from torchrelay.delivery.sequential import Pair, Sample, crossing, exceeds_limit, exceeds_live

RATES = st.floats(0, 1)
EXCESSES = st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.6])


def sample(n: int) -> st.SearchStrategy[Sample]:
    return st.integers(0, n).flatmap(lambda size: st.builds(Sample, st.just(size), st.integers(0, size)))


PAIRS = st.lists(st.tuples(sample(40), sample(40)), max_size=12)


def chances(rates: list[float]) -> list[float]:
    """The distribution of the number of bad ones among requests of these rates."""
    found = [1.0]
    for rate in rates:
        padded = [0.0, *found, 0.0]
        found = [padded[bad] * rate + padded[bad + 1] * (1 - rate) for bad in range(len(found) + 1)]
    return found


def expected_capital(rounds: list[tuple[list[float], list[float]]], excess: float) -> float:
    """Exactly: over every possible outcome of all rounds, each given as its requests' rates."""
    outcomes = [
        [
            ((Sample(len(candidate), bad), Sample(len(live), live_bad)), chance * live_chance)
            for bad, chance in enumerate(chances(candidate))
            for live_bad, live_chance in enumerate(chances(live))
        ]
        for candidate, live in rounds
    ]
    return sum(
        math.prod(chance for _, chance in history) * math.exp(exceeds_live([pair for pair, _ in history], excess)[-1])
        for history in itertools.product(*outcomes)
    )


def drawn(rng: random.Random, n: int, rate: float) -> Sample:
    return Sample(n, sum(rng.random() < rate for _ in range(n)))


def polls(rng: random.Random, weight: float, rate: float, live_rate: float, count: int, size: int = 20) -> list[Pair]:
    """Polls of `size` requests, each of which goes to the candidate with the chance `weight`; 0: copies of all."""
    found = []
    for _ in range(count):
        n = sum(rng.random() < weight for _ in range(size)) if weight else size
        found.append((drawn(rng, n, rate), drawn(rng, size - n if weight else size, live_rate)))
    return found


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), RATES, RATES), min_size=1, max_size=2),
    EXCESSES,
)
def test_capital_is_not_expected_to_grow_while_the_rule_is_kept(rounds, excess):
    """Other rates in every round, at the largest that the rule allows or below."""
    kept = [([min(1.0, rate + excess) * part] * n, [rate] * m) for n, m, rate, part in rounds]
    assert expected_capital(kept, excess) <= 1 + 1e-9


@given(st.lists(RATES, min_size=1, max_size=5), st.lists(RATES, min_size=1, max_size=5), EXCESSES)
def test_nor_when_the_rates_of_one_round_differ_from_request_to_request(candidate, live, excess):
    assume(sum(candidate) / len(candidate) <= sum(live) / len(live) + excess)
    assert expected_capital([(candidate, live)], excess) <= 1 + 1e-9


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.01, 0.05, 0.2]), st.floats(0, 1))
def test_nor_before_the_live_version_had_a_request(n, m, excess, part):
    rounds = [([excess * part] * n, []), ([excess * part] * n, [0.0] * m)]
    assert expected_capital(rounds, excess) <= 1 + 1e-9


@given(st.lists(st.tuples(st.integers(0, 5), RATES), min_size=1, max_size=3), st.floats(0.001, 1))
def test_nor_in_one_sample(rounds, limit):
    outcomes = [
        [(Sample(n, bad), chance) for bad, chance in enumerate(chances([limit * part] * n))] for n, part in rounds
    ]
    expected = sum(
        math.prod(chance for _, chance in history) * math.exp(exceeds_limit([one for one, _ in history], limit)[-1])
        for history in itertools.product(*outcomes)
    )
    assert expected <= 1 + 1e-9


@given(PAIRS, EXCESSES)
def test_there_is_one_finite_value_a_poll_and_later_polls_do_not_change_it(pairs, excess):
    whole = exceeds_live(pairs, excess)
    assert len(whole) == len(pairs)
    assert all(map(math.isfinite, whole))
    assert [exceeds_live(pairs[: end + 1], excess)[-1] for end in range(len(pairs))] == whole


@given(PAIRS, EXCESSES)
def test_polls_without_requests_change_nothing(pairs, excess):
    spread = [one for pair in pairs for one in ((Sample(), Sample()), pair, (Sample(), Sample()))]
    assert exceeds_live(spread, excess)[1::3] == exceeds_live(pairs, excess)


@given(st.lists(sample(40), min_size=1, max_size=8), st.floats(0.001, 0.9), st.data())
def test_one_bad_request_more_is_never_evidence_for_the_candidate(samples, limit, data):
    index = data.draw(st.integers(0, len(samples) - 1))
    before = samples[index]
    assume(before.bad < before.n)
    worse = [*samples[:index], Sample(before.n, before.bad + 1), *samples[index + 1 :]]
    assert exceeds_limit(worse, limit)[-1] >= exceeds_limit(samples, limit)[-1]


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_one_bad_live_request_more_is_never_evidence_against_the_candidate(n, m, data):
    bad, live_bad = data.draw(st.integers(0, n)), data.draw(st.integers(0, m - 1))
    better, worse = ([(Sample(n, bad), Sample(m, live_bad + more))] for more in (1, 0))
    assert exceeds_live(better, 0.01)[-1] <= exceeds_live(worse, 0.01)[-1]


def test_a_limit_of_zero_is_broken_by_the_first_bad_request_and_by_no_good_one():
    assert exceeds_limit([Sample(1000, 0), Sample(1, 1), Sample(9, 0)], 0) == [0.0, math.inf, math.inf]


def test_a_limit_of_one_is_never_broken():
    assert exceeds_limit([Sample(100, 100)] * 3, 1) == [0.0] * 3
    assert exceeds_live([(Sample(100, 100), Sample(100, 0))] * 3, 1) == pytest.approx([0.0] * 3)


@pytest.mark.parametrize("counts", [(1, 2), (-1, 0), (3, -1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="bad of"):
        Sample(*counts)


def test_huge_counts_stay_finite():
    assert exceeds_live([(Sample(10**8, 10**8), Sample(10**8, 0))] * 3, 0.01)[-1] > 1e7
    assert -5 < exceeds_live([(Sample(10**8, 0), Sample(10**8, 10**8))] * 3, 0.01)[-1] < 0
    assert exceeds_live([(Sample(10**8, 10**6), Sample(10**8, 10**6))] * 100, 0.01)[-1] < 0


def test_a_hundred_thousand_requests_in_a_hundred_polls_take_milliseconds():
    pairs = [(Sample(50, 1), Sample(950, 9))] * 100
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        exceeds_live(pairs, 0.01)
        best = min(best, time.process_time() - start)
    assert best < 0.05


@pytest.mark.parametrize("weight", [0, 0.05, 0.25, 0.9])
@pytest.mark.parametrize("rate", [0.002, 0.1])
def test_false_stops_stay_below_alpha_at_the_edge_of_the_rule(weight, rate):
    """The candidate is as bad as it may be, all the time, and is looked at after every poll."""
    alpha, runs, excess = 0.05, 200, 0.02
    rng = random.Random(f"{weight} {rate}")
    stopped = sum(
        crossing(exceeds_live(polls(rng, weight, rate + excess, rate, 60), excess), alpha) is not None
        for _ in range(runs)
    )
    assert stopped <= alpha * runs


def test_false_stops_of_one_sample_stay_below_alpha():
    alpha, runs, rng = 0.05, 400, random.Random(1)
    histories = ([drawn(rng, 10, 0.1) for _ in range(60)] for _ in range(runs))
    assert sum(crossing(exceeds_limit(one, 0.1), alpha) is not None for one in histories) <= alpha * runs


@pytest.mark.parametrize("weight", [0, 0.05, 0.25, 0.9])
@pytest.mark.parametrize("size", [2, 20])
def test_an_outage_of_both_versions_stops_nobody(weight, size):
    rng = random.Random(f"{weight} {size}")
    for _ in range(60):
        pairs = [pair for rate in (0.01, 0.6, 0.01) for pair in polls(rng, weight, rate, rate, 15, size)]
        assert crossing(exceeds_live(pairs, 0.01), 1e-4) is None


def test_nor_when_the_weight_changes_with_it():
    """Pooled counts would stop it: the candidate has more of its requests in the outage (Simpson's paradox)."""
    rng = random.Random(2)
    for _ in range(60):
        pairs = polls(rng, 0.05, 0.01, 0.01, 10, 200) + polls(rng, 0.5, 0.6, 0.6, 10, 200)
        assert crossing(exceeds_live(pairs, 0.01), 1e-3) is None
        pooled = tuple(sum((pair[side] for pair in pairs), Sample()) for side in (0, 1))
        assert crossing(exceeds_live([pooled], 0.01), 1e-3) == 0


@pytest.mark.parametrize(("weight", "requests"), [(0, 900), (0.05, 400), (0.25, 600)])
def test_ten_times_the_errors_are_found_within(weight, requests):
    """An error rate of 10 % instead of 1 %, with the evidence that a default roll-out asks for, 19 times of 20."""
    rng, found = random.Random(3), []
    for _ in range(40):
        pairs = polls(rng, weight, 0.1, 0.01, 1000)
        index = crossing(exceeds_live(pairs, 0.01), 1e-4 / 18)
        assert index is not None
        found.append(sum(candidate.n for candidate, _ in pairs[: index + 1]))
    assert sorted(found)[int(len(found) * 0.95) - 1] <= requests


def test_a_defect_that_begins_after_ten_thousand_good_requests_is_found():
    rng = random.Random(4)
    good, bad = polls(rng, 0.25, 0.01, 0.01, 500, 80), polls(rng, 0.25, 0.5, 0.01, 20, 80)
    index = crossing(exceeds_live(good + bad, 0.01), 1e-4 / 18)
    assert index is not None
    assert 500 <= index < 505


def test_a_live_version_that_is_bad_itself_shields_the_candidate_only_by_as_much():
    rng = random.Random(5)
    assert crossing(exceeds_live(polls(rng, 0.25, 0.3, 0.3, 100), 0.01), 1e-3) is None
    assert crossing(exceeds_live(polls(rng, 0.25, 0.6, 0.3, 100), 0.01), 1e-3) is not None


def test_the_live_rate_is_learnt_from_the_rounds_before():
    """Beside a live rate of 50 %: bets that it stays at 1 % win nothing, bets on the candidate's rate 25 on average."""
    rng = random.Random(6)
    logs = [exceeds_live(polls(rng, 0.5, 0.7, 0.5, 100), 0.01)[-1] for _ in range(15)]
    assert sum(logs) / len(logs) > 27

"""Counts and histograms as pure values; a real Envoy fills them in tests/e2e."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.serving.gateway_stats import BackendCounts, Bucket, Reading


def bucket(lower_ms: float, requests: int, width_ms: float = 1) -> Bucket:
    return Bucket(lower_ms=lower_ms, width_ms=width_ms, requests=requests)


def of(times: list[int], **others: int) -> BackendCounts:
    """Counts of requests that took these times, in bars as Envoy's: two significant digits."""
    bars = [(time, 1) if time < 100 else (time - time % 10, 10) for time in times]
    latency = tuple(bucket(lower, bars.count((lower, width)), width) for lower, width in sorted(set(bars)))
    return BackendCounts(requests=len(times), latency=latency, **others)


TIMES = st.lists(st.integers(0, 999), max_size=50)


@given(TIMES, st.integers(0, 99))
def test_slower_than_is_exact_at_two_digits(times: list[int], ms: int) -> None:
    assert of(times).slower_than(ms) == sum(time >= ms for time in times)
    assert of(times).slower_than(10 * ms) == sum(time >= 10 * ms for time in times)


def test_any_other_threshold_is_rounded_up() -> None:
    assert of([120, 124, 129, 130]).slower_than(125) == 1


def test_a_request_that_timed_out_is_slower_than_any() -> None:
    assert of([5, 200], timeouts=3).slower_than(100) == 4
    assert of([5, 200], timeouts=3).timed == 5


@given(TIMES.filter(bool), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bar_of_the_request_at_its_rank(times: list[int], q: float) -> None:
    true = sorted(times)[math.ceil(q * len(times) - 1e-9) - 1]
    assert abs(of(times).quantile(q) - true) <= max(1, true / 10)


def test_a_quantile_without_or_beyond_times() -> None:
    assert math.isnan(BackendCounts().quantile(0.5))
    assert of([5] * 9, timeouts=1).quantile(0.5) == pytest.approx(5.5, abs=0.1)
    assert of([5] * 9, timeouts=1).quantile(0.99) == math.inf


@given(TIMES, TIMES)
def test_a_difference_undoes_a_sum(before: list[int], after: list[int]) -> None:
    assert (of(before, errors=2) + of(after, errors=1)).since(of(before, errors=2)) == of(after, errors=1)


def test_a_count_that_fell_has_begun_anew() -> None:
    assert of([5], errors=1).since(of([5, 6, 7])) == of([5], errors=1)


def reading(epoch: str, **clusters: BackendCounts) -> Reading:
    return Reading(epoch=epoch, clusters={name.replace("_", "@"): found for name, found in clusters.items()})


def test_a_version_counts_over_all_of_its_clusters() -> None:
    both = reading("1", mail_1_aa=of([1]), mail_1_bb=of([2, 3]), mail_2_cc=of([4]), **{"mail_1_aa~copies": of([5])})
    found = both.versions
    assert both.copies == {("mail", "1"): of([5])}
    assert found == {("mail", "1"): of([1, 2, 3]), ("mail", "2"): of([4])}


def test_a_pruned_cluster_takes_nothing_from_its_version() -> None:
    """The version's endpoints changed: its total fell from 5 to 4, but 2 requests have come."""
    before = reading("1", mail_1_aa=of([1, 1, 1]), mail_1_bb=of([2, 2]))
    after = reading("1", mail_1_bb=of([2, 2, 3, 3]))
    assert after.since(before).versions == {("mail", "1"): of([3, 3])}


def test_after_a_restart_all_is_new() -> None:
    before, after = reading("1", mail_1_aa=of([1])), reading("2", mail_1_aa=of([1, 1]))
    assert after.since(before) == after

"""How often a roll-out's test stops a good candidate, and how soon a bad one, beside a z-test at every poll.

    .venv/bin/python bench/canary/run

Simulated requests, no server. The z-test is what a plain script would do: a one-sided test of two proportions (with
Agresti and Caffo's one more of each, against small counts), looked at after every poll, with our margin or with none.
*Level* is what each test promises: ours for a whole roll-out, the z-test for one look at one rule.
"""

import argparse
import math
import time
from collections.abc import Sequence
from statistics import NormalDist, median
from typing import Any

import numpy as np

import report
from torchrelay.config import Rollout, Stage
from torchrelay.delivery.canary import Block, alpha_share, judge
from torchrelay.delivery.sequential import Pair, Sample, crossing, exceeds_limit, exceeds_live

POLICY = Rollout()
LIVE = {"errors": 0.01, "latency": 0.01, "disagreement": 0.02}
ALLOWED = {
    "errors": POLICY.max_error_excess,
    "latency": POLICY.max_slow_excess,
    "disagreement": POLICY.max_disagreement,
}
NO_MARGIN = {**ALLOWED, "errors": 0.0, "latency": 0.0}
TESTS = {
    "ours": f"ours, {POLICY.alpha:g}",
    "ours_loose": "ours, 0.05",
    "z_plain": "z without margin, 0.05",
    "z_loose": "z, 0.05",
    "z_strict": f"z, {alpha_share(POLICY):.1g}",
}
POLLS = 20
A_POLL = 40
LOOSE = 0.05
DEFECTS = (
    ("errors", 0.03),
    ("errors", 0.1),
    ("errors", 0.5),
    ("errors", 1.0),
    ("latency", 0.2),
    ("latency", 1.0),
    ("disagreement", 0.25),
    ("disagreement", 1.0),
)
WEIGHTS = (0, 5, 25, 50, 90)


def main() -> None:
    """Simulate, write the result."""
    given = arguments()
    machine = report.machine()
    rng = np.random.default_rng(given.seed)
    report.say(f"{given.rollouts} good roll-outs of each kind")
    good = [false_stops(rng, given.rollouts, kind) for kind in ("like the live version", "as bad as allowed")]
    report.say(f"{given.runs} bad roll-outs for each of {len(DEFECTS)} defects and its splits")
    bad = [stops(rng, given, rule, rate, weight) for rule, rate in DEFECTS for weight in weights(rule)]
    content = {"machine": machine, "seed": given.seed, "good": good, "bad": bad, "judge_ms": judge_ms()}
    report.save(report.results("canary"), content, text(given, content))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2000, help="good roll-outs of each kind (default: 2000)")
    parser.add_argument("--runs", type=int, default=100, help="bad roll-outs for each defect and split (default: 100)")
    parser.add_argument("--cap", type=int, default=20_000, help="requests after which a bad one is given up on")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def weights(rule: str) -> tuple[int, ...]:
    """Answers are compared in shadow stages only."""
    return (0,) if rule == "disagreement" else WEIGHTS


def polled(rng: np.random.Generator, stage: Stage, rates: dict[str, float], requests: int = A_POLL) -> Block:
    """One poll's requests, each of which goes to one of the two by chance, or to both in a shadow stage."""
    n = requests if stage.shadow else int(rng.binomial(requests, stage.weight / 100))
    live = requests if stage.shadow else requests - n
    compared = n if stage.shadow else 0
    return Block(
        requests=n,
        errors=int(rng.binomial(n, rates["errors"])),
        slow=int(rng.binomial(n, rates["latency"])),
        live_requests=live,
        live_errors=int(rng.binomial(live, LIVE["errors"])),
        live_slow=int(rng.binomial(live, LIVE["latency"])),
        compared=compared,
        disagreed=int(rng.binomial(compared, rates["disagreement"])),
    )


def false_stops(rng: np.random.Generator, count: int, kind: str) -> dict[str, Any]:
    """How many of `count` good candidates each test stops somewhere in the default stages."""
    rates = LIVE if kind == "like the live version" else edge()
    loose = POLICY.model_copy(update={"alpha": LOOSE})
    stopped = dict.fromkeys(TESTS, 0)
    for _ in range(count):
        history = [(stage, [polled(rng, stage, rates) for _ in range(POLLS)]) for stage in POLICY.stages]
        stopped["ours"] += any(breaks(POLICY, *one) for one in history)
        stopped["ours_loose"] += any(breaks(loose, *one) for one in history)
        stopped["z_plain"] += any(z_stops(blocks, LOOSE, NO_MARGIN) for _, blocks in history)
        stopped["z_loose"] += any(z_stops(blocks, LOOSE, ALLOWED) for _, blocks in history)
        stopped["z_strict"] += any(z_stops(blocks, alpha_share(POLICY), ALLOWED) for _, blocks in history)
    return {"kind": kind, "rollouts": count, **stopped}


def edge() -> dict[str, float]:
    """The rates of a candidate that keeps each rule and could not be worse."""
    return {
        "errors": LIVE["errors"] + ALLOWED["errors"],
        "latency": LIVE["latency"] + ALLOWED["latency"],
        "disagreement": ALLOWED["disagreement"],
    }


def breaks(policy: Rollout, stage: Stage, blocks: list[Block]) -> bool:
    """Whether the stage ends in a breach, which it does if there was one after any of its polls."""
    return judge(policy, stage, blocks, stage.bake_s).kind == "breach"


def pairs(rule: str, blocks: Sequence[Block]) -> list[Pair]:
    """A rule's counts, poll by poll; no live ones where answers are compared."""
    if rule == "errors":
        return [(Sample(b.requests, b.errors), Sample(b.live_requests, b.live_errors)) for b in blocks]
    if rule == "latency":
        return [(Sample(b.requests, b.slow), Sample(b.live_requests, b.live_slow)) for b in blocks]
    return [(Sample(b.compared, b.disagreed), Sample()) for b in blocks]


def z_stops(blocks: Sequence[Block], level: float, margins: dict[str, float]) -> bool:
    """Whether the z-test of any rule stops after any of the polls."""
    return any(z_crossing(pairs(rule, blocks), level, margin) is not None for rule, margin in margins.items())


def z_crossing(counts: Sequence[Pair], level: float, margin: float) -> int | None:
    """The first poll at which the z-test of all counts until then is significant at `level`."""
    needed = NormalDist().inv_cdf(1 - level)
    candidate = live = Sample()
    for index, (more, live_more) in enumerate(counts):
        candidate, live = candidate + more, live + live_more
        if candidate.n and z_value(candidate, live, margin) > needed:
            return index
    return None


def z_value(candidate: Sample, live: Sample, margin: float) -> float:
    """Of two proportions with a margin; of one against `margin` where there is nothing live."""
    if not live.n:
        return (candidate.bad / candidate.n - margin) / math.sqrt(margin * (1 - margin) / candidate.n)
    (rate, spread), (beside, spread_beside) = map(agresti_caffo, (candidate, live))
    return (rate - beside - margin) / math.sqrt(spread + spread_beside)


def agresti_caffo(sample: Sample) -> tuple[float, float]:
    """A proportion and its variance, with one bad and one good request more."""
    rate = (sample.bad + 1) / (sample.n + 2)
    return rate, rate * (1 - rate) / (sample.n + 2)


def stops(rng: np.random.Generator, given: argparse.Namespace, rule: str, rate: float, weight: int) -> dict[str, Any]:
    """How many of the candidate's requests one defect lives for, with each test."""
    found = [stopped_after(rng, given.cap, rule, rate, Stage(weight=weight)) for _ in range(given.runs)]
    ours, z = (sorted(one[index] for one in found) for index in (0, 1))
    return {
        "rule": rule,
        "rate": rate,
        "weight": weight,
        "median": median(ours),
        "p95": ours[math.ceil(0.95 * len(ours)) - 1],
        "missed": sum(one >= given.cap for one in ours),
        "z_median": median(z),
    }


def stopped_after(rng: np.random.Generator, cap: int, rule: str, rate: float, stage: Stage) -> tuple[int, int]:
    """The candidate's requests when our test stops, at its share of the default alpha, and when the z-test does."""
    rates = {**LIVE, rule: rate}
    share = stage.weight / 100 or 1
    blocks = [polled(rng, stage, rates) for _ in range(math.ceil(cap / share / A_POLL))]
    counts = pairs(rule, blocks)
    samples = [candidate for candidate, _ in counts]
    allowed = ALLOWED[rule]
    process = exceeds_limit(samples, allowed) if rule == "disagreement" else exceeds_live(counts, allowed)
    ends = (crossing(process, alpha_share(POLICY)), z_crossing(counts, LOOSE, allowed))
    ours, z = (cap if end is None else min(cap, sum(sample.n for sample in samples[: end + 1])) for end in ends)
    return ours, z


def judge_ms() -> float:
    """The best of five judgements of 100,000 requests in 100 polls."""
    block = Block(requests=50, errors=1, live_requests=950, live_errors=9)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        judge(POLICY, POLICY.stages[1], [block] * 100, 20)
        times.append((time.perf_counter() - start) * 1000)
    return round(min(times), 1)


def text(given: argparse.Namespace, content: dict[str, Any]) -> str:
    """The result for people."""
    head = ["candidate, test and level", *TESTS.values()]
    good = [[one["kind"], *(f"{one[key]} of {one['rollouts']}" for key in TESTS)] for one in content["good"]]
    columns = ["rule", "bad requests", "split", "median", "95 of 100 within", "z, 0.05: median"]
    bad = [
        [one["rule"], f"{LIVE[one['rule']]:.0%} → {one['rate']:.0%}", split(one["weight"]), *figures(one, given.cap)]
        for one in content["bad"]
    ]
    return (
        f"Good candidates stopped, over {len(POLICY.stages)} stages of {POLLS} polls of {A_POLL} requests:\n\n"
        f"{report.table(head, good)}\n\n"
        f"The candidate's requests until a bad one is stopped ({given.runs} runs each; the poll counts whole):\n\n"
        f"{report.table(columns, bad)}\n\n"
        f"A judgement of 100,000 requests in 100 polls takes {content['judge_ms']} ms."
    )


def split(weight: int) -> str:
    """A stage in words."""
    return f"{weight} %" if weight else "shadow"


def figures(one: dict[str, Any], cap: int) -> list[str]:
    """Requests until the stop; beyond the cap nobody looked."""
    return [f"over {cap}" if one[key] >= cap else f"{one[key]:.0f}" for key in ("median", "p95", "z_median")]

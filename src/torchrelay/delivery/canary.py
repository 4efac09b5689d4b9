"""What the requests of one stage say of a candidate: go on baking, pass, breach, or starved of traffic.

No clock, no network: the same blocks give the same judgement, so that a restarted orchestrator goes on where it was.

A breach is a rule's e-process (`torchrelay.delivery.sequential`) that reached the inverse of its share of the policy's
alpha. The shares of all rules in all stages and their replays add up to alpha (union bound), which is therefore the
chance that a candidate that keeps every rule is ever stopped in a whole roll-out.

A candidate that fails every request, or answers every one too late, is stopped within 15 requests, beside a live
version without fault that gets at least as many, or none at all; one that gets but a tenth of them takes 50.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from torchrelay.config import Frozen, Rollout, Stage
from torchrelay.delivery.sequential import Pair, Sample, exceeds_limit, exceeds_live

Kind = Literal["bake", "pass", "breach", "starved"]
RuleName = Literal["errors", "latency", "disagreement"]
_RULES = 3


class Block(Frozen):
    """What happened between two polls: counts of requests that ended, or that became overdue, since the last one.

    A request that hangs is slow as soon as it is over the objective, and failed when it is given up: whoever counts
    must not wait for an answer that never comes.
    """

    requests: int = Field(0, ge=0, description="The candidate's; in a shadow stage copies of the live version's.")
    errors: int = Field(0, ge=0, description="How many of them failed.")
    timed: int | None = Field(
        None, ge=0, description="Of how many the time became known, which may follow a moment later. None: of these."
    )
    slow: int = Field(0, ge=0, description="How many of the timed took longer than latency.p99_ms, failed or not.")
    live_requests: int = Field(0, ge=0, description="The live version's, in the same time.")
    live_errors: int = Field(0, ge=0)
    live_timed: int | None = Field(None, ge=0)
    live_slow: int = Field(0, ge=0)
    compared: int = Field(0, ge=0, description="Shadowed requests that both answered.")
    disagreed: int = Field(0, ge=0, description="How many of them the two answered differently.")

    @model_validator(mode="after")
    def _parts_of_wholes(self) -> "Block":
        if self.errors > self.requests or self.live_errors > self.live_requests:
            raise ValueError("there are more failed requests than requests")
        candidate, live = self.times
        if self.slow > candidate.n or self.live_slow > live.n:
            raise ValueError("there are more slow requests than requests whose time is known")
        if self.disagreed > self.compared:
            raise ValueError("there are more disagreements than compared answers")
        return self

    @property
    def times(self) -> Pair:
        """How many requests were slow, of those whose time is known: the candidate's and the live version's."""
        candidate = self.requests if self.timed is None else self.timed
        live = self.live_requests if self.live_timed is None else self.live_timed
        return Sample(candidate, min(self.slow, candidate)), Sample(live, min(self.live_slow, live))


class Judgement(Frozen):
    """What a stage, or a replay, says of the candidate, in a sentence and in figures."""

    kind: Kind
    reason: str = Field(description="One plain sentence with the figures.")
    rule: RuleName | None = Field(None, description="The rule that was broken, of a breach.")
    figures: dict[str, float | None] = Field(
        default_factory=dict,
        description="Counts, rates (null: no request) and, for each rule, the decimal logarithm of its e-value beside "
        "what the policy needs for a breach.",
    )


@dataclass(frozen=True)
class _Rule:
    """One rule's counts, and how far its e-process came."""

    name: RuleName
    allowed: float
    candidate: Sample
    live: Sample | None
    evidence: float
    """The most that it ever was."""
    now: float

    @property
    def share(self) -> str:
        """The counts in words."""
        words = {"errors": "requests failed", "latency": "requests were slower than the objective"}
        what = words.get(self.name, "compared answers differ from the live version's")
        text = f"{self.candidate.bad} of {self.candidate.n} {what}"
        if self.live is None:
            return f"{text}; {self.allowed:.1%} may"
        beside = f"{self.live.bad} of {self.live.n} of the live version's" if self.live.n else "no live request beside"
        return f"{text}, {beside}; {self.allowed:.1%} more may"


def alpha_share(policy: Rollout) -> float:
    """The chance of a false stop that each rule has in each stage, and in the replay that may follow it."""
    return policy.alpha / (_RULES * 2 * max(1, len(policy.stages)))


def judge(policy: Rollout, stage: Stage, blocks: Sequence[Block], baked_s: float) -> Judgement:
    """Judge the candidate by all that happened in this stage: one block for each poll, in order.

    `baked_s` is how long the stage has lasted. A breach comes first, at any time; then the stage bakes until its time
    is over, and no rule is halfway to a breach, since a larger stage would only serve more of what may be bad; then it
    passes if enough requests came (in a shadow stage: compared answers), and else is starved, which
    `policy.little_traffic` has an answer to.
    """
    rules = _rules(policy, blocks)
    figures = {"baked_s": baked_s, **_figures(policy, rules)}
    if breach := _breach(policy, rules, figures):
        return breach
    if baked_s >= stage.bake_s and (suspicion := _suspicion(policy, rules)):
        return Judgement(kind="bake", reason=suspicion, figures=figures)
    count = rules["disagreement" if stage.shadow else "errors"].candidate.n
    kind, reason = _progress(stage, count, baked_s)
    return Judgement(kind=kind, reason=reason, figures=figures)


def replay(policy: Rollout, compared: int, disagreed: int, errors: int, slow: int) -> Judgement:
    """Judge the replay of logged requests, which the live version once answered: the same tests, on one block.

    `compared` answers came, of which `disagreed` differ from the logged ones; `errors` more requests got none; `slow`
    of all these were over the objective. Starved means that there was nothing to replay.
    """
    requests = compared + errors
    block = Block(requests=requests, errors=errors, slow=slow, compared=compared, disagreed=disagreed)
    rules = _rules(policy, [block])
    figures = _figures(policy, rules)
    if breach := _breach(policy, rules, figures):
        return breach
    if not requests:
        return Judgement(kind="starved", reason="There was no logged request to replay.", figures=figures)
    counts = f"{errors} failed, {slow} were slow, {disagreed} of {compared} answers differ"
    return Judgement(kind="pass", reason=f"Replay of {requests} logged requests: {counts}.", figures=figures)


def measured(figures: Mapping[str, float]) -> str:
    """Requests, error rate and p99 against the version in service, as far as they are known."""
    if not figures.get("requests"):
        return ""
    errors, theirs = figures.get("errors_rate", 0.0), figures.get("live_errors_rate", 0.0)
    parts = [f"{figures['requests']:.0f} requests", f"errors {errors:.1%} against {theirs:.1%}"]
    if "p99_ms" in figures:
        parts.append(f"p99 {figures['p99_ms']:.0f} ms against {figures.get('live_p99_ms', float('nan')):.0f}")
    return f"{', '.join(parts)}. "


def _rules(policy: Rollout, blocks: Sequence[Block]) -> dict[RuleName, _Rule]:
    errors = [(Sample(b.requests, b.errors), Sample(b.live_requests, b.live_errors)) for b in blocks]
    slow = [b.times for b in blocks]
    compared = [Sample(b.compared, b.disagreed) for b in blocks]
    return {
        "errors": _beside_live("errors", errors, policy.max_error_excess),
        "latency": _beside_live("latency", slow, policy.max_slow_excess),
        "disagreement": _alone("disagreement", compared, policy.max_disagreement),
    }


def _alone(name: RuleName, samples: list[Sample], limit: float) -> _Rule:
    process = exceeds_limit(samples, limit) or [0.0]
    return _Rule(name, limit, sum(samples, Sample()), None, max(process), process[-1])


def _beside_live(name: RuleName, pairs: list[tuple[Sample, Sample]], excess: float) -> _Rule:
    candidate, live = (sum((pair[side] for pair in pairs), Sample()) for side in (0, 1))
    process = exceeds_live(pairs, excess) or [0.0]
    return _Rule(name, excess, candidate, live, max(process), process[-1])


def _breach(policy: Rollout, rules: dict[RuleName, _Rule], figures: dict[str, float | None]) -> Judgement | None:
    """Of the first rule whose e-process ever reached what the policy needs."""
    needed = -math.log(alpha_share(policy))
    broken = next((rule for rule in rules.values() if rule.evidence >= needed), None)
    if broken is None:
        return None
    chance = f"by chance in at most one of {1 / alpha_share(policy):,.0f} stages"
    reason = f"Rule {broken.name} is broken: {broken.share} ({chance})."
    return Judgement(kind="breach", rule=broken.name, reason=reason, figures=figures)


def _suspicion(policy: Rollout, rules: dict[RuleName, _Rule]) -> str:
    """Of a rule that is halfway to a breach, on the scale of evidence, or beyond: more requests will settle it."""
    needed = -math.log(alpha_share(policy))
    rule = next((rule for rule in rules.values() if rule.now >= needed / 2), None)
    if rule is None:
        return ""
    return (
        f"Rule {rule.name} may be broken: {rule.share}. It stays in this stage until more requests have settled that."
    )


def _progress(stage: Stage, count: int, baked_s: float) -> tuple[Kind, str]:
    """Where a stage without a breach stands."""
    what = "compared answers" if stage.shadow else "requests"
    if baked_s < stage.bake_s:
        of = f"{count} {what} (a decision needs {stage.min_requests})"
        return "bake", f"No rule is broken after {baked_s:.0f} of {stage.bake_s:.0f} s and {of}."
    if count < stage.min_requests:
        return "starved", f"Only {count} of {stage.min_requests} {what} came in {baked_s:.0f} s: too few to decide."
    return "pass", f"No rule is broken after {baked_s:.0f} s and {count} {what} (at least {stage.min_requests} needed)."


def _figures(policy: Rollout, rules: dict[RuleName, _Rule]) -> dict[str, float | None]:
    figures: dict[str, float | None] = {
        "requests": rules["errors"].candidate.n,
        "compared": rules["disagreement"].candidate.n,
        "evidence_needed": round(-math.log10(alpha_share(policy)), 2),
    }
    for rule in rules.values():
        figures[f"{rule.name}_rate"] = _rate(rule.candidate)
        if rule.live is not None:
            figures["live_requests"] = rule.live.n
            figures[f"live_{rule.name}_rate"] = _rate(rule.live)
        figures[f"{rule.name}_evidence"] = round(min(rule.evidence / math.log(10), 300.0), 2)
    return figures


def _rate(sample: Sample) -> float | None:
    return sample.bad / sample.n if sample.n else None

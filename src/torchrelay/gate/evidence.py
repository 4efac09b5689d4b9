"""What a promotion is judged on, and the judgement: the models that pass between who gathers, who judges, who shows."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from torchrelay.config import Component, Frozen, Json
from torchrelay.handover import Evaluation

RULES = 1
"""Raise it when the judgement itself changes: what was refused by the rules before is then tried again."""

Outcome = Literal["passed", "warned", "skipped", "refused"]


class Disagreement(Frozen):
    """A replayed request that the two versions answered differently."""

    id: str
    live: Any
    candidate: Any


class Replay(Frozen):
    """Logged production requests, sent to the candidate. Only those that the live version had answered count."""

    compared: int = Field(0, ge=0, description="Requests that the candidate answered, so that answers were compared.")
    disagreed: int = Field(0, ge=0, description="Of these, how many were answered differently.")
    errors: int = Field(0, ge=0, description="Requests beside these that the candidate failed to answer.")
    examples: tuple[Disagreement, ...] = ()


class Evidence(Frozen):
    """All that the gate knows of a candidate. Nothing in it was taken from where dev can write."""

    candidate: Evaluation
    live: Evaluation | None = Field(None, description="On the same frozen test set; None at the first promotion.")
    live_version: str | None = None
    signature_candidate: Json | None = Field(None, description="MLflow's model signature; None if there is none.")
    signature_live: Json | None = None
    proof_difference: float | None = Field(
        None, description="Largest difference from the golden outputs; None if the archive did not get that far."
    )
    proof_tolerance: float = Field(description="What the archive itself allows; the policy's own counts as well.")
    proof_error: str = ""
    latencies_ms: tuple[float, ...] = Field((), description="Of single requests to the loaded candidate.")
    replay: Replay = Replay()
    provenance_faults: tuple[str, ...] = ()


class Figure(Frozen):
    """A number that a check looked at. The interval is that of the difference if there is one, else of the value."""

    name: str
    value: float | None = Field(description="The candidate's; None if there is none.")
    live: float | None = None
    difference: float | None = Field(None, description="Candidate minus live, paired.")
    interval: tuple[float, float] | None = None
    confidence: float = Field(0.95, description="Of the interval, two-sided.")
    limit: float | None = Field(None, description="What the value, or the difference if there is one, is held against.")
    samples: int | None = None


class Check(Frozen):
    """One of the gate's questions, answered."""

    name: str
    outcome: Outcome = Field(description="warned: let in, but look at it; skipped: there was nothing to judge.")
    detail: str = Field(description="One or more plain sentences.")
    reasons: tuple[str, ...] = Field((), description="Why it was refused, a sentence each.")
    figures: tuple[Figure, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the candidate may go live as far as this check is concerned."""
        return self.outcome != "refused"


class PromotionVerdict(Frozen):
    """May this version go live?"""

    component: str
    version: str
    verdict: Literal["pass", "refuse"]
    reasons: tuple[str, ...] = Field(description="Why it was refused; empty when it passed.")
    checks: tuple[Check, ...]
    metric: str
    live_version: str | None
    test_set: str
    policy: str = Field(description="`policy_hash` of the settings that it was judged by.")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was let in, but is worth a look."""
        return tuple(f"{check.name}: {check.detail}" for check in self.checks if check.outcome == "warned")

    def check(self, name: str) -> Check:
        """The check of that name; KeyError if there is none."""
        return {check.name: check for check in self.checks}[name]


def policy_hash(component: Component) -> str:
    """sha256 of every setting that the judgement depends on: a refusal is tried again when it changes."""
    settings = component.model_dump(mode="json", include={"metric", "latency", "rollout", "golden", "task"})
    return hashlib.sha256(json.dumps([RULES, settings], sort_keys=True).encode()).hexdigest()

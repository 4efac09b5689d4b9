"""The pure core of `converge`: from what the registry says to what a perimeter should run.

No clock, no network: state in, decision out, so that every history can be tried in a test.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torchrelay.config import Serving
from torchrelay.handover import Desired, ServedVersion, WantedVersion
from torchrelay.lineage import (
    TAG_ARCHIVE_URL,
    TAG_DIGEST,
    TAG_ENVIRONMENT,
    TAG_PROOF,
    TAG_REASONS,
    TAG_SERVING,
    TAG_VERDICT,
)


@dataclass(frozen=True)
class Candidate:
    """A model version as the registry describes it."""

    component: str
    version: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Claim:
    """What the registry says of one component in one perimeter: the request, and what is live."""

    component: str
    requested: Candidate | None
    live: Candidate | None


@dataclass(frozen=True)
class Decision:
    """What a component should run, and why the request was turned down if it was."""

    component: str
    wanted: Candidate | None
    refusal: str | None = None
    refused: Candidate | None = None


def refusal(candidate: Candidate) -> str | None:
    """Why this version may not be served, or None when it is admitted."""
    tags = candidate.tags
    verdict = tags.get(TAG_VERDICT)
    if verdict is None:
        return "it was never judged by the gate"
    if verdict != "pass":
        return f"the gate refused it: {tags.get(TAG_REASONS) or 'no reason was recorded'}"
    digest = tags.get(TAG_DIGEST)
    if not digest or not tags.get(TAG_ARCHIVE_URL):
        return "it has no signed archive"
    if tags.get(TAG_PROOF) != digest:
        return "its archive was not proven against its golden outputs"
    return None


def decide(claim: Claim) -> Decision:
    """The requested version if it is admitted, else the one that is live (an alias is a request, not an order)."""
    if claim.requested is None:
        return Decision(claim.component, wanted=None)
    reason = refusal(claim.requested)
    if reason is None:
        return Decision(claim.component, wanted=claim.requested)
    return Decision(claim.component, wanted=claim.live, refusal=reason, refused=claim.requested)


def wanted_version(candidate: Candidate) -> WantedVersion:
    """All that a node must know to serve an admitted version; it comes from the registry alone."""
    tags = candidate.tags
    serving = Serving.model_validate(json.loads(tags[TAG_SERVING]))
    return WantedVersion(
        component=candidate.component,
        version=candidate.version,
        digest=tags[TAG_DIGEST],
        environment=tags[TAG_ENVIRONMENT],
        url=tags[TAG_ARCHIVE_URL],
        **serving.model_dump(),
    )


def desired(perimeter: str, decisions: list[Decision]) -> Desired:
    """The desired-state file of a node of this perimeter."""
    wanted = [wanted_version(decision.wanted) for decision in decisions if decision.wanted]
    return Desired(perimeter=perimeter, components=tuple(sorted(wanted, key=lambda one: one.component)))


def serves(wanted: Candidate | None, served: ServedVersion | None) -> bool:
    """Whether a node really serves what is wanted of it, in good health."""
    if wanted is None:
        return served is None
    return (
        served is not None
        and served.healthy
        and (served.version, served.digest) == (wanted.version, wanted.tags.get(TAG_DIGEST))
    )

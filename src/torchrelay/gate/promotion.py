"""May this version go live? Production's own judgement: evidence in, verdict out; nothing here touches the world.

Production believes no tag that dev can write. It has verified the archive, run candidate and live version over its
own copy of the frozen test set, and replayed its own requests (`Evidence`); its own policy decides on that, once for a
version, an archive and a policy (`policy_hash`).
"""

from torchrelay.config import Component
from torchrelay.gate import checks
from torchrelay.gate.evidence import Check, Evidence, PromotionVerdict, policy_hash


def promote(component: Component, version: str, evidence: Evidence) -> PromotionVerdict:
    """Refuse a version for every check that it does not pass; whatever the evidence, there is a verdict.

    `version` is the candidate's. Without a live version, at the first promotion, only what stands by itself counts:
    floor, golden proof, latency, provenance. Of an archive that was not run, since nobody committed its code, only that
    is said.
    """
    origin = checks.provenance(evidence)
    rest: tuple[Check, ...] = (
        checks.golden(component, evidence),
        checks.signature(version, evidence),
        checks.evaluation(component, evidence),
        checks.floor(component, evidence),
        checks.regression(component, evidence),
        checks.slices(component, evidence),
        checks.latency(component, evidence),
        checks.replay(component, evidence),
    )
    if not origin.ok and not evidence.candidate.scores:
        rest = tuple(checks.skipped(check.name, "the archive was not run, since its code is refused") for check in rest)
    found = (origin, *rest)
    reasons = tuple(reason for check in found for reason in check.reasons)
    return PromotionVerdict(
        component=component.name,
        version=version,
        verdict="pass" if all(check.ok for check in found) else "refuse",
        reasons=reasons,
        checks=found,
        metric=component.metric.name,
        live_version=evidence.live_version,
        test_set=evidence.candidate.test_set,
        policy=policy_hash(component),
    )

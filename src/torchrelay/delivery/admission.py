"""May this version be served here? Decided once for a version, its archive and the policy, and remembered."""

import hashlib
import json
import time
from typing import Protocol

from torchrelay.config import Serving
from torchrelay.delivery.store import Admission
from torchrelay.errors import RefusedError
from torchrelay.handover import WantedVersion
from torchrelay.lineage import (
    TAG_ARCHIVE_URL,
    TAG_DIGEST,
    TAG_ENVIRONMENT,
    TAG_PROOF,
    TAG_REASONS,
    TAG_SERVING,
    TAG_VERDICT,
)
from torchrelay.tracking import ModelVersion

_READ = (TAG_VERDICT, TAG_REASONS, TAG_DIGEST, TAG_PROOF, TAG_ARCHIVE_URL, TAG_ENVIRONMENT, TAG_SERVING)


class _Asked(Serving):
    """How a version asks to be served."""

    keep_inputs: bool = False


class Gatekeeper(Protocol):
    """Who decides for a perimeter."""

    def policy(self, version: ModelVersion) -> str:
        """A hash of all that the decision rests on, but for the archive itself: another one asks for another look."""
        ...

    def passing(self, version: ModelVersion) -> str:
        """The policy that a refusal is kept under which another state of this checkout alone would turn round."""
        ...

    def decide(self, version: ModelVersion, live: WantedVersion | None) -> Admission | None:
        """Admit or refuse; None while it is still being looked at. TorchrelayError when it cannot be decided now."""
        ...


class Trusting:
    """Dev's gatekeeper: the pipeline's own verdict and proof, as the registry has them."""

    def policy(self, version: ModelVersion) -> str:
        """What the pipeline wrote on the version."""
        return tags_hash(version)

    def passing(self, version: ModelVersion) -> str:
        """The same: this gatekeeper looks at no checkout."""
        return self.policy(version)

    def decide(self, version: ModelVersion, live: WantedVersion | None) -> Admission:  # noqa: ARG002
        """Admit what the gate passed, with a signed and proven archive."""
        reason = refusal(version)
        return decision(version, self.policy(version), reason, None if reason else wanted_version(version))


def refusal(version: ModelVersion) -> str | None:
    """Why what the pipeline wrote on this version keeps it from being served, or None."""
    tags = version.tags
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
    try:
        wanted_version(version)
    except (LookupError, ValueError) as error:
        return f"its tags are not what the pipeline writes: {error!r:.300}"
    return None


def refusal_error(component: str, version: str, reason: str) -> RefusedError:
    """The three parts of a refusal."""
    return RefusedError(
        f"{component} version {version} may not be served: {reason}",
        "a version that the gate passed, with a signed and proven archive",
        f"open results/{component}/gate/report.html, change the component or its policy, "
        f"then make deploy-dev COMPONENT={component}",
    )


def decision(version: ModelVersion, policy: str, reason: str | None, wanted: WantedVersion | None) -> Admission:
    """The decision as it is remembered."""
    return Admission(
        component=version.name,
        version=version.version,
        digest=version.tags.get(TAG_DIGEST, ""),
        policy=policy,
        admitted=reason is None,
        reason=reason or "",
        at=time.time(),
        wanted=wanted,
    )


def wanted_version(version: ModelVersion, url: str | None = None) -> WantedVersion:
    """All that a node must know to serve a version, as the registry has it; `url` is where its archive lies.

    KeyError or ValueError where the tags are not the pipeline's: anybody who can write to the registry can set them.
    """
    tags = version.tags
    asked = _Asked.model_validate_json(tags[TAG_SERVING])
    return WantedVersion(
        component=version.name,
        version=version.version,
        digest=tags[TAG_DIGEST],
        environment=tags[TAG_ENVIRONMENT],
        url=url or tags[TAG_ARCHIVE_URL],
        **asked.model_dump(),
    )


def tags_hash(version: ModelVersion) -> str:
    """A hash of the tags that a decision reads."""
    content = json.dumps([version.tags.get(name) for name in _READ])
    return hashlib.sha256(content.encode()).hexdigest()[:16]

"""What converge tells the world: the ledger, through its outbox, and the registry's `-live` alias and tags.

The ledger is noted on this machine at once and carried to the tracking server later, so that a server that does not
answer holds up nothing that matters.
"""

import getpass
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from torchrelay import ledger
from torchrelay.config import Perimeter, settings
from torchrelay.delivery.store import Admission, State
from torchrelay.errors import TrackingError
from torchrelay.handover import WantedVersion
from torchrelay.lineage import TAG_DIGEST
from torchrelay.tracking import PREFIX, ModelVersion, Tracking

log = logging.getLogger(__name__)


class Teller:
    """Speaks for one perimeter."""

    def __init__(self, tracking: Tracking, name: str, perimeter: Perimeter) -> None:
        self.tracking = tracking
        self.name = name
        self.perimeter = perimeter

    def event(
        self,
        kind: ledger.Kind,
        wanted: WantedVersion,
        live: WantedVersion | None,
        *,
        why: str,
        began: float,
        failed: int | None = None,
        report: str = "",
        pages: Mapping[str, str] | None = None,
    ) -> None:
        """Note what happened to a version, which took the place of `live`."""
        what = (wanted.component, wanted.version, wanted.digest)
        found = entry(kind, what, live, why=why, began=began)
        found = found.model_copy(update={"failed_requests": failed, "report": report})
        ledger.note(self.name, found, outbox(), pages)

    def flush(self) -> None:
        """Carry to the tracking server what waits."""
        try:
            ledger.flush_outbox(self.tracking, outbox())
        except TrackingError as error:
            log.warning("the ledger waits: %s", error.found)

    def registry(self, state: State, requested: ModelVersion | None) -> None:
        """Say in the registry what serves, and why a request was turned down."""
        try:
            self._move_live_alias(state)
            if requested and state.refused:
                self._tell_refusal(state.live, requested, state.refused)
        except TrackingError as error:
            log.warning("the registry was not told: %s", error.found)

    def _move_live_alias(self, state: State) -> None:
        alias = live_alias(self.perimeter)
        said = self.tracking.aliases(state.component).get(alias)
        serves = state.live.version if state.live else None
        if said == serves:
            return
        if serves is None:
            self.tracking.delete_alias(state.component, alias)
        elif self.tracking.version(state.component, serves):
            self.tracking.set_alias(state.component, alias, serves)

    def _tell_refusal(self, live: WantedVersion | None, requested: ModelVersion, refused: Admission) -> None:
        """Once for a refusal: the tag on the version is set last."""
        tag = f"{PREFIX}{self.name}.refused"
        if requested.tags.get(tag) == refused.reason:
            return
        what = (requested.name, requested.version, requested.tags.get(TAG_DIGEST, ""))
        found = entry("refusal", what, live, why=refused.reason, began=refused.at)
        ledger.record(self.tracking, self.name, found.model_copy(update={"report": refused.report}), outbox())
        self.tracking.set_version_tags(requested.name, requested.version, {tag: refused.reason})


def live_alias(perimeter: Perimeter) -> str:
    """The alias that says what serves; only converge moves it."""
    return f"{perimeter.alias}-live"


def entry(
    kind: ledger.Kind, what: tuple[str, str, str], live: WantedVersion | None, *, why: str, began: float
) -> ledger.Entry:
    """What the ledger says of an event: `what` is component, version and digest."""
    component, version, digest = what
    return ledger.Entry(
        kind=kind,
        component=component,
        who=getpass.getuser(),
        why=why,
        from_version=live.version if live else None,
        to_version=None if kind == "withdrawal" else version,
        verdict="refuse" if kind == "refusal" else "pass",
        digest=digest,
        duration_s=max(0.0, time.time() - began),
        failed_requests=None,
        started=began,
    )


def outbox() -> Path:
    """Where entries wait for the tracking server."""
    return settings().state / "ledger-outbox"

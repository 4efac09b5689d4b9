"""Close the difference between what the registry asks for and what a perimeter's nodes really run.

Level-triggered and idempotent: it looks at state, never at an event, and running it again does no harm.
"""

import getpass
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from torchrelay import ledger
from torchrelay.config import Frozen, Node, Perimeter, Site, read_json, settings, write_json
from torchrelay.delivery.plan import Candidate, Claim, Decision, decide, desired, serves
from torchrelay.errors import BusyError, RefusedError, ServingError, TorchrelayError
from torchrelay.handover import Desired, NodeReport
from torchrelay.lineage import TAG_DIGEST
from torchrelay.tracking import ModelVersion, Tracking

_APPLY_SECONDS = 900
_LOCK_SECONDS = 900


@dataclass(frozen=True)
class Outcome:
    """What one run of converge found and did."""

    decisions: list[Decision]
    reports: list[NodeReport]
    silent: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def serving(self, component: str) -> bool:
        """Whether every node says that it serves what this component should run; one that is silent says nothing."""
        wanted = next((one.wanted for one in self.decisions if one.component == component), None)
        return not self.silent and all(
            serves(wanted, next((one for one in report.served if one.component == component), None))
            for report in self.reports
        )


def live_alias(perimeter: Perimeter) -> str:
    """The alias that says what serves; only converge moves it."""
    return f"{perimeter.alias}-live"


def claims(tracking: Tracking, perimeter: Perimeter) -> list[Claim]:
    """What the registry says of every component that was ever asked into this perimeter."""
    return [
        Claim(
            component=name,
            requested=_candidate(tracking.alias(name, perimeter.alias)),
            live=_candidate(tracking.alias(name, live_alias(perimeter))),
        )
        for name, aliases in sorted(tracking.models().items())
        if perimeter.alias in aliases or live_alias(perimeter) in aliases
    ]


def converge(site: Site, name: str, why: str) -> Outcome:
    """Bring perimeter `name` to what the registry asks for.

    A refused request leaves what is live in service and is written to the ledger once. Raises ServingError
    when a node could not be brought there or gave no report; `@…-live` then moves only where all nodes say that
    they serve what is wanted.
    """
    perimeter = site.perimeters[name]
    tracking = Tracking(site.tracking.url)
    with _alone(name):
        _flush(tracking)
        decisions = [decide(claim) for claim in claims(tracking, perimeter)]
        began = time.time()
        reports, errors = _apply_everywhere(perimeter, desired(name, decisions))
        silent = sorted({node.name for node in perimeter.nodes} - {report.node for report in reports})
        outcome = Outcome(decisions, reports, silent, _changed(reports))
        _settle(tracking, perimeter, outcome, _Event(name, why, began))
        if errors:
            raise errors[0]
        return outcome


def refused(outcome: Outcome, component: str) -> RefusedError | None:
    """The refusal of this component's request, as an error, if it was refused."""
    decision = next((one for one in outcome.decisions if one.component == component), None)
    if decision is None or decision.refusal is None or decision.refused is None:
        return None
    return refusal_error(decision.refused, decision.refusal)


def refusal_error(candidate: Candidate, reason: str) -> RefusedError:
    """The three parts of a refusal."""
    return RefusedError(
        f"{candidate.component} version {candidate.version} may not be served: {reason}",
        "a version that the gate passed, with a signed and proven archive",
        f"open results/{candidate.component}/gate/report.html, change the component or its policy, "
        f"then make deploy-dev COMPONENT={candidate.component}",
    )


def _candidate(version: ModelVersion | None) -> Candidate | None:
    return Candidate(version.name, version.version, version.tags) if version else None


@contextmanager
def _alone(name: str) -> Iterator[None]:
    path = settings().state / "perimeters" / name / "converge.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise BusyError(
            f"{path} has been held for {_LOCK_SECONDS} s", "one converge at a time", "make status"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _apply_everywhere(perimeter: Perimeter, wanted: Desired) -> tuple[list[NodeReport], list[TorchrelayError]]:
    reports: list[NodeReport] = []
    errors: list[TorchrelayError] = []
    for node in perimeter.nodes:
        try:
            report, error = _apply_on(node, wanted)
        except TorchrelayError as failure:
            errors.append(failure)
            continue
        reports.append(report)
        if error:
            errors.append(error)
    return reports, errors


def _apply_on(node: Node, wanted: Desired) -> tuple[NodeReport, TorchrelayError | None]:
    """Run `torchrelay apply` on the node, as a process of its own; its last line is its report."""
    command = [sys.executable, "-m", "torchrelay", "apply", "--node", str(node.folder), "--desired", "-", "--json"]
    try:
        done = subprocess.run(
            command,
            input=wanted.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=_APPLY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        raise ServingError(f"apply on {node.name} took over {_APPLY_SECONDS} s", "an answer", "make status") from late
    _keep_log(node, done.stderr)
    try:
        answer = json.loads(done.stdout)
    except ValueError as nothing:
        raise ServingError(
            f"apply on {node.name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}",
            "a report of what the node serves",
            f"read {_log(node)}",
        ) from nothing
    fault = answer["error"]
    error = ServingError(fault["found"], fault["expected"], fault["next"]) if fault else None
    return NodeReport.model_validate(answer["report"]), error


def _log(node: Node) -> Path:
    return settings().state / "logs" / f"apply-{node.name}.log"


def _keep_log(node: Node, text: str) -> None:
    _log(node).parent.mkdir(parents=True, exist_ok=True)
    _log(node).write_text(text, encoding="utf-8")


def _changed(reports: list[NodeReport]) -> list[str]:
    return sorted({served.component for report in reports for served in report.served if served.changed})


def _settle(tracking: Tracking, perimeter: Perimeter, outcome: Outcome, event: "_Event") -> None:
    """Say in the registry what serves now, and in the ledger what happened."""
    for decision in outcome.decisions:
        live = tracking.alias(decision.component, live_alias(perimeter))
        if decision.refusal and decision.refused:
            event.record(tracking, "refusal", decision.refused, live, decision.refusal)
        if not outcome.serving(decision.component):
            continue
        wanted = decision.wanted
        if wanted is None:
            _withdraw(tracking, perimeter, live, event)
        elif live is None or live.version != wanted.version:
            with _change(event, wanted.component, live, wanted.version) as change:
                change.record(tracking, "rollout", wanted, live, event.why)
                tracking.set_alias(wanted.component, live_alias(perimeter), wanted.version)
        elif decision.component in outcome.changed:
            event.record(tracking, "mend", wanted, live, event.why)


def _withdraw(tracking: Tracking, perimeter: Perimeter, live: ModelVersion | None, event: "_Event") -> None:
    """Nobody asks for the component any more and no node serves it: nothing of it is live."""
    if live is None:
        return
    with _change(event, live.name, live, None) as change:
        change.record(tracking, "withdrawal", Candidate(live.name, live.version, live.tags), live, event.why)
        tracking.delete_alias(live.name, live_alias(perimeter))


class _Underway(Frozen):
    """A change of what is live, from before it is in the ledger until the alias has moved."""

    from_version: str | None
    to_version: str | None
    began: float


@contextmanager
def _change(event: "_Event", component: str, live: ModelVersion | None, to_version: str | None) -> Iterator["_Event"]:
    """The event, begun when the same change was first tried: killed in between, the rerun finds its own ledger entry.

    The entry comes before the alias, since a live version that no entry explains is worse than an entry too early.
    """
    note = settings().state / "perimeters" / event.perimeter / "underway" / f"{component}.json"
    change = _Underway(from_version=live.version if live else None, to_version=to_version, began=event.began)
    if note.is_file():
        earlier = read_json(_Underway, note, f"rm {note}")
        if (earlier.from_version, earlier.to_version) == (change.from_version, change.to_version):
            change = earlier
    write_json(note, change)
    yield replace(event, began=change.began)
    note.unlink()


def record_refusal(tracking: Tracking, name: str, perimeter: Perimeter, candidate: Candidate, reason: str) -> None:
    """Write into the ledger that a request was turned down; the same refusal is written once."""
    live = tracking.alias(candidate.component, live_alias(perimeter))
    _Event(name, reason, time.time()).record(tracking, "refusal", candidate, live, reason)


@dataclass(frozen=True)
class _Event:
    """One run of converge, as the ledger tells it."""

    perimeter: str
    why: str
    began: float

    def record(
        self, tracking: Tracking, kind: ledger.Kind, candidate: Candidate, live: ModelVersion | None, why: str
    ) -> None:
        entry = ledger.Entry(
            kind=kind,
            component=candidate.component,
            who=getpass.getuser(),
            why=why,
            from_version=live.version if live else None,
            to_version=None if kind == "withdrawal" else candidate.version,
            verdict="refuse" if kind == "refusal" else "pass",
            digest=candidate.tags.get(TAG_DIGEST, ""),
            duration_s=time.time() - self.began,
            failed_requests=None,
            started=self.began,
        )
        ledger.record(tracking, self.perimeter, entry, _outbox())


def _outbox() -> Path:
    return settings().state / "ledger-outbox"


def _flush(tracking: Tracking) -> None:
    ledger.flush_outbox(tracking, _outbox())

"""The single faults: what is done to production, and which version it must come to serve by itself.

The clock starts when a fault returns. What it asks for, it asks for last, and tells nobody but the registry.
"""

import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
import urllib3

from production_rig import GATEWAY, NAME, NODES, ORCHESTRATOR, Rig
from torchrelay.delivery import reach

FIRST, SECOND = NODES
_DOWN_S = 3


@dataclass
class Case:
    """A production with two versions that have served, the one that is live and another one; what must serve then."""

    rig: Rig
    live: str
    other: str
    wanted: str = ""

    def __post_init__(self) -> None:
        self.wanted = self.live

    def ask(self, version: str) -> None:
        """Move the alias."""
        self.rig.promote(version, wake=False)
        self.wanted = version


Fault = Callable[[Case], None]


# In steady state


def engine_of_one_node(case: Case) -> None:
    case.rig.kill_engine(FIRST)


def engines_of_both_nodes(case: Case) -> None:
    case.rig.kill_engine(FIRST)
    case.rig.kill_engine(SECOND)


def gateway(case: Case) -> None:
    (envoy,) = [one for one in case.rig.processes(GATEWAY) if one.name() == "envoy"]
    envoy.kill()
    envoy.wait(10)


def keeper_and_engine(case: Case) -> None:
    case.rig.kill(f"{SECOND}-keeper")
    case.rig.kill_engine(SECOND)


def orchestrator_and_engine(case: Case) -> None:
    case.rig.kill(ORCHESTRATOR)
    case.rig.kill_engine(FIRST)


def version_unloaded_by_hand(case: Case) -> None:
    node = next(one for one in case.rig.perimeter.nodes if one.name == FIRST)
    for held in (one for one in reach.observe_on(node).held if one.version == case.live):
        url = f"http://{held.endpoint.host}:{held.endpoint.port}/v/{NAME}/{case.live}"
        urllib3.request("DELETE", url, timeout=10, retries=False)


def archive_lost_and_engine(case: Case) -> None:
    state = case.rig.state
    assert state.live is not None
    shutil.rmtree(case.rig.perimeter.nodes[1].folder / "archives" / state.live.digest)
    case.rig.kill_engine(FIRST)


def what_it_was_told_lost_and_engine(case: Case) -> None:
    (case.rig.perimeter.nodes[1].folder / "desired.json").unlink()
    case.rig.kill_engine(FIRST)


def routes_lost_and_gateway(case: Case) -> None:
    for file in (case.rig.state_folder / "perimeters" / "production" / "gateway").glob("*.json"):
        file.unlink()
    gateway(case)


def memory_lost(case: Case) -> None:
    case.rig.signal(ORCHESTRATOR, signal.SIGSTOP)
    for file in case.rig.store.path.parent.glob("control.db*"):
        file.unlink()
    case.rig.kill(ORCHESTRATOR)


def everything(case: Case) -> None:
    case.rig.kill(ORCHESTRATOR)
    for node in case.rig.perimeter.nodes:
        case.rig.kill(f"{node.name}-keeper")
    engines_of_both_nodes(case)
    gateway(case)


def live_alias_moved_by_hand(case: Case) -> None:
    case.rig.tracking.set_alias(NAME, "production-live", case.other)


def tracking_away_and_engine(case: Case) -> None:
    case.rig.stop_tracking()
    case.rig.kill_engine(FIRST)


# While the alias moves


def nothing_else(case: Case) -> None:
    case.ask(case.other)


def there_and_back(case: Case) -> None:
    case.ask(case.other)
    case.ask(case.live)


def to_and_fro(case: Case) -> None:
    for _ in range(5):
        case.ask(case.other)
        case.ask(case.live)
    case.ask(case.other)


def alias_deleted_and_set(case: Case) -> None:
    case.rig.tracking.delete_alias(NAME, "production")
    case.ask(case.other)


def refused_version_before(case: Case) -> None:
    case.ask(case.rig.version(signed_by="stranger"))
    case.ask(case.other)


def alias_and_orchestrator(case: Case) -> None:
    case.rig.kill(ORCHESTRATOR)
    case.ask(case.other)


def alias_then_orchestrator(case: Case) -> None:
    case.ask(case.other)
    time.sleep(0.2)
    with suppress(AssertionError, psutil.Error):
        case.rig.kill(ORCHESTRATOR)


def orchestrator_stood_still(case: Case) -> None:
    stopped = case.rig.signal(ORCHESTRATOR, signal.SIGSTOP)
    case.ask(case.other)
    time.sleep(_DOWN_S)
    for one in stopped:
        one.send_signal(signal.SIGCONT)


def alias_and_engine(case: Case) -> None:
    case.rig.kill_engine(FIRST)
    case.ask(case.other)


def alias_and_engines(case: Case) -> None:
    case.rig.kill_engine(FIRST)
    case.rig.kill_engine(SECOND)
    case.ask(case.other)


def alias_and_gateway(case: Case) -> None:
    gateway(case)
    case.ask(case.other)


def alias_and_keepers(case: Case) -> None:
    for node in case.rig.perimeter.nodes:
        case.rig.kill(f"{node.name}-keeper")
    case.ask(case.other)


def alias_and_tracking(case: Case) -> None:
    case.ask(case.other)
    case.rig.stop_tracking()
    case.rig.start_tracking()


def tracking_stood_still(case: Case) -> None:
    """Nobody can ask meanwhile; those who look wait for an answer."""
    case.rig.pause_tracking(_DOWN_S)
    case.ask(case.other)


def webhooks_forged(case: Case) -> None:
    for number in range(100):
        with suppress(urllib3.exceptions.HTTPError):
            url, body = f"{case.rig.perimeter.orchestrator}/webhook", b'{"entity": "model_version_alias"}'
            headers = {"X-MLflow-Signature": f"v1,{number:064x}", "X-MLflow-Timestamp": str(int(time.time()))}
            urllib3.request("POST", url, body=body, headers=headers, timeout=2, retries=False)
    case.ask(case.other)


def archives_lost(case: Case) -> None:
    for node in case.rig.perimeter.nodes:
        shutil.rmtree(node.folder / "archives", ignore_errors=True)
    case.ask(case.other)


def prediction_logs_not_writable(case: Case) -> None:
    for node in case.rig.perimeter.nodes:
        shutil.rmtree(node.folder / "predictions", ignore_errors=True)
        (node.folder / "predictions").write_text("a file where a folder was")
    case.ask(case.other)


STEADY: tuple[Fault, ...] = (
    engine_of_one_node,
    engines_of_both_nodes,
    gateway,
    keeper_and_engine,
    orchestrator_and_engine,
    version_unloaded_by_hand,
    archive_lost_and_engine,
    what_it_was_told_lost_and_engine,
    routes_lost_and_gateway,
    memory_lost,
    everything,
    live_alias_moved_by_hand,
    tracking_away_and_engine,
)
MOVING: tuple[Fault, ...] = (
    nothing_else,
    there_and_back,
    to_and_fro,
    alias_deleted_and_set,
    refused_version_before,
    alias_and_orchestrator,
    alias_then_orchestrator,
    orchestrator_stood_still,
    alias_and_engine,
    alias_and_engines,
    alias_and_gateway,
    alias_and_keepers,
    alias_and_tracking,
    tracking_stood_still,
    webhooks_forged,
    archives_lost,
    prediction_logs_not_writable,
)

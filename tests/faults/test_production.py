"""Production under faults, for real: it serves one admitted version, callers notice nothing, it mends itself.

Each test ends in `settled`, which says so: every node holds the version, the gateway sends it all requests, callers get
it, and the ledger tells what happened.
"""

import random
import re
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import urllib3

from engines.supervised import until
from production_rig import (
    BAD_MODELS,
    GATEWAY,
    NODES,
    ORCHESTRATOR,
    SOURCES,
    Clients,
    Rig,
    production,
    scaled,
)
from torchrelay import archive
from torchrelay.delivery import reach
from torchrelay.errors import BusyError
from torchrelay.serving.supervisor import shutdown

pytestmark = pytest.mark.real

MENDED_S = 35


@contextmanager
def unharmed(rig: Rig) -> Iterator[Clients]:
    """Clients that loop meanwhile, and notice nothing."""
    with rig.clients().looping() as clients:
        yield clients
    assert clients.seen
    assert (clients.failures[:3], clients.wrong[:3]) == ([], [])


def settled(rig: Rig, version: str, seconds: float = MENDED_S) -> None:
    """Production serves this version and nothing else, and the registry says so."""
    rig.await_live(version, seconds)
    until(lambda: rig.tracking.aliases("points").get("production-live") == version, seconds)


def mended(rig: Rig, version: str) -> bool:
    """Whether the ledger has the version's roll-out, and no more but mends, which a keeper may have forestalled."""
    first, *rest = rig.told(version)
    return first == "rollout" and set(rest) <= {"mend"}


# The road that everything takes


def test_a_promotion_goes_through_every_stage_and_a_rollback_takes_seconds(rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.1))
    with unharmed(rig) as clients:
        done = rig.run("promote", "--component", "points", "--version", version)
        assert done.returncode == 0, done.stderr
        settled(rig, version)
        again = rig.run("promote", "--component", "points", "--version", version)
        assert again.returncode != 0
        assert "live in production already" in again.stderr
        began = time.monotonic()
        rig.promote(live)
        until(lambda: (state := rig.state).live is not None and state.live.version == live, 30)
        took = time.monotonic() - began
        settled(rig, live)
    said = done.stderr + done.stdout
    assert [stage for stage in ("shadow", " 5 %", " 25 %") if stage not in said] == []
    assert took < 15, "kept warm, so a matter of seconds even on a busy machine"
    assert set(clients.by_version) == {live, version}
    rig.await_told(version, "rollout")
    until(lambda: rig.told(live)[-1] == "rollback", 30)


def test_the_alias_is_moved_while_a_version_rolls_out(rig: Rig, live: str) -> None:
    first, second = rig.version(scaled(1.2)), rig.version(scaled(1.3))
    with unharmed(rig):
        rig.promote(first)
        rig.await_stage(first, 0)
        rig.promote(second)
        settled(rig, second)
    rig.await_told(second, "rollout")
    assert rig.told(first) == []


@pytest.mark.parametrize("what", ["alias", pytest.param("version", marks=pytest.mark.whole)])
def test_the_request_is_taken_away_while_a_version_rolls_out(what: str, rig: Rig, live: str) -> None:
    """Slow is what is much like the other one: all of them take minutes together."""
    version = rig.version(scaled(1.2))
    with unharmed(rig):
        rig.promote(version)
        rig.await_stage(version, 0)
        if what == "alias":
            rig.tracking.delete_alias("points", "production")
        else:
            delete_version(rig, version)
        settled(rig, live)
    assert rig.told(version) == []


def test_what_is_live_is_deleted_from_the_registry_and_serves_on(rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.4))
    rig.promote(version)
    settled(rig, version)
    with unharmed(rig):
        delete_version(rig, version)
        rig.kill_engine(NODES[0])
        time.sleep(3)
        rig.await_live(version, MENDED_S)
    assert mended(rig, version)


def delete_version(rig: Rig, version: str) -> None:
    url = f"{rig.url}/api/2.0/mlflow/model-versions/delete"
    answer = urllib3.request("DELETE", url, json={"name": "points", "version": version}, timeout=10)
    assert answer.status == 200, answer.data


def test_two_promotions_at_once(rig: Rig, live: str) -> None:
    """Whichever was asked for last goes live; the other one may have, or not, but never beside it."""
    versions = [rig.version(scaled(1.2)), rig.version(scaled(1.3))]
    with unharmed(rig):
        both = [threading.Thread(target=rig.promote, args=(version,)) for version in versions * 3]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        last = rig.tracking.aliases("points")["production"]
        settled(rig, last)
    rig.await_told(last, "rollout")


# What may not come in


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.mar").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.mar").write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / "model.mar").read_bytes()
    (folder / "model.mar").write_bytes(content[: len(content) // 2])


def swapped(other: Path) -> Callable[[Path], None]:
    """Another version's archive, as it was signed."""

    def swap(folder: Path) -> None:
        for file in folder.iterdir():
            shutil.copyfile(other / file.name, file)

    return swap


def forbidden(rig: Rig, live: str, kind: str) -> str:
    """A version that may not be served."""
    match kind:
        case "ungated":
            return rig.version(tags={"torchrelay.verdict": ""})
        case "refused by the gate":
            return rig.version(tags={"torchrelay.verdict": "refuse", "torchrelay.verdict.reasons": "too bad"})
        case "unproven":
            return rig.version(tags={"torchrelay.archive.proof": ""})
        case "unsigned":
            return rig.version(signed_by=None)
        case "another key":
            return rig.version(signed_by="stranger")
        case "flipped":
            return rig.version(damage=flip)
        case "truncated":
            return rig.version(damage=truncate)
        case "swapped":
            other = rig.version(scaled(2.0))
            return rig.version(damage=swapped(rig.folder / "made" / other / "archive"))
        case "a path for a digest":
            return rig.version(tags=dict.fromkeys(("torchrelay.archive.digest", "torchrelay.archive.proof"), ".."))
        case "a path for an environment":
            return rig.version(tags={"torchrelay.environment": "../../elsewhere"})
        case "no settings":
            return rig.version(tags={"torchrelay.serving": ""})
        case "the live version's digest":
            digest = rig.made(live).tags["torchrelay.archive.digest"]
            return rig.version(tags=dict.fromkeys(("torchrelay.archive.digest", "torchrelay.archive.proof"), digest))
        case "uncommitted":
            return rig.version(handler=BAD_MODELS / "one_class.py", committed=False)
    raise AssertionError(kind)


FORBIDDEN = {
    "ungated": "the gate refused it|never judged",
    "refused by the gate": "too bad",
    "unproven": "not proven",
    "unsigned": "is not a signature",
    "another key": "not signed by",
    "flipped": "does not come in",
    "truncated": "does not come in",
    "swapped": "with the digest|does not come in",
    "a path for a digest": "not what the pipeline writes",
    "a path for an environment": "not what the pipeline writes",
    "no settings": "not what the pipeline writes",
    "the live version's digest": "does not come in",
    "uncommitted": "handler.py in the archive differs",
}


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_what_may_not_be_served_is_refused_once_and_changes_nothing(kind: str, rig: Rig, live: str) -> None:
    version = forbidden(rig, live, kind)
    kept = rig.store.path.parent / "admission" / rig.made(live).tags["torchrelay.archive.digest"] / "model.mar"
    before = kept.read_bytes()
    with unharmed(rig) as clients:
        rig.promote(version)
        reason = rig.await_refused(version)
        decided = rig.admission(version)
        time.sleep(2.5)  # two polls
        rig.wake()
        rig.await_live(live)
    rig.await_told(version, "refusal")
    (entry,) = [entry for entry in rig.ledger() if entry.to_version == version]
    assert (entry.kind, entry.from_version, entry.verdict) == ("refusal", live, "refuse")
    assert set(reason[:390]) == set(entry.why[:390])
    assert rig.made(version).tags["torchrelay.production.refused"][:300] == reason[:300]
    assert rig.admission(version) == decided
    assert rig.looked_at(version) == 1
    assert set(clients.by_version) == {live}
    assert re.search(FORBIDDEN[kind], reason), reason
    assert kept.read_bytes() == before, "what is live is run here, to compare with"


def test_a_refused_version_is_looked_at_again_once_its_record_has_changed(rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.3), tags={"torchrelay.verdict": "refuse"})
    rig.promote(version)
    rig.await_refused(version)
    with unharmed(rig):
        rig.tracking.set_version_tags("points", version, {"torchrelay.verdict": "pass"})
        settled(rig, version)
    rig.await_told(version, "refusal", "rollout")


# Kills


def test_the_orchestrator_is_killed_at_every_stage(rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.2))
    with unharmed(rig):
        rig.promote(version)
        until(lambda: rig.looked_at(version) == 1)
        rig.kill(ORCHESTRATOR)
        for stage in (-1, 0, 1, 2, 3):
            until(lambda at=stage: _reached(rig, version, at), 90)  # type: ignore[misc]
            with_patience(lambda: rig.kill(ORCHESTRATOR))
        settled(rig, version, 90)
    rig.await_told(version, "rollout")


def _reached(rig: Rig, version: str, stage: int) -> bool:
    state = rig.state
    if state.live and state.live.version == version:
        return True
    return bool(state.rollout and state.rollout.wanted.version == version and state.rollout.stage >= stage)


def with_patience(do: Callable[[], None]) -> None:
    """Again, where there is no process at this moment because the last one has just been killed."""
    end = time.monotonic() + 30
    while True:
        try:
            return do()
        except (AssertionError, psutil.NoSuchProcess):
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.mark.whole
def test_the_orchestrator_is_killed_whenever(rig: Rig, live: str) -> None:
    """Two minutes: five roll-outs, with a kill every few seconds."""
    chance = random.Random(1)
    with unharmed(rig):
        for number in range(5):
            version = rig.version(scaled(1.1 + number / 10))
            rig.promote(version)
            end = time.monotonic() + 20
            while time.monotonic() < end and rig.amiss(version):
                with_patience(lambda: rig.kill(ORCHESTRATOR))
                time.sleep(chance.uniform(0.1, 5))
            settled(rig, version, 90)
            rig.await_told(version, "rollout")


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.whole)], ids=["expired", "30 s"])
def test_an_orchestrator_that_stood_still_has_lost_its_say(really: bool, rig: Rig, live: str) -> None:
    """The slow one waits until the lease is over, which takes half a minute; the other one shortens it."""
    version = rig.version(scaled(1.2))
    with unharmed(rig):
        rig.promote(version)
        rig.await_stage(version, 0)
        until(lambda: rig.state.rollout is not None and "first" in rig.state.rollout.marks)
        try:
            stop_orchestrator(rig)
            if not really:
                expire_lease(rig)
            with rig.store.lease(60) as token:
                told = {}
                for node in rig.perimeter.nodes:
                    desired = reach.observe_on(node).told
                    assert desired is not None
                    told[node.name] = desired.model_copy(update={"token": token})
                    reach.apply_on(node, told[node.name])
                before = rig.state
                rig.signal(ORCHESTRATOR, signal.SIGCONT)
                time.sleep(4)
                assert rig.state == before
                for node in rig.perimeter.nodes:
                    assert reach.observe_on(node).told == told[node.name]
                    with pytest.raises(BusyError, match="fencing token"):
                        reach.apply_on(node, told[node.name].model_copy(update={"token": token - 1}))
        finally:
            for process in rig.processes(ORCHESTRATOR):
                process.send_signal(signal.SIGCONT)
        settled(rig, version, 60)
    rig.await_told(version, "rollout")


def stop_orchestrator(rig: Rig) -> None:
    """Not in the middle of a write to its memory, which nobody could get at then; nor of an apply, which has a lock."""
    rig.signal(ORCHESTRATOR, signal.SIGSTOP)
    while not writable(rig):
        rig.signal(ORCHESTRATOR, signal.SIGCONT)
        time.sleep(0.1)
        rig.signal(ORCHESTRATOR, signal.SIGSTOP)


def writable(rig: Rig) -> bool:
    with closing(sqlite3.connect(rig.store.path, timeout=1)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.rollback()
        return True


def expire_lease(rig: Rig) -> None:
    connection = sqlite3.connect(rig.store.path, timeout=20)
    with connection:
        connection.execute("UPDATE lease SET expires = 0")
    connection.close()


@pytest.mark.parametrize("when", ["in steady state", "in a canary"])
def test_an_engine_is_killed(when: str, rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.2)) if when == "in a canary" else live
    with unharmed(rig):
        time.sleep(1)
        if version != live:
            rig.promote(version)
            rig.await_stage(version, 1)
        rig.kill_engine(NODES[0])
        settled(rig, version)
    if version != live:
        rig.await_told(version, "rollout")


@pytest.mark.whole
def test_an_engine_stands_still(rig: Rig, live: str) -> None:
    """A minute: only an engine that has been up for half a minute is taken for hung. Meanwhile the way back is open."""
    version = rig.version(scaled(1.2))
    rig.promote(version)
    settled(rig, version)
    until(lambda: rig.supervisor.uptime_s(rig.engine_program(NODES[0])) > 31, 60)
    with rig.clients().looping() as clients:
        time.sleep(1)
        before = rig.processes(f"{NODES[0]}-points-")
        for process in before:
            process.send_signal(signal.SIGSTOP)
        rig.promote(live)
        settled(rig, live, 60)
        time.sleep(1)
        mended = time.time()
        time.sleep(2)
    assert not any(process.is_running() for process in before)
    assert clients.wrong == []
    assert len(clients.failures) < 0.05 * len(clients.seen)
    assert {one.status for one in clients.seen if one.time > mended} == {200}


def test_both_engines_are_killed(rig: Rig, live: str) -> None:
    """Callers get errors while there is nobody to answer, and no wrong answer; then all is as before."""
    with rig.clients().looping() as clients:
        for node in NODES:
            rig.kill_engine(node)
        settled(rig, live)
        time.sleep(0.5)
        mended = time.time()
        time.sleep(1)
    assert clients.wrong == []
    assert {one.status for one in clients.seen if one.time > mended} == {200}
    assert {one.status for one in clients.failures} <= {0, 404, 500, 503, 504}


@pytest.mark.whole
def test_the_keepers_are_killed(rig: Rig, live: str) -> None:
    """Not in itself: all the kills take minutes together, and this one can do the least harm."""
    version = rig.version(scaled(1.2))
    with unharmed(rig):
        rig.promote(version)
        rig.await_stage(version, 0)
        for node in rig.perimeter.nodes:
            rig.kill(f"{node.name}-keeper")
        settled(rig, version)
    rig.await_told(version, "rollout")


@pytest.mark.parametrize("when", ["in steady state", "in a canary"])
def test_the_gateway_is_killed(when: str, rig: Rig, live: str) -> None:
    """Nobody can answer for a moment; then the same routes stand again, and the roll-out goes on."""
    version = rig.version(scaled(1.2)) if when == "in a canary" else live
    with rig.clients().looping() as clients:
        time.sleep(1)
        if version != live:
            rig.promote(version)
            rig.await_stage(version, 1)
        killed = time.time()
        kill_gateway(rig)
        settled(rig, version, 60)
    assert clients.wrong == []
    assert {one.status for one in clients.failures} <= {0, 404, 503}
    down = [one.time for one in clients.failures]
    assert not down or max(down) - killed < 10


def kill_gateway(rig: Rig) -> None:
    """Envoy, and not the keeper of its node, whose name begins alike."""
    (envoy,) = [one for one in rig.processes(GATEWAY) if one.name() == "envoy"]
    envoy.kill()
    envoy.wait(10)


# The tracking server is away


def test_the_tracking_server_is_away_in_steady_state_and_over_a_reboot(rig: Rig, live: str) -> None:
    with rig.clients().looping() as clients:
        rig.stop_tracking()
        rig.kill_engine(NODES[1])
        rig.await_live(live, MENDED_S)
    assert (clients.failures[:3], clients.wrong[:3]) == ([], [])
    shutdown(rig.conf)
    assert rig.processes("") == []
    rig.up(tracking=False)
    rig.await_live(live, 60)
    rig.up()
    settled(rig, live)


def test_a_breach_reverts_while_the_tracking_server_is_away(rig: Rig, live: str) -> None:
    version = rig.version(handler=BAD_MODELS / "later_raises.py")
    with rig.clients().looping() as clients:
        rig.promote(version)
        rig.await_stage(version, 1)
        rig.stop_tracking()
        with rig.turned():
            until(lambda: rig.state.rollout is None, 60)
            until(lambda: not rig.amiss(live), MENDED_S)
        reverted = time.time()
        time.sleep(1)
    assert {(one.status, one.version) for one in clients.seen if one.time > reverted} == {(200, live)}
    assert clients.wrong == []
    rig.start_tracking()
    rig.await_refused(version)
    settled(rig, live)
    rig.await_told(version, "refusal")
    until(lambda: "torchrelay.production.refused" in rig.made(version).tags, 30)


@pytest.mark.whole
def test_a_roll_out_waits_for_the_tracking_server_and_goes_on(rig: Rig, live: str) -> None:
    """The server takes half a minute to come up again."""
    version = rig.version(scaled(1.2))
    with unharmed(rig) as clients:
        rig.promote(version)
        rig.await_stage(version, 0)
        rig.stop_tracking()
        time.sleep(3)
        state = rig.state
        assert state.rollout is not None
        assert state.live is not None
        assert state.live.version == live
        rig.start_tracking()
        settled(rig, version)
    assert set(clients.by_version) == {live, version}
    rig.await_told(version, "rollout")


# The nodes' own doors


def test_a_key_of_devs_does_not_open_a_node(rig: Rig, live: str) -> None:
    """Whoever has dev's key and reaches a node still gets nothing served: a node trusts production's key alone."""
    version = rig.version(scaled(1.2))
    found = rig.made(version)
    node = next(one for one in rig.perimeter.nodes if one.name == NODES[0])
    told = reach.observe_on(node).told
    assert told is not None
    (now,) = [one for one in told.components if one.version == live]
    theirs = {
        "version": version,
        "digest": found.tags["torchrelay.archive.digest"],
        "url": found.tags["torchrelay.archive.url"],
    }
    with unharmed(rig):
        forged = told.model_copy(update={"components": (*told.components, now.model_copy(update=theirs))})
        report, error = reach.apply_on(node, forged)
        assert error is not None
        assert "not signed by" in error.found
        assert version not in {one.version for one in report.held}
        settled(rig, live)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, component_python: str) -> Iterator[Rig]:
    """The same production, whose nodes run TorchServe."""
    with production(tmp_path_factory.mktemp("q"), component_python, engine="torchserve") as made:
        yield made


@pytest.mark.whole
def test_torchserve_in_place_of_the_minimal_engine(real: Rig) -> None:
    """Two minutes: TorchServe takes seconds to load a version. A promotion, a breach, a dead engine and a rollback."""
    first, second = real.version(scaled(1.0)), real.version(scaled(1.2))
    bad = real.version(handler=BAD_MODELS / "later_raises.py")
    real.promote(first)
    settled(real, first, 120)
    with unharmed(real):
        real.promote(second)
        settled(real, second, 120)
        real.kill_engine(NODES[0])
        settled(real, second, 60)
    with real.clients().looping() as clients:
        real.promote(bad)
        real.await_stage(bad, 1, 120)
        with real.turned():
            real.await_refused(bad, 120)
            settled(real, second)
    assert clients.wrong == []
    assert len(clients.failures) < 0.1 * len(clients.seen)
    with unharmed(real):
        real.promote(first)
        settled(real, first, 15)
    real.await_told(bad, "refusal")
    assert mended(real, second)


@pytest.mark.whole
def test_a_model_that_leaks_does_not_take_torchserves_machine(real: Rig) -> None:
    """A minute: its workers outgrow their limit, end and start again, until the roll-out is over for that."""
    first = real.version(scaled(1.0))
    real.promote(first)
    settled(real, first, 120)
    with unharmed(real), real.serving(max_memory_mb=700):
        leaking = real.version(handler=BAD_MODELS / "served_leaks.py")
        real.promote(leaking)
        real.await_refused(leaking, 120)
        settled(real, first)
    logs = [path.read_text() for path in (real.state_folder / "logs").glob(f"{NODES[0]}-points-*.log")]
    assert any("this worker has grown beyond serving.max_memory_mb, 700 MB" in log for log in logs)


def test_the_rig_can_tell_good_from_bad(rig: Rig, live: str) -> None:
    """What every other test relies on: a version that is not everywhere is amiss, and wrong answers are seen."""
    assert rig.amiss(live) == ""
    assert "is live" in rig.amiss("0")
    assert (
        archive.verify(
            rig.perimeter.nodes[1].folder / "archives" / rig.made(live).tags["torchrelay.archive.digest"],
            rig.signers["production"].public,
        ).version
        == live
    )
    assert (SOURCES / "handler.py").is_file()

"""What the control node remembers: one lease at a time, a token that only grows, and what served."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrelay.delivery import store as stores
from torchrelay.delivery.store import Admission, Served, State, Store, with_served
from torchrelay.errors import BusyError
from torchrelay.handover import WantedVersion


@pytest.fixture
def memory(tmp_path: Path) -> Store:
    return Store(tmp_path / "control.db")


def wanted(version: str) -> WantedVersion:
    return WantedVersion(
        component="tiny",
        version=version,
        digest=f"digest-{version}",
        environment="e",
        url="u",
        workers=1,
        batch_size=1,
        max_batch_delay_ms=1,
        response_timeout_s=30,
        max_body_bytes=1024,
    )


def test_the_token_grows_with_every_lease(memory: Store) -> None:
    tokens = []
    for _ in range(3):
        with memory.lease(0) as token:
            tokens.append(token)
    assert tokens == sorted(set(tokens))


def test_nobody_gets_the_lease_while_it_is_held(memory: Store) -> None:
    with memory.lease(0), pytest.raises(BusyError, match="has held the lease"), Store(memory.path).lease(0.2):
        pass
    with memory.lease(0):
        pass


HOLD = """
import sys, time
from pathlib import Path
from torchrelay.delivery.store import Store
with Store(Path(sys.argv[1])).lease(0) as token:
    print(token, flush=True)
    time.sleep(60)
"""


def test_a_holder_that_was_killed_keeps_nobody_waiting(memory: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(memory.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    held = int(holder.stdout.readline())
    with pytest.raises(BusyError), memory.lease(0.2):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with memory.lease(1) as token:
        assert token > held


def test_a_holder_that_stood_still_loses_the_lease_and_cannot_save_any_more(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_LEASE_S", 0.2)
    monkeypatch.setattr(Store, "_renew", lambda *_: None)  # what a SIGSTOP does to the thread that renews it
    with memory.lease(0) as stale:
        memory.save(State(component="tiny"), stale)
        time.sleep(0.3)
        with Store(memory.path).lease(1) as fresh:
            assert fresh > stale
            with pytest.raises(BusyError, match="has taken over"):
                memory.save(State(component="tiny", live=wanted("1")), stale)
            memory.save(State(component="tiny", live=wanted("2")), fresh)
        live = memory.state("tiny").live
        assert live is not None and live.version == "2"


def test_a_long_step_keeps_the_lease(memory: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_LEASE_S", 2.0)  # renewed four times in that, so a busy machine may be slow at it
    with memory.lease(0) as token:
        time.sleep(3.0)
        with pytest.raises(BusyError), Store(memory.path).lease(0.1):
            pass
        memory.save(State(component="tiny"), token)


def test_a_decision_is_remembered_for_its_version_archive_and_policy(memory: Store) -> None:
    known = Admission(component="tiny", version="1", digest="d", policy="p", admitted=True, reason="", at=1)
    decide(memory, known)
    assert memory.admission("tiny", "1", "d", "p") == known
    for other in (("tiny", "2", "d", "p"), ("tiny", "1", "e", "p"), ("tiny", "1", "d", "q")):
        assert memory.admission(*other) is None
    decide(memory, known.model_copy(update={"admitted": False, "reason": "its canary failed"}))
    found = memory.admission("tiny", "1", "d", "p")
    assert found is not None and not found.admitted


def decide(memory: Store, admission: Admission) -> None:
    with memory.lease(1) as token:
        memory.decide(admission, token)


def test_who_has_lost_the_lease_decides_nothing(memory: Store) -> None:
    known = Admission(component="tiny", version="1", digest="d", policy="p", admitted=True, reason="", at=1)
    with memory.lease(1) as token:
        pass
    with memory.lease(1), pytest.raises(BusyError):
        memory.decide(known, token)
    assert memory.admission("tiny", "1", "d", "p") is None


def test_only_refusals_of_this_archive_are_forgotten(memory: Store) -> None:
    known = Admission(component="tiny", version="1", digest="d", policy="p", admitted=True, reason="", at=1)
    others = [known.model_copy(update=change) for change in ({"version": "2"}, {"digest": "e"})]
    refused = [one.model_copy(update={"admitted": False, "policy": "q"}) for one in (known, *others)]
    for one in (known, *refused):
        decide(memory, one)
    memory.forget_refusal("tiny", "1", "d")
    assert memory.admission("tiny", "1", "d", "p") == known
    assert memory.admission("tiny", "1", "d", "q") is None
    assert [memory.admission(one.component, one.version, one.digest, "q") for one in refused[1:]] == refused[1:]


def served(state: State) -> list[str]:
    return [one.wanted.version for one in state.served]


def test_the_way_back_leads_through_what_served_and_forgets_what_was_left() -> None:
    state = State(component="tiny")
    for version in ("1", "2", "3"):
        state = with_served(state, wanted(version), 0)
    assert served(state) == ["1", "2"]
    state = with_served(state, wanted("2"), 0)
    assert (state.live, served(state)) == (wanted("2"), ["1"])
    state = with_served(state, wanted("1"), 0)
    assert (state.live, served(state)) == (wanted("1"), [])
    state = with_served(state, wanted("4"), 0)
    assert served(state) == ["1"]


@given(st.lists(st.sampled_from("12345"), max_size=30))
def test_what_is_live_is_never_among_what_served_before_nor_is_anything_twice(moves: list[str]) -> None:
    state = State(component="tiny")
    for version in moves:
        state = with_served(state, wanted(version), 0)
        assert state.live == wanted(version)
        assert version not in served(state)
        assert len(set(served(state))) == len(served(state))


def test_a_state_outlives_the_process_as_it_was(memory: Store) -> None:
    state = State(component="tiny", live=wanted("1"), served=(Served(wanted=wanted("0"), since=1.0),))
    with memory.lease(0) as token:
        memory.save(state, token)
    assert Store(memory.path).states() == {"tiny": state}

"""What a perimeter's control node remembers: one SQLite file, so that a kill at any point loses nothing.

It holds the lease with its fencing token, what each component's state is, and every decision of admission. The
registry only says what is asked for: what was admitted and what served here is remembered here, so that neither a
tag that somebody changed nor a deleted version can reach production.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from torchrelay.config import Frozen, settings
from torchrelay.delivery.canary import Block
from torchrelay.errors import BusyError
from torchrelay.handover import Endpoint, RoutedVersion, WantedVersion

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lease (one INTEGER PRIMARY KEY CHECK (one = 1), token INTEGER NOT NULL,
    pid INTEGER, started REAL, expires REAL NOT NULL);
INSERT OR IGNORE INTO lease VALUES (1, 0, NULL, NULL, 0);
CREATE TABLE IF NOT EXISTS component (name TEXT PRIMARY KEY, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS admission (component TEXT, version TEXT, digest TEXT, policy TEXT, decision TEXT NOT NULL,
    PRIMARY KEY (component, version, digest, policy));
"""
_LEASE_S = 30.0


class Served(Frozen):
    """A version that got all requests here, in good health."""

    wanted: WantedVersion
    since: float


class Rollout(Frozen):
    """A roll-out as it stands."""

    wanted: WantedVersion
    kind: Literal["rollout", "rollback"]
    policy: str = Field(description="Under which it was admitted.")
    who: str
    why: str
    began: float
    stage: int
    since: float = Field(description="When the stage began, in seconds since 1970.")
    weights: tuple[int, ...] = Field(description="Of the stages, as the policy had them when it began.")
    blocks: tuple[Block, ...] = Field((), description="What was counted in this stage, poll by poll.")
    failed: int = Field(0, description="Requests that failed since it began.")
    marks: dict[str, Any] = Field(default_factory=dict, description="Where counting goes on.")
    judgement: Literal["bake", "pass", "breach"] = "bake"
    note: str = Field("", description="How it stands, for people.")
    figures: dict[str, float] = Field(default_factory=dict, description="What the note rests on.")
    report: str = Field("", description="URL of what admission rested on.")
    passed: str = Field("", description="What the stages that are over rested on, for people.")


class Admission(Frozen):
    """A decision, once for a version, its archive and the policy."""

    component: str
    version: str
    digest: str
    policy: str
    admitted: bool
    reason: str
    at: float
    wanted: WantedVersion | None = Field(None, description="What nodes are told of it; None if it was refused.")
    report: str = Field("", description="URL of the report.")


class State(Frozen):
    """One component in this perimeter."""

    component: str
    live: WantedVersion | None = None
    live_since: float = 0.0
    served: tuple[Served, ...] = Field((), description="What served before, the last one last; a rollback pops it.")
    rollout: Rollout | None = None
    rested: str = Field("", description="What the last roll-out that came through rested on, for people.")
    refused: Admission | None = Field(None, description="Why what is asked for now is turned down, if it is.")
    trouble: str = Field("", description="What keeps the next step from being done now; tried again by itself.")
    hold: dict[str, tuple[WantedVersion, ...]] = Field(default_factory=dict, description="What each node was told.")
    routes: tuple[RoutedVersion, ...] = Field((), description="What the gateway was told.")
    placed: dict[str, dict[str, Endpoint]] = Field(
        default_factory=dict, description="Where each routed version@digest was, by node, when the gateway was told."
    )


class Store:
    """The control node's memory of one perimeter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode=wal")
            connection.executescript(_SCHEMA)

    def states(self) -> dict[str, State]:
        """Every component that was ever asked for here."""
        with self._connection() as connection:
            rows = connection.execute("SELECT name, state FROM component ORDER BY name").fetchall()
        return {name: State.model_validate_json(state) for name, state in rows}

    def state(self, component: str) -> State:
        """One component; an empty one where there is none."""
        with self._connection() as connection:
            row = connection.execute("SELECT state FROM component WHERE name = ?", (component,)).fetchone()
        return State.model_validate_json(row[0]) if row else State(component=component)

    def save(self, state: State, token: int) -> None:
        """Replace the component's state; BusyError if the lease is no longer that of `token`."""
        with self._connection() as connection:
            done = connection.execute(
                "INSERT OR REPLACE INTO component SELECT ?, ? WHERE (SELECT token FROM lease) = ?",
                (state.component, state.model_dump_json(), token),
            )
            if done.rowcount != 1:
                raise _lost(self.path)

    def admission(self, component: str, version: str, digest: str, policy: str) -> Admission | None:
        """The decision on this version, archive and policy, if it was made."""
        with self._connection() as connection:
            row = connection.execute(
                "SELECT decision FROM admission WHERE (component, version, digest, policy) = (?, ?, ?, ?)",
                (component, version, digest, policy),
            ).fetchone()
        return Admission.model_validate_json(row[0]) if row else None

    def decide(self, admission: Admission, token: int) -> None:
        """Remember a decision; a later one on the same takes its place: a failed canary makes it a refusal.

        BusyError if the lease is no longer that of `token`.
        """
        key = (admission.component, admission.version, admission.digest, admission.policy)
        with self._connection() as connection:
            done = connection.execute(
                "INSERT OR REPLACE INTO admission SELECT ?, ?, ?, ?, ? WHERE (SELECT token FROM lease) = ?",
                (*key, admission.model_dump_json(), token),
            )
            if done.rowcount != 1:
                raise _lost(self.path)

    def forget_refusal(self, component: str, version: str, digest: str) -> None:
        """Let somebody who asks for this archive again have another look at it: its refusals are forgotten."""
        with self._connection() as connection:
            found = connection.execute(
                "SELECT policy, decision FROM admission WHERE (component, version, digest) = (?, ?, ?)",
                (component, version, digest),
            ).fetchall()
            refused = [policy for policy, text in found if not Admission.model_validate_json(text).admitted]
            connection.executemany(
                "DELETE FROM admission WHERE (component, version, digest, policy) = (?, ?, ?, ?)",
                [(component, version, digest, policy) for policy in refused],
            )

    @contextmanager
    def lease(self, patience_s: float) -> Iterator[int]:
        """Hold the lease and give its fencing token, higher than any before; it is renewed while the block runs.

        Raises BusyError when somebody else keeps it longer than `patience_s`. A holder that died, or that stood still
        for half a minute, loses it.
        """
        token = self._acquire(patience_s)
        done = threading.Event()
        keeper = threading.Thread(target=self._renew, args=(token, done), daemon=True)
        keeper.start()
        try:
            yield token
        finally:
            done.set()
            keeper.join()
            with self._connection() as connection:
                connection.execute("UPDATE lease SET pid = NULL, expires = 0 WHERE token = ?", (token,))

    def _acquire(self, patience_s: float) -> int:
        end = time.monotonic() + patience_s
        while True:
            if (token := self._try_to_acquire()) is not None:
                return token
            if time.monotonic() > end:
                raise BusyError(
                    f"another process has held the lease in {self.path} for {patience_s:.0f} s",
                    "one converge at a time",
                    "make status",
                )
            time.sleep(0.1)

    def _try_to_acquire(self) -> int | None:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            token, pid, started, expires = connection.execute(
                "SELECT token, pid, started, expires FROM lease"
            ).fetchone()
            if expires > time.time() and _alive(pid, started):
                return None
            mine = (token + 1, os.getpid(), _started(os.getpid()), time.time() + _LEASE_S)
            connection.execute("UPDATE lease SET token = ?, pid = ?, started = ?, expires = ?", mine)
            return int(token) + 1

    def _renew(self, token: int, done: threading.Event) -> None:
        while not done.wait(_LEASE_S / 4):
            with self._connection() as connection:
                connection.execute("UPDATE lease SET expires = ? WHERE token = ?", (time.time() + _LEASE_S, token))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One transaction; what it wrote is on the disk when this returns."""
        with closing(sqlite3.connect(self.path, timeout=20)) as connection:
            connection.execute("PRAGMA synchronous=full")
            with connection:
                yield connection


def store(perimeter: str) -> Store:
    """The memory of the perimeter with this name."""
    return Store(settings().state / "perimeters" / perimeter / "control.db")


def with_served(state: State, wanted: WantedVersion, now: float) -> State:
    """The state once `wanted` serves: what was live goes onto what served before, unless this is the way back to it."""
    served = state.served
    back = next((i for i, one in enumerate(served) if _same(one.wanted, wanted)), None)
    if back is not None:
        served = served[:back]
    elif state.live and not _same(state.live, wanted):
        served = (*served, Served(wanted=state.live, since=state.live_since))[-settings().retention.served :]
    rested = state.rollout.passed if state.rollout else ""
    update = {"live": wanted, "live_since": now, "served": served, "rollout": None, "rested": rested}
    return state.model_copy(update=update)


def _same(one: WantedVersion, other: WantedVersion) -> bool:
    return (one.version, one.digest) == (other.version, other.digest)


def _lost(path: Path) -> BusyError:
    return BusyError(f"another process has taken over the lease in {path}", "one converge at a time", "make status")


def _alive(pid: int | None, started: float | None) -> bool:
    """Whether the holder's process is there still, and not another one of its number."""
    return pid is not None and started is not None and _started(pid) == started


def _started(pid: int) -> float | None:
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None

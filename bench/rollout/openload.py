"""An open load: requests set out when the clock says so, whether or not those before them are answered.

Callers out there do not wait for each other, so a server that stalls for a second owes an answer to all who came in
that second. Latency is counted from the moment at which a request was due, not from when a busy client came to send it.
"""

import http.client
import multiprocessing
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

from redeploy.clients import ask

_THREADS = 24
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Answered:
    """One request: when it was due (seconds of the monotonic clock), its latency in seconds, and why it failed."""

    due: float
    latency_s: float
    reason: str


class OpenLoad:
    """`rate` requests a second on average, at the random moments of a Poisson process, from `processes` processes."""

    def __init__(self, url: str, body: bytes, rate: float, processes: int = 2) -> None:
        context = multiprocessing.get_context("fork")
        self._stop: Event = context.Event()
        self._found: Queue[list[Answered]] = context.Queue()
        self._children = [
            context.Process(
                target=_process, args=(url, body, rate / processes, seed, self._stop, self._found), daemon=True
            )
            for seed in range(processes)
        ]
        for child in self._children:
            child.start()

    def stop(self) -> list[Answered]:
        """Let every request that set out be answered; all of them, the earliest first."""
        self._stop.set()
        found = [one for _ in self._children for one in self._found.get(timeout=_TIMEOUT_S + 30)]
        for child in self._children:
            child.join()
        return sorted(found, key=lambda one: one.due)


def p99_ms(answers: list[Answered]) -> float:
    """The 99th percentile of the latency, in milliseconds. There have to be answers."""
    ordered = sorted(one.latency_s for one in answers)
    return 1000 * ordered[len(ordered) * 99 // 100]


def _process(  # noqa: PLR0917 - what a process is given
    url: str, body: bytes, rate: float, seed: int, stop: Event, found: "Queue[list[Answered]]"
) -> None:
    chance = random.Random(seed)
    dues = accumulate(iter(lambda: chance.expovariate(rate), None), initial=time.monotonic())
    lock, answers = threading.Lock(), []

    def loop() -> None:
        where = urlsplit(url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S)
        while not stop.is_set():
            with lock:
                due = next(dues)
            time.sleep(max(0.0, due - time.monotonic()))
            reason = ask(connection, where.path, body, Counter())
            if reason:
                connection.close()
            answers.append(Answered(due, time.monotonic() - due, reason))
        connection.close()

    threads = [threading.Thread(target=loop) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.put(answers)

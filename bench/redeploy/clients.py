"""Looping clients: each sends its next request as soon as the last one is answered, over the connection that it keeps,
or, where that is asked for, over a fresh one.

They run in processes of their own, a few threads in each, so that the clients are not what limits the rate.
A request counts as failed when its connection breaks, its status is not 200, or its answer is not a prediction.
"""

import http.client
import json
import multiprocessing
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from urllib.parse import urlsplit

_TIMEOUT_S = 60
_FAILURES_KEPT = 5


@dataclass
class Seen:
    """What clients saw: requests, why some failed, the slowest answers, and how many each version gave."""

    requests: int = 0
    failures: int = 0
    worst_s: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)

    def add(self, other: "Seen") -> None:
        """Take in what another client saw."""
        self.requests += other.requests
        self.failures += other.failures
        self.worst_s = max(self.worst_s, other.worst_s)
        self.versions += other.versions
        self.reasons = (self.reasons + other.reasons)[:_FAILURES_KEPT]


class Clients:
    """So many clients, started at once and stopped together; every `fresh`-th one never keeps a connection."""

    def __init__(self, url: str, body: bytes, count: int, processes: int = 4, fresh: int = 0) -> None:
        context = multiprocessing.get_context("fork")
        self._stop: Event = context.Event()
        self._found: Queue[Seen] = context.Queue()
        shares = [len(range(index, count, processes)) for index in range(min(processes, count))]
        self._children = [
            context.Process(target=_process, args=(url, body, share, fresh, self._stop, self._found), daemon=True)
            for share in shares
        ]
        for child in self._children:
            child.start()

    def stop(self) -> Seen:
        """Let every client finish its request, and add up what they saw."""
        self._stop.set()
        total = Seen()
        for _ in self._children:
            total.add(self._found.get(timeout=_TIMEOUT_S + 30))
        for child in self._children:
            child.join()
        return total


def _process(  # noqa: PLR0917 - what a process is given
    url: str, body: bytes, count: int, fresh: int, stop: Event, found: "Queue[Seen]"
) -> None:
    seen = [Seen() for _ in range(count)]
    threads = [
        threading.Thread(target=_loop, args=(url, body, stop, one, bool(fresh) and number % fresh == 0))
        for number, one in enumerate(seen)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Seen()
    for one in seen:
        total.add(one)
    found.put(total)


def _loop(url: str, body: bytes, stop: Event, seen: Seen, fresh: bool) -> None:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S)
    while not stop.is_set():
        began = time.perf_counter()
        reason = ask(connection, where.path, body, seen.versions)
        seen.requests += 1
        seen.worst_s = max(seen.worst_s, time.perf_counter() - began)
        if reason:
            seen.failures += 1
            seen.reasons.append(reason)
        if reason or fresh:
            connection.close()
    connection.close()


def ask(connection: http.client.HTTPConnection, path: str, body: bytes, versions: Counter[str]) -> str:
    """One request; why it failed, or nothing. The version that answered is counted."""
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"{time.strftime('%T')} {type(error).__name__}: {error}"
    if answer.status != 200 or len(json.loads(content)["predictions"]) != 1:
        return f"{time.strftime('%T')} {answer.status}: {content[:200]!r}"
    versions[answer.headers["x-model-version"]] += 1
    return ""

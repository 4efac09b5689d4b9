"""Production's own converger: a small service that polls the registry, and that a webhook or a person can wake.

What wakes it is never believed: it looks at the registry and the nodes, as it does at every poll. It alone admits
versions into its perimeter and moves what serves there.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torchrelay.config import Perimeter, Site, settings
from torchrelay.delivery.admission import Gatekeeper
from torchrelay.delivery.converge import Converger, Evidence, Outcome
from torchrelay.delivery.store import State, Store, store
from torchrelay.errors import TorchrelayError
from torchrelay.tracking import Tracking
from torchrelay.webhooks import Keeper, webhook_place

# Each look costs processor time, which what serves beside it has to do without. Callers that get a candidate's answers
# are worth more of it while nothing is known of them: a stage's first looks come sooner. Each look is remembered for as
# long as the stage lasts, and judged anew with the next one, so in long stages they come more rarely.
_SOON_S, _SOONEST_S, _RARELY_S = 1.0, 0.3, 30.0
_LOOKS = 600
_SAY_AGAIN_S = 300.0
_LEASE_PATIENCE_S = 5.0
_WATCH_S = 1.0

log = logging.getLogger(__name__)


class Orchestrator:
    """The loop of one perimeter. `wake` may be called from any thread, at any time, as often as one likes."""

    def __init__(self, site: Site, name: str, gatekeeper: Gatekeeper, evidence: Evidence) -> None:
        self.site = site
        self.name = name
        self.gatekeeper = gatekeeper
        self.evidence = evidence
        self.memory: Store = store(name)
        self._woken = threading.Event()
        self._ended = threading.Event()

    @property
    def perimeter(self) -> Perimeter:
        """The perimeter, as the site describes it."""
        return self.site.perimeters[self.name]

    def wake(self, reason: str) -> None:
        """Look again at once."""
        log.info("woken: %s", reason)
        self._woken.set()

    def stop(self) -> None:
        """End the loop after the present step."""
        self._ended.set()
        self._woken.set()

    def run(self) -> None:
        """Look, act, and wait: until `stop`. Meanwhile the webhook that wakes it is kept registered."""
        why = "the first look"
        with self._webhook(), self._watch(), _quiet():
            while not self._ended.is_set():
                pause = self._look(why)
                woken = self._woken.wait(pause)
                self._woken.clear()
                why = "woken" if woken else "poll"

    @contextmanager
    def _webhook(self) -> Iterator[None]:
        keeper = Keeper(webhook_place(self.site, self.name), self.perimeter.poll_s, self.wake)
        keeper.start()
        try:
            yield
        finally:
            keeper.stop()

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Look when the tracking server is back: it forgets the events that it has not sent when it goes down."""
        tracking, ended = Tracking(self.site.tracking.url), threading.Event()

        def watch() -> None:
            answered = True
            while not ended.wait(_WATCH_S):
                answers = tracking.healthy()
                if answers and not answered:
                    self.wake("the tracking server is back")
                answered = answers

        watcher = threading.Thread(target=watch, name="watch", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _look(self, why: str) -> float:
        """One look with all that follows from it; the seconds until the next one."""
        try:
            while not self._ended.is_set():
                outcome = self._tick(why)
                for error in outcome.errors:
                    log.warning("%s", _line(error))
                if not outcome.soon:
                    return min(5.0, self.perimeter.poll_s) if outcome.errors else float(self.perimeter.poll_s)
                busy = (self.memory.state(name) for name, rest in outcome.rests.items() if rest.soon)
                self._woken.wait(min(map(pause, busy), default=_SOON_S))
                self._woken.clear()
        except TorchrelayError as error:
            log.warning("%s", _line(error))
        return min(5.0, self.perimeter.poll_s)

    def _tick(self, why: str) -> Outcome:
        """All that can be done now. Between two looks somebody else may have the lease: to rotate keys, or for gc."""
        settings.cache_clear()  # the policy may have changed since
        with self.memory.lease(_LEASE_PATIENCE_S) as token:
            converger = Converger(
                self.site,
                self.name,
                self.memory,
                token,
                why=f"@{self.perimeter.alias} ({why})",
                gatekeeper=self.gatekeeper,
                evidence=self.evidence,
            )
            return converger.tick()


def pause(state: State) -> float:
    """Seconds until the next look at a roll-out: by how long its stage has lasted, and who gets its answers."""
    rollout = state.rollout
    if rollout is None or not 0 <= rollout.stage < len(rollout.weights):
        return _SOON_S
    lasted = time.time() - rollout.since
    first = _SOONEST_S if rollout.weights[rollout.stage] else _SOON_S
    return min(_RARELY_S, max(first, min(_SOON_S, lasted / 2), lasted / _LOOKS))


def _line(error: TorchrelayError) -> str:
    """An error in one line of the log."""
    return f"{error.found} (next: {error.next_command})"


class _News(logging.Filter):
    """Lets through what was not said in the last five minutes: a server that is down is news once, not every poll."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is news; what is no warning always is."""
        now, text = time.monotonic(), record.getMessage()
        self._said = {one: at for one, at in self._said.items() if at > now - _SAY_AGAIN_S}
        if record.levelno < logging.WARNING:
            return True
        return self._said.setdefault(text, now) == now


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings come once, and urllib3 does not say that it tries again: whoever asked says what came of it."""
    retries = logging.getLogger("urllib3.connectionpool")
    level, filters = retries.level, [(handler, _News()) for handler in logging.getLogger().handlers]
    retries.setLevel(logging.ERROR)
    for handler, news in filters:
        handler.addFilter(news)
    try:
        yield
    finally:
        retries.setLevel(level)
        for handler, news in filters:
            handler.removeFilter(news)


def on_signal(orchestrator: Orchestrator) -> None:
    """SIGTERM and SIGINT end the loop in good order."""

    def end(_number: int, _frame: FrameType | None) -> None:
        orchestrator.stop()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)

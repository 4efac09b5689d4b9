"""Keeps a perimeter's webhook registered for as long as its orchestrator runs.

The tracking server may come up minutes later than the orchestrator, its database may be restored from yesterday, and
people may delete or disable what they find in MLflow's page: so this looks again and again, in a thread of its own,
and never keeps the orchestrator from its work.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from torchrelay.config import Site, settings
from torchrelay.errors import BusyError, ConfigError, TorchrelayError
from torchrelay.rest import Rest
from torchrelay.webhooks.registration import ensure_webhook, rotate_webhook
from torchrelay.webhooks.signing import ensure_secret

_SOON_S = 0.5
_LOCK_S = 60
_LOCK = "webhook.lock"

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A webhook's two ends, and where its secret lies."""

    tracking_url: str
    target_url: str
    folder: Path
    name: str


def webhook_place(site: Site, perimeter: str) -> Place:
    """The webhook that wakes this perimeter's orchestrator. Raises ConfigError where there is none."""
    url = site.perimeters[perimeter].orchestrator
    if url is None:
        raise ConfigError(f"no orchestrator converges {perimeter}", "a perimeter with an orchestrator", "make status")
    return Place(site.tracking.url, f"{url}/webhook", settings().keys / perimeter, f"torchrelay-{perimeter}")


def keep_webhook(place: Place) -> Literal["created", "updated", "present"]:
    """Register the webhook with the secret in its folder, which is made if there is none; one process at a time.

    Raises what `ensure_webhook` and `ensure_secret` raise, and BusyError while another process holds the lock.
    """
    with _alone(place.folder):
        return ensure_webhook(place.tracking_url, place.target_url, ensure_secret(place.folder), place.name)


def change_secret(place: Place) -> None:
    """Give the webhook a new secret, one process at a time; the one before it stays good for a while."""
    with _alone(place.folder):
        rotate_webhook(*place)


class Keeper(threading.Thread):
    """Sees to it every `every_s` seconds that the webhook is registered, and twice a second until it first is.

    `changed` is called, with a reason for the log, each time that something had to be done: events may have been lost
    until then.
    """

    def __init__(self, place: Place, every_s: float, changed: Callable[[str], None]) -> None:
        super().__init__(name="webhook-keeper", daemon=True)
        self._place = place
        self._server = Rest(place.tracking_url)
        self._every_s = every_s
        self._changed = changed
        self._ended = threading.Event()
        self._said = ""

    def run(self) -> None:
        """Look until stopped."""
        while not self._ended.is_set():
            kept = self._server.healthy() and self._keep()
            self._ended.wait(self._every_s if kept else min(_SOON_S, self._every_s))

    def stop(self) -> None:
        """Look no more; what is under way may go on for seconds, and keeps nobody from ending."""
        self._ended.set()

    def _keep(self) -> bool:
        """Whether the webhook is registered now. The same trouble is said once."""
        try:
            done = keep_webhook(self._place)
        except TorchrelayError as error:
            self._complain(f"{error.found} (next: {error.next_command})")
            return False
        except OSError as error:
            self._complain(str(error))
            return False
        self._said = ""
        if done != "present":
            log.info("webhook %s %s", self._place.name, done)
            self._changed(f"webhook {done}")
        return True

    def _complain(self, found: str) -> None:
        if found != self._said:
            log.warning("no webhook will wake this orchestrator, it polls: %s", found)
        self._said = found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=_LOCK_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(
            f"another process has held {lock.lock_file} for {_LOCK_S} s", "one change at a time", "make doctor"
        ) from error
    try:
        yield
    finally:
        lock.release()

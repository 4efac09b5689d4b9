"""A perimeter gets a new signing key while it serves.

The new key is trusted before anything is signed by it, and the old one until nothing that this perimeter may yet serve
is signed by it: what is live, what it can go back to, and what it has admitted. The lease is held from the change of
keys until all that is signed anew: whatever is admitted after that is signed by the new key anyway. Cut short anywhere,
the perimeter serves as before, and the same command goes on where this one ended.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock, Timeout

from torchrelay import archive
from torchrelay.archive import rotation
from torchrelay.archive.keys import PRIVATE, PUBLIC
from torchrelay.archive.mar import SIGNATURE
from torchrelay.config import Perimeter, Site, settings
from torchrelay.console import say
from torchrelay.delivery import reach
from torchrelay.delivery.admission import Gatekeeper
from torchrelay.delivery.store import State, Store, store
from torchrelay.errors import ArchiveError, BusyError, TorchrelayError, TrackingError
from torchrelay.handover import Manifest, WantedVersion
from torchrelay.lineage import TAG_DIGEST
from torchrelay.rest import Rest
from torchrelay.tracking import Tracking

_PATIENCE_S = 120.0


def rotate_signing_key(here: Site, name: str, gatekeeper: Gatekeeper, publish: Callable[[], object]) -> list[str]:
    """Replace the signing key of perimeter `name`; the versions that could not be signed anew, for people.

    `publish` brings the perimeter's signing.pub to its nodes, and returns once they go by it.
    Those can be served here no more: they are none that serve or are kept loaded, for which this raises instead, with
    both keys trusted still. Raises BusyError while a roll-out is under way or another rotation runs, TrackingError
    without the tracking server.
    """
    tracking, folder = Tracking(here.tracking.url), settings().keys / name
    if not tracking.healthy():
        raise TrackingError(
            f"no answer from {tracking.url}", "the tracking server, which holds the archives", "make up"
        )
    with _alone(folder):
        _trust_both(folder, publish)
        with store(name).lease(_PATIENCE_S):
            rotation.switch(folder)
            say("  the new key signs, both are trusted")
            lost = _sign_all_anew(here, name, gatekeeper)
        rotation.retire(folder)
        publish()
        say("  the old key is trusted no more")
    return lost


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One rotation at a time: a second one would take the keys of the first for its own."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(folder / "signing.lock", timeout=0, mode=0o600):
            yield
    except Timeout as error:
        raise BusyError("another rotation of this key runs", "one at a time", "wait for it") from error


def _trust_both(folder: Path, publish: Callable[[], object]) -> None:
    if rotation.stage(folder) == "switched":
        say("  going on with a rotation that was cut short")
    else:
        rotation.prepare(folder)
    publish()


def _sign_all_anew(here: Site, name: str, gatekeeper: Gatekeeper) -> list[str]:
    memory, perimeter = store(name), here.perimeters[name]
    states = list(memory.states().values())
    needed = {wanted.url: wanted for state in states for wanted in _kept(state, perimeter)}
    every = {wanted.url: wanted for wanted in (*_served(states), *_admitted(here, memory, gatekeeper))}
    lost = []
    for url, wanted in (every | needed).items():
        what = f"{wanted.component} version {wanted.version}"
        try:
            _sign_anew(here, name, wanted)
            say(f"  {what} is signed by the new key")
        except TorchrelayError as error:
            if url in needed:
                raise
            lost.append(f"{what}: {error.found}")
    return lost


def _kept(state: State, perimeter: Perimeter) -> Iterator[WantedVersion]:
    """What serves, is on its way, or is kept loaded."""
    warm = [one.wanted for one in state.served[len(state.served) - perimeter.warm :]]
    yield from (one for one in (state.live, state.rollout.wanted if state.rollout else None) if one)
    yield from (*warm, *(wanted for held in state.hold.values() for wanted in held))


def _served(states: Iterable[State]) -> Iterator[WantedVersion]:
    """What served here before: a rollback may ask for it."""
    return (one.wanted for state in states for one in state.served)


def _admitted(here: Site, memory: Store, gatekeeper: Gatekeeper) -> Iterator[WantedVersion]:
    """What was admitted under the present policy: it comes in without another look when it is asked for again."""
    tracking = Tracking(here.tracking.url)
    for model in tracking.models():
        for version in tracking.versions(model):
            digest = version.tags.get(TAG_DIGEST, "")
            found = memory.admission(model, version.version, digest, gatekeeper.policy(version))
            if found and found.admitted and found.wanted:
                yield found.wanted


def _sign_anew(here: Site, name: str, wanted: WantedVersion) -> None:
    """Replace the signature of one archive, where nodes fetch it and where they have it; no other byte changes."""
    keys = settings().keys / name
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / wanted.digest
        archive.fetch(wanted.url, folder)
        _insist_it_is(archive.verify(folder, keys / PUBLIC, wanted.digest), wanted)
        signature = archive.sign(folder, keys / PRIVATE).read_bytes()
    _upload(here, wanted.url, signature)
    for node in here.perimeters[name].nodes:
        reach.calls(node).resign(wanted.digest, signature)


def _insist_it_is(manifest: Manifest, wanted: WantedVersion) -> None:
    found = (manifest.component, manifest.version, manifest.environment)
    expected = (wanted.component, wanted.version, wanted.environment)
    if found != expected:
        raise ArchiveError(f"{wanted.url} is {' '.join(found)}", " ".join(expected), "make history")


def _upload(here: Site, url: str, signature: bytes) -> None:
    rest = Rest(here.tracking.url)
    path = unquote(url.removeprefix(rest.artifact("")))
    rest.put_file(f"{path}/{SIGNATURE}", signature, len(signature))

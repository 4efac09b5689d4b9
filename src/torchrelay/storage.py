"""Named files in a folder or in a bucket of Google Cloud Storage, by the same few calls.

A bucket's credentials are Google's application-default ones, found by Google's own library; where STORAGE_EMULATOR_HOST
is set, that library goes to the emulator instead.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torchrelay.config import write_file
from torchrelay.errors import StorageError

if TYPE_CHECKING:
    from google.cloud.storage import Bucket

SCHEME = "gs://"
EMULATOR = "STORAGE_EMULATOR_HOST"
_TIMEOUT_S = 20.0
# What Google's libraries read: where the emulator is, where credentials are, and which project pays.
_GOOGLES = (EMULATOR, "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CONFIG")
# gcsfs asks by gRPC what kind of bucket it has, and waits a minute where nobody speaks it.
_GCSFS = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


class Store(Protocol):
    """A place for named files. A name is a relative path with slashes; every method may raise StorageError."""

    def names(self, under: str = "") -> list[str]:
        """Names of the files below `under`, sorted; none where nothing was ever written."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Make or replace a file, whole or not at all."""
        ...

    def read(self, name: str) -> bytes:
        """A file's content."""
        ...


def is_bucket(place: str) -> bool:
    """Whether this is a gs:// URL and no folder."""
    return place.startswith(SCHEME)


def open_store(place: str) -> Store:
    """The store at this gs:// URL or in this folder. Nothing is asked of it yet."""
    return BucketStore(place) if is_bucket(place) else FolderStore(Path(place))


def bucket_parts(url: str) -> tuple[str, str]:
    """Name of the bucket, and the prefix without slashes at its ends."""
    name, _, prefix = url.removeprefix(SCHEME).partition("/")
    return name, prefix.strip("/")


def google_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a program that uses the bucket must find in its environment, as it stands in ours."""
    return {**{name: environment[name] for name in _GOOGLES if environment.get(name)}, **_GCSFS}


class FolderStore:
    """Files below a folder of this machine, which their owner alone may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self, under: str = "") -> list[str]:
        """Names of the files below `under`, sorted; those that are being written are left out."""
        start = self.folder / under
        found = (path for path in start.rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def write(self, name: str, content: bytes) -> None:
        """Write aside, fsync, rename."""
        with _told(str(self.folder), "a folder that can be written"):
            (self.folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self.folder / name, content, mode=0o600)

    def read(self, name: str) -> bytes:
        """A file's content."""
        with _told(str(self.folder), f"{name} in it"):
            return (self.folder / name).read_bytes()


class BucketStore:
    """Objects below a prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._name, self._prefix = bucket_parts(url)

    def names(self, under: str = "") -> list[str]:
        """Names of the objects below `under`, sorted."""
        start = f"{self._prefix}/{under}".strip("/")
        with _google_told(self.url, "a bucket that these credentials may list"):
            found = self._bucket().list_blobs(prefix=f"{start}/" if start else None, timeout=_TIMEOUT_S, retry=None)
            return sorted(blob.name.removeprefix(f"{self._prefix}/") for blob in found)

    def write(self, name: str, content: bytes) -> None:
        """An object appears only when all of it has arrived."""
        with _google_told(self.url, "a bucket that these credentials may write to"):
            self._blob(name).upload_from_string(content, "application/octet-stream", timeout=_TIMEOUT_S)

    def read(self, name: str) -> bytes:
        """An object's content."""
        with _google_told(self.url, f"{name} in it"):
            return bytes(self._blob(name).download_as_bytes(timeout=_TIMEOUT_S))

    def answers(self) -> None:
        """StorageError where the bucket cannot be listed now, for whatever reason."""
        with _google_told(self.url, "a bucket that these credentials may list"):
            next(iter(self._bucket().list_blobs(max_results=1, timeout=_TIMEOUT_S, retry=None)), None)

    def _bucket(self) -> "Bucket":
        from google.cloud.storage import Client

        return Client().bucket(self._name)

    def _blob(self, name: str) -> Any:
        return self._bucket().blob(f"{self._prefix}/{name}".strip("/"))


@contextmanager
def _told(place: str, expected: str) -> Iterator[None]:
    """What the system says went wrong, as a StorageError."""
    try:
        yield
    except OSError as error:
        raise _failure(place, expected, str(error)) from error


@contextmanager
def _google_told(place: str, expected: str) -> Iterator[None]:
    """What Google's library says went wrong, or the connection below it, as a StorageError."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError, OSError) as error:  # requests' errors are OSErrors
        raise _failure(place, expected, str(error)) from error


def _failure(place: str, expected: str, said: str) -> StorageError:
    said = " ".join(said.split())[:300]
    return StorageError(f"{place}: {said}", expected, _remedy(place, said))


def _remedy(place: str, said: str) -> str:
    if not is_bucket(place):
        return f"make {place} readable and writable, then the same command again"
    if emulator := os.environ.get(EMULATOR):
        return f"start the emulator at {emulator}, or unset {EMULATOR}"
    name = bucket_parts(place)[0]
    if "404" in said or "does not exist" in said:
        return f"gcloud storage buckets create {SCHEME}{name} --uniform-bucket-level-access, or correct `bucket`"
    if "403" in said:
        return f"give the account roles/storage.objectUser on {SCHEME}{name}"
    return "gcloud auth application-default login (or GOOGLE_APPLICATION_CREDENTIALS=<key file>), then make doctor"

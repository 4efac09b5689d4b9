"""Brings an archive's three files to this machine by plain HTTP. What arrives is still to be verified."""

from pathlib import Path
from typing import TYPE_CHECKING

from torchrelay.archive.folders import replaced
from torchrelay.archive.mar import FILES, MAR, MAX_BYTES
from torchrelay.errors import ArchiveError, TrackingError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_SMALL = 2**20
_CHUNK = 2**20


def fetch(url: str, target: Path) -> None:
    """Download `url`/model.mar, manifest.json and model.sig into `target`, which appears whole or not at all.

    Raises TrackingError when the server does not hand them over (the AnsweredError NOT_THERE when it has one of them no
    more), ArchiveError when one is too large.
    """
    import urllib3

    retries = urllib3.Retry(3, backoff_factor=0.2, status_forcelist=(502, 503, 504), raise_on_status=False)
    timeout = urllib3.Timeout(connect=5, read=30)
    with urllib3.PoolManager(retries=retries, timeout=timeout) as pool, replaced(target) as folder:
        for name in FILES:
            _download(pool, f"{url.rstrip('/')}/{name}", folder / name, MAX_BYTES if name == MAR else _SMALL)


def _download(pool: "PoolManager", url: str, path: Path, limit: int) -> None:
    from urllib3.exceptions import HTTPError

    try:
        response = pool.request("GET", url, preload_content=False)
        if response.status != 200:
            response.close()
            raise _refused(url, response.status)
        _save(response, path, limit, url)
        response.release_conn()
    except HTTPError as error:
        raise TrackingError(f"GET {url} failed: {error}", "a server that answers", "make up") from error


def _refused(url: str, status: int) -> TrackingError:
    """What such an answer is to callers: that a file is gone is a finding for some of them, not a fault."""
    from torchrelay.rest import NOT_THERE, AnsweredError

    if status == 404:
        return AnsweredError(f"{url} is gone from the tracking server", "the file", "make status", NOT_THERE)
    return TrackingError(f"GET {url} was answered with {status}", "200 and the file", "make status")


def _save(response: "BaseHTTPResponse", path: Path, limit: int, url: str) -> None:
    """Raw bytes, never decoded, so that a small answer cannot grow; urllib3 notices a body that was cut short."""
    with path.open("wb") as file:
        for chunk in response.stream(_CHUNK, decode_content=False):
            if file.tell() + len(chunk) > limit:
                response.close()
                raise ArchiveError(f"{url} is larger than {limit} bytes", f"at most {limit} bytes", "make status")
            file.write(chunk)

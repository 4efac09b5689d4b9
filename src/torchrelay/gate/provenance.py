"""Is the code in an archive code that was committed? Bytes are compared; nothing of either side is executed."""

import os
import re
import subprocess
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from torchrelay.archive import mar as mars
from torchrelay.errors import ConfigError

HANDLER = "src/torchrelay/serving/handler.py"
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FILE_MODES = ("100644", "100755")
_ELSEWHERE = re.compile(r"GIT_(DIR|COMMON|INDEX|WORK|OBJECT|ALT|REPLACE|GRAFT|SHALLOW|NAMESPACE)")


def code_faults(mar: Path, checkout: Path, component: str, commit: str) -> list[str]:
    """Why the code in `mar` is not that of `components/<component>/` in `commit`; empty if it is.

    Every module must be byte for byte the committed file. The base handler may be that of this installation instead of
    that of the commit. `checkout` is the root of a checkout whose HEAD must contain the commit. What the archive holds
    beside modules is for `archive.verify` to check. Raises ArchiveError for a damaged archive, ConfigError where git
    or the checkout does not work.
    """
    mars.check(mar)
    again = f"commit the files and bring them into this checkout, then make deploy-dev COMPONENT={component}"
    if not _COMMIT.fullmatch(commit):
        return [f"the version was trained from no commit (it says {commit[:80]!r}): {again}"]
    if fault := _unreachable(checkout, commit):
        return [f"{fault}: {again}"]
    return [f"{fault}: {again}" for fault in _unlike(mar, checkout, component, commit)]


def head(checkout: Path) -> str:
    """The commit that the checkout is at; empty where there is none."""
    return _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", may_fail=True).decode().strip()


def committed(checkout: Path, component: str) -> str:
    """git's name of the component's folder as HEAD has it; empty where HEAD has none."""
    name = f"HEAD:components/{component}"
    return _git(checkout, "rev-parse", "--verify", "--quiet", name, may_fail=True).decode().strip()


def _unreachable(checkout: Path, commit: str) -> str:
    """Why HEAD does not contain the commit; empty if it does."""
    if _git(checkout, "cat-file", "-t", commit, may_fail=True).strip() != b"commit":
        return f"commit {commit[:12]} is not in this checkout"
    bases = _git(checkout, "merge-base", commit, "HEAD", may_fail=True).decode().split()
    return "" if bases == [commit] else f"commit {commit[:12]} is not part of what HEAD holds"


def _unlike(mar: Path, checkout: Path, component: str, commit: str) -> Iterator[str]:
    committed = _blobs(checkout, commit, f"components/{component}/")
    with zipfile.ZipFile(mar) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
            content = archive.read(name)
            if name == mars.BASE_HANDLER:
                if content not in _handlers(checkout, commit):
                    yield f"{name} in the archive is neither this installation's nor that of commit {commit[:12]}"
            elif name not in committed:
                yield f"{name} in the archive is not among components/{component}/ of commit {commit[:12]}"
            elif content != _git(checkout, "cat-file", "blob", committed[name]):
                yield f"{name} in the archive differs from components/{component}/{name} of commit {commit[:12]}"


def _handlers(checkout: Path, commit: str) -> list[bytes]:
    """The base handlers that may be in an archive."""
    installed = files("torchrelay.serving").joinpath("handler.py").read_bytes()
    blobs = _blobs(checkout, commit, HANDLER)
    return [installed, *(_git(checkout, "cat-file", "blob", blob) for blob in blobs.values())]


def _blobs(checkout: Path, commit: str, path: str) -> dict[str, str]:
    """Name to blob of the regular files at `path`: one file, or all of a folder if it ends in a slash."""
    listed = _git(checkout, "ls-tree", "-z", commit, "--", path).decode(errors="surrogateescape")
    found = {}
    for line in filter(None, listed.split("\0")):
        details, name = line.split("\t", 1)
        mode, kind, blob = details.split()
        if kind == "blob" and mode in _FILE_MODES:
            found[name.rpartition("/")[2]] = blob
    return found


def _git(checkout: Path, *words: str, may_fail: bool = False) -> bytes:
    """What git prints of `checkout`, whatever repository a hook around us names; nothing replaced, nothing fetched."""
    clean = {key: value for key, value in os.environ.items() if not _ELSEWHERE.match(key)}
    settings = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1"}
    command = ["git", "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(
            command, cwd=checkout, env={**clean, **settings}, capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _broken(checkout, str(error)) from error
    if done.returncode and (not may_fail or b"not a git repository" in done.stderr or b"dubious" in done.stderr):
        raise _broken(checkout, done.stderr.decode(errors="replace"))
    return b"" if done.returncode else done.stdout


def _broken(checkout: Path, message: str) -> ConfigError:
    return ConfigError(
        f"git cannot read {checkout}: {message.strip()[:500]}",
        "a checkout that git can read, to compare archives with",
        f"git -C {checkout} status",
    )

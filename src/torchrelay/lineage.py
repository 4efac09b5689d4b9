"""What a model version came from, as tags on the version: code, data, environment, run, verdict, predecessor.

The names of all tags that this project sets on model versions stand here, since later legs and the converger
read what earlier ones wrote.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torchrelay.config import Frozen
from torchrelay.errors import ConfigError
from torchrelay.handover import DataVersion, Environment, TrainedRun, Verdict
from torchrelay.tracking import KEY, PREFIX, tag_value

TAG_COMPONENT = f"{PREFIX}component"
TAG_RUN = f"{PREFIX}run"
TAG_PARAMETERS = f"{PREFIX}parameters"
TAG_COMMIT = f"{PREFIX}git.commit"
TAG_DIRTY = f"{PREFIX}git.dirty"
TAG_TREE = f"{PREFIX}git.tree"
TAG_DATA = f"{PREFIX}data.hash"
TAG_ENVIRONMENT = f"{PREFIX}environment"
TAG_LOCK = f"{PREFIX}environment.lock"
TAG_VERDICT = f"{PREFIX}verdict"
TAG_REASONS = f"{PREFIX}verdict.reasons"
TAG_SCORE = f"{PREFIX}verdict.score"
TAG_TEST_SET = f"{PREFIX}verdict.test_set"
TAG_PARENT_VERSION = f"{PREFIX}parent.version"
TAG_PARENT_RUN = f"{PREFIX}parent.run"
# Set when the archive is packed and proven.
TAG_DIGEST = f"{PREFIX}archive.digest"
TAG_ARCHIVE_URL = f"{PREFIX}archive.url"
TAG_PROOF = f"{PREFIX}archive.proof"
TAG_SERVING = f"{PREFIX}serving"

NONE = "none"
# What a changed policy may change on a version that is there; what it came from stays as it was.
_VERDICT_TAGS = frozenset({TAG_VERDICT, TAG_REASONS, TAG_SCORE, TAG_TEST_SET})


class GitState(Frozen):
    """The checkout at the time. `tree` is git's name of the very files that were there: commit them, and
    `git rev-parse HEAD^{tree}` gives the same."""

    commit: str
    dirty: bool
    tree: str


def tags(
    *,
    component: str,
    run: TrainedRun,
    data: DataVersion,
    environment: Environment,
    verdict: Verdict,
    git: GitState,
    parent_run: str | None = None,
) -> dict[str, str]:
    """Everything a model version must say of its origin when it is registered; a longer value is cut and says so.

    `git` is the checkout when training began, `parent_run` the run of the live version that the verdict compared with.
    """
    values = {
        KEY: f"{component}:{run.run_id}",
        TAG_COMPONENT: component,
        TAG_RUN: run.run_id,
        TAG_PARAMETERS: json.dumps(run.parameters, sort_keys=True, default=str),
        TAG_COMMIT: git.commit,
        TAG_DIRTY: str(git.dirty).lower(),
        TAG_TREE: git.tree,
        TAG_DATA: data.hash,
        TAG_ENVIRONMENT: environment.name,
        TAG_LOCK: environment.lock_sha256,
        TAG_VERDICT: verdict.verdict,
        TAG_REASONS: "; ".join(verdict.reasons),
        TAG_SCORE: f"{verdict.metric}={verdict.candidate}",
        TAG_TEST_SET: verdict.test_set,
        TAG_PARENT_VERSION: verdict.live_version or NONE,
        TAG_PARENT_RUN: parent_run or NONE,
    }
    return {name: tag_value(value) for name, value in values.items()}


def unsaid(tags: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """Of `tags`, what may be set on a version that has `present`: an origin is told once, a verdict may be another."""
    return {name: value for name, value in tags.items() if name in _VERDICT_TAGS or name not in present}


def git_state(folder: Path) -> GitState:
    """Commit and files of the checkout around `folder`; "none" where there is no repository, commit or git."""
    if not _in_repository(folder):
        return GitState(commit=NONE, dirty=False, tree=NONE)
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD", may_fail=True) or NONE
    dirty = bool(_git(folder, "status", "--porcelain"))
    tree = _tree_of_files(folder) if dirty or commit == NONE else _git(folder, "rev-parse", "HEAD^{tree}")
    return GitState(commit=commit, dirty=dirty, tree=tree)


def _in_repository(folder: Path) -> bool:
    try:
        done = _run(folder, ["rev-parse", "--is-inside-work-tree"])
    except FileNotFoundError:
        return False
    if done.returncode and "not a git repository" not in done.stderr:
        raise _broken(folder, done.stderr)
    return done.stdout.strip() == "true"


def _tree_of_files(folder: Path) -> str:
    """git's name of all files that it does not ignore, found in an index of its own: nothing is staged."""
    top = Path(_git(folder, "rev-parse", "--show-toplevel"))
    objects = _git(top, "rev-parse", "--path-format=absolute", "--git-path", "objects")
    with tempfile.TemporaryDirectory() as scratch:
        aside = {
            "GIT_INDEX_FILE": f"{scratch}/index",
            "GIT_OBJECT_DIRECTORY": scratch,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
        }
        _git(top, "add", "--all", ".", environment=aside)
        return _git(top, "write-tree", environment=aside)


def _git(folder: Path, *words: str, may_fail: bool = False, environment: dict[str, str] | None = None) -> str:
    done = _run(folder, list(words), environment)
    if done.returncode and not may_fail:
        raise _broken(folder, done.stderr)
    return done.stdout.strip()


def _run(folder: Path, words: list[str], extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run git on `folder`, whatever repository a surrounding git hook names in the environment."""
    clean = {
        key: value for key, value in os.environ.items() if not re.match(r"GIT_(DIR|COMMON|INDEX|WORK|OBJECT|ALT)", key)
    }
    environment = {**clean, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", **(extra or {})}
    command = ["git", *words]
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired as error:
        raise _broken(folder, str(error)) from error


def _broken(folder: Path, message: str) -> ConfigError:
    return ConfigError(
        f"git cannot read {folder}: {message.strip()[:500]}", "a checkout that git can read", f"git -C {folder} status"
    )

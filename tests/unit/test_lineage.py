import json
import os
import subprocess
from pathlib import Path

import pytest

from torchrelay import lineage
from torchrelay.errors import ConfigError
from torchrelay.handover import DataVersion, Environment, TrainedRun, Verdict
from torchrelay.lineage import GitState, git_state
from torchrelay.tracking import LONGEST_TAG, tag_value

STATE = GitState(commit="c" * 40, dirty=True, tree="t" * 40)


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / ".gitignore").write_text("state/\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout):
    assert git_state(checkout) == GitState(
        commit=git(checkout, "rev-parse", "HEAD"), dirty=False, tree=git(checkout, "rev-parse", "HEAD^{tree}")
    )


def test_a_dirty_tree_is_named_as_git_would_once_it_is_committed(checkout):
    (checkout / "a.py").write_text("a = 2\n")
    (checkout / "neu ö.py").write_text("b = 1\n")
    found = git_state(checkout)
    assert found.dirty
    assert found.commit == git(checkout, "rev-parse", "HEAD")
    assert git(checkout, "diff", "--cached", "--name-only") == ""
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", "two")
    assert found.tree == git(checkout, "rev-parse", "HEAD^{tree}")


def test_what_git_ignores_does_not_make_it_dirty(checkout):
    (checkout / "state").mkdir()
    (checkout / "state" / "x").write_text("x")
    assert not git_state(checkout).dirty


def test_a_folder_inside_the_checkout_means_the_whole_checkout(checkout):
    (checkout / "sub").mkdir()
    (checkout / "a.py").write_text("a = 3\n")
    assert git_state(checkout / "sub") == git_state(checkout)


def test_a_repository_without_a_commit_is_dirty_and_says_none(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("a")
    found = git_state(tmp_path)
    assert (found.commit, found.dirty, len(found.tree)) == ("none", True, 40)


def test_outside_a_repository_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == GitState(commit="none", dirty=False, tree="none")


def test_without_git_is_none(checkout, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    assert git_state(checkout).commit == "none"


def test_a_repository_that_git_cannot_read_is_an_error(checkout):
    (checkout / ".git" / "config").write_text("[core\n")
    with pytest.raises(ConfigError, match="git cannot read"):
        git_state(checkout)


def test_the_variables_of_a_git_hook_do_not_lead_elsewhere(checkout, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GIT_DIR", str(tmp_path_factory.mktemp("other")))
    monkeypatch.setenv("GIT_INDEX_FILE", os.devnull)
    monkeypatch.setattr(subprocess, "run", _without(subprocess.run))
    assert len(git_state(checkout).commit) == 40


def _without(run):
    """subprocess.run that insists on an environment without the hook's variables."""

    def checked(*words, env, **options):
        assert "GIT_DIR" not in env
        return run(*words, env=env, **options)

    return checked


def tags(parameters: dict[str, object] | None = None, **verdict: object) -> dict[str, str]:
    return lineage.tags(
        component="tiny",
        run=TrainedRun(
            run_id="r1", experiment_id="1", model_uri="models:/m-1",
            metrics={}, parameters=parameters or {}, device="cpu",
        ),
        data=DataVersion(component="tiny", hash="d41d8.dir"),
        environment=Environment(name="py311-cpu-abc", variant="cpu", python="python", lock_sha256="e" * 64),
        verdict=Verdict.model_validate(
            {
                "component": "tiny", "run_id": "r1", "verdict": "pass", "reasons": [], "metric": "accuracy",
                "candidate": 0.91, "floor": 0.9, "test_set": "s" * 64, **verdict,
            }
        ),
        git=STATE,
    )  # fmt: skip


def test_every_row_of_the_lineage_is_there():
    found = tags({"lr": 0.1, "epochs": 2}, live_version="3", live=0.9, difference=0.01)
    assert all(name.startswith("torchrelay.") for name in found)
    assert all(found[name] for name in found if name != lineage.TAG_REASONS)
    assert found[lineage.TAG_COMMIT] == "c" * 40
    assert found[lineage.TAG_DIRTY] == "true"
    assert found[lineage.TAG_DATA] == "d41d8.dir"
    assert found[lineage.TAG_ENVIRONMENT] == "py311-cpu-abc"
    assert found[lineage.TAG_PARENT_VERSION] == "3"
    assert json.loads(found[lineage.TAG_PARAMETERS]) == {"lr": 0.1, "epochs": 2}
    assert found[lineage.TAG_SCORE] == "accuracy=0.91"


def test_the_first_version_has_no_parent():
    assert tags()[lineage.TAG_PARENT_VERSION] == "none"


def test_too_long_a_value_is_cut_and_says_so():
    found = tags({"words": "x" * 20000})[lineage.TAG_PARAMETERS]
    assert len(found) == LONGEST_TAG
    assert "[cut: 20013 characters, sha256 " in found


def test_a_value_that_fits_is_left_alone():
    assert tag_value("x" * LONGEST_TAG) == "x" * LONGEST_TAG

import hashlib
import os
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from torchrelay.archive import mar as mars
from torchrelay.archive.mar import Member
from torchrelay.errors import ArchiveError, ConfigError
from torchrelay.gate import code_faults

HANDLER = files("torchrelay.serving").joinpath("handler.py").read_bytes()
CODE = {"handler.py": b"from model import load\n", "model.py": b"load = 1\n"}
WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"


def git(checkout: Path, *words: str) -> str:
    """Run git on the test's own repository, without the settings of whoever runs the test."""
    who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    clean = {"PATH": os.environ["PATH"], "HOME": str(checkout), "GIT_CONFIG_NOSYSTEM": "1", **who}
    return subprocess.run(
        ["git", *words], cwd=checkout, env=clean, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(checkout: Path, content: dict[str, bytes], name: str = "tiny") -> str:
    for file, data in content.items():
        path = checkout / "components" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "x")
    return git(checkout, "rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    return folder


def packed(tmp_path: Path, code: dict[str, bytes], handler: bytes = HANDLER) -> Path:
    """A .mar as `archive.pack` lays it out."""
    members = {mars.BASE_HANDLER: handler, mars.WEIGHTS: WEIGHTS, mars.GOLDEN: b"{}", mars.RELEASE: b"{}"}
    members[mars.TORCHSERVE_MANIFEST] = b"{}"
    path = tmp_path / "model.mar"
    with path.open("wb") as file:
        mars.write(file, {name: Member.of(data) for name, data in {**members, **code}.items()})
    return path


def test_committed_code_has_no_fault(tmp_path, checkout):
    at = commit(checkout, {**CODE, "train.py": b"pass\n"})
    assert code_faults(packed(tmp_path, CODE), checkout, "tiny", at) == []


def test_an_earlier_commit_of_the_history_counts_and_the_files_at_hand_do_not(tmp_path, checkout):
    at = commit(checkout, CODE)
    commit(checkout, {"model.py": b"load = 2\n"})
    (checkout / "components/tiny/handler.py").write_bytes(b"changed and not committed\n")
    assert code_faults(packed(tmp_path, CODE), checkout, "tiny", at) == []


@pytest.mark.parametrize("changed", [b"load = 1\r\n", b"load = 1", b"load = 1\n\n", b"import os\n"])
def test_a_module_that_differs_in_a_byte_is_a_fault_that_says_what_to_do(tmp_path, checkout, changed):
    at = commit(checkout, CODE)
    faults = code_faults(packed(tmp_path, {**CODE, "model.py": changed}), checkout, "tiny", at)
    assert faults == [
        f"model.py in the archive differs from components/tiny/model.py of commit {at[:12]}: commit the files and "
        "bring them into this checkout, then make deploy-dev COMPONENT=tiny"
    ]


def test_a_module_that_was_never_committed_is_a_fault(tmp_path, checkout):
    at = commit(checkout, CODE)
    faults = code_faults(packed(tmp_path, {**CODE, "backdoor.py": b"pass\n"}), checkout, "tiny", at)
    assert [fault.partition(":")[0] for fault in faults] == [
        f"backdoor.py in the archive is not among components/tiny/ of commit {at[:12]}"
    ]


def test_the_code_of_another_component_or_of_a_folder_below_does_not_count(tmp_path, checkout):
    commit(checkout, CODE, "other")
    at = commit(checkout, {"tests/handler.py": CODE["handler.py"], "tests/model.py": CODE["model.py"]})
    assert len(code_faults(packed(tmp_path, CODE), checkout, "tiny", at)) == 2


def test_a_link_in_the_commit_is_no_module(tmp_path, checkout):
    """git keeps the path that a link leads to as its content, which an archive could pretend to be."""
    at = commit(checkout, {"handler.py": CODE["handler.py"]})
    (checkout / "components/tiny/model.py").symlink_to("handler.py")
    at = commit(checkout, {})
    faults = code_faults(packed(tmp_path, {**CODE, "model.py": b"handler.py"}), checkout, "tiny", at)
    assert [fault.partition(" ")[0] for fault in faults] == ["model.py"]


def test_the_base_handler_may_be_this_installations_or_the_commits_and_no_other(tmp_path, checkout):
    path = checkout / "src/torchrelay/serving/handler.py"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"older = 1\n")
    at = commit(checkout, CODE)
    assert code_faults(packed(tmp_path, CODE), checkout, "tiny", at) == []
    assert code_faults(packed(tmp_path, CODE, b"older = 1\n"), checkout, "tiny", at) == []
    faults = code_faults(packed(tmp_path, CODE, b"older = 2\n"), checkout, "tiny", at)
    assert "neither this installation's nor that of commit" in faults[0]


def test_a_commit_that_head_does_not_hold_is_a_fault(tmp_path, checkout):
    commit(checkout, {"handler.py": b"before\n"})
    git(checkout, "checkout", "--quiet", "-b", "aside")
    at = commit(checkout, CODE)
    git(checkout, "checkout", "--quiet", "main")
    faults = code_faults(packed(tmp_path, CODE), checkout, "tiny", at)
    assert [fault.partition(":")[0] for fault in faults] == [f"commit {at[:12]} is not part of what HEAD holds"]
    git(checkout, "merge", "--quiet", "aside")
    assert code_faults(packed(tmp_path, CODE), checkout, "tiny", at) == []


def test_an_unrelated_history_is_a_fault(tmp_path, checkout):
    commit(checkout, CODE)
    git(checkout, "checkout", "--quiet", "--orphan", "else")
    at = commit(checkout, {"train.py": b"pass\n"})
    git(checkout, "checkout", "--quiet", "main")
    assert "is not part of what HEAD holds" in code_faults(packed(tmp_path, CODE), checkout, "tiny", at)[0]


@pytest.mark.parametrize("said", ["none", "", "HEAD", "--output=x", "0" * 40, "a" * 39, "main"])
def test_what_is_no_commit_is_a_fault(tmp_path, checkout, said):
    commit(checkout, CODE)
    faults = code_faults(packed(tmp_path, CODE), checkout, "tiny", said)
    assert len(faults) == 1
    assert ("is not in this checkout" if len(said) == 40 else "was trained from no commit") in faults[0]


def test_a_tree_or_a_tag_is_no_commit(tmp_path, checkout):
    commit(checkout, CODE)
    git(checkout, "tag", "-a", "v1", "-m", "x")
    for name in ("HEAD^{tree}", "v1"):
        assert code_faults(packed(tmp_path, CODE), checkout, "tiny", git(checkout, "rev-parse", name))


def test_a_replaced_object_does_not_pass_for_the_committed_one(tmp_path, checkout):
    at = commit(checkout, CODE)
    (checkout / "evil").write_bytes(b"evil\n")
    evil = git(checkout, "hash-object", "-w", "evil")
    git(checkout, "replace", git(checkout, "rev-parse", "HEAD:components/tiny/model.py"), evil)
    assert len(code_faults(packed(tmp_path, {**CODE, "model.py": b"evil\n"}), checkout, "tiny", at)) == 1


def test_the_repository_that_a_git_hook_names_is_not_asked(tmp_path, checkout, monkeypatch):
    at = commit(checkout, CODE)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert code_faults(packed(tmp_path, CODE), checkout, "tiny", at) == []


def test_nothing_is_executed(tmp_path, checkout):
    """Neither the archive's code, nor the checkout's, nor a filter or hook that its git is configured with."""
    trap = {name: f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode() for name in CODE}
    at = commit(checkout, {**trap, ".gitattributes": b"*.py filter=trap diff=trap\n"})
    for key in ("filter.trap.smudge", "filter.trap.clean", "diff.trap.textconv", "core.fsmonitor"):
        git(checkout, "config", key, f"touch {tmp_path / 'ran'}")
    assert code_faults(packed(tmp_path, trap), checkout, "tiny", at) == []
    assert not (tmp_path / "ran").exists()


def test_repositories_named_by_sha256_work_too(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet", "--object-format=sha256")
    at = commit(folder, CODE)
    assert len(at) == 2 * hashlib.sha256().digest_size
    assert code_faults(packed(tmp_path, CODE), folder, "tiny", at) == []


def test_a_folder_without_a_repository_is_no_fault_of_the_version(tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match="not a git repository"):
        code_faults(packed(tmp_path, CODE), tmp_path / "plain", "tiny", "a" * 40)


def test_a_damaged_archive_is_the_callers_error(tmp_path, checkout):
    at = commit(checkout, CODE)
    path = packed(tmp_path, CODE)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArchiveError):
        code_faults(path, checkout, "tiny", at)

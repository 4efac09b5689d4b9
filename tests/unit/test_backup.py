"""Artifacts and keys in a backup: what is copied, that keys leave only encrypted, and that they come back."""

import stat
from pathlib import Path

import pytest

from torchrelay import backup
from torchrelay.config import BackupPlan
from torchrelay.errors import ConfigError, StorageError

SECRET = b"-----BEGIN PRIVATE KEY----- secret"


@pytest.fixture
def plan(tmp_path: Path) -> BackupPlan:
    keys = tmp_path / "keys"
    for name, mode in (("dev/signing.pem", 0o600), ("dev/signing.pub", 0o644), ("tracking/webhook.key", 0o600)):
        (keys / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (keys / name).write_bytes(SECRET + name.encode())
        (keys / name).chmod(mode)
    (tmp_path / "artifacts" / "1" / "run").mkdir(parents=True)
    (tmp_path / "artifacts" / "1" / "run" / "model.mar").write_bytes(b"mar")
    return BackupPlan(place=str(tmp_path / "backup"), artifacts=tmp_path / "artifacts", keys=keys)


def with_key(plan: BackupPlan, tmp_path: Path) -> tuple[BackupPlan, Path]:
    identity = tmp_path / "recovery.age"
    return plan.model_copy(update={"recipient": backup.make_identity(identity)}), identity


def test_artifacts_are_copied_once_and_again_when_they_change(plan: BackupPlan, tmp_path: Path) -> None:
    assert backup.back_up(plan, tmp_path).artifacts == 1
    assert backup.back_up(plan, tmp_path).artifacts == 0
    (tmp_path / "artifacts" / "1" / "run" / "model.mar").write_bytes(b"longer")
    assert backup.back_up(plan, tmp_path).artifacts == 1
    copy = tmp_path / "backup" / "artifacts" / "1" / "run" / "model.mar"
    assert copy.read_bytes() == b"longer"
    assert not [path for path in copy.parent.iterdir() if path != copy]


def test_what_is_lost_comes_back_and_what_is_there_stays(plan: BackupPlan, tmp_path: Path) -> None:
    backup.back_up(plan, tmp_path)
    file = tmp_path / "artifacts" / "1" / "run" / "model.mar"
    assert backup.restore_artifacts(plan.place, tmp_path / "artifacts") == 0
    file.write_bytes(b"newer than the backup")
    assert backup.restore_artifacts(plan.place, tmp_path / "artifacts") == 0
    file.unlink()
    assert backup.restore_artifacts(plan.place, tmp_path / "artifacts") == 1
    assert file.read_bytes() == b"mar"


def test_without_a_recipient_no_key_leaves(plan: BackupPlan, tmp_path: Path) -> None:
    assert backup.back_up(plan, tmp_path).keys is None
    assert not (tmp_path / "backup" / "keys").exists()


def test_keys_leave_only_encrypted_and_only_when_they_changed(plan: BackupPlan, tmp_path: Path) -> None:
    plan, _ = with_key(plan, tmp_path)
    assert backup.back_up(plan, tmp_path).keys is not None
    assert backup.back_up(plan, tmp_path).keys is None
    (plan.keys / "dev" / "signing.pem").write_bytes(b"rotated")
    assert backup.back_up(plan, tmp_path).keys is not None
    written = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
    assert len([path for path in written if path.name.endswith(".tar.age")]) == 2
    assert not [path for path in written if SECRET in path.read_bytes()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.suffix == ".age"} == {0o600}


def test_keys_come_back_with_their_modes_and_none_is_replaced(plan: BackupPlan, tmp_path: Path) -> None:
    plan, identity = with_key(plan, tmp_path)
    backup.back_up(plan, tmp_path)
    target = tmp_path / "other"
    (target / "dev").mkdir(parents=True)
    (target / "dev" / "signing.pub").write_bytes(b"another one's")
    assert backup.restore_keys(plan.place, identity, target) == ["dev/signing.pem", "tracking/webhook.key"]
    assert (target / "dev" / "signing.pub").read_bytes() == b"another one's"
    assert (target / "tracking" / "webhook.key").read_bytes() == SECRET + b"tracking/webhook.key"
    assert stat.S_IMODE((target / "tracking" / "webhook.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((target / "tracking").stat().st_mode) == 0o700


def test_another_identity_opens_nothing(plan: BackupPlan, tmp_path: Path) -> None:
    plan, _ = with_key(plan, tmp_path)
    backup.back_up(plan, tmp_path)
    backup.make_identity(tmp_path / "other.age")
    with pytest.raises(StorageError, match="does not open"):
        backup.restore_keys(plan.place, tmp_path / "other.age", tmp_path / "target")
    with pytest.raises(StorageError, match="does not open"):
        backup.restore_keys(plan.place, tmp_path / "none.age", tmp_path / "target")


def test_no_keys_in_the_backup_is_said(plan: BackupPlan, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no keys"):
        backup.restore_keys(plan.place, tmp_path / "x", tmp_path / "target")


def test_an_identity_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    recipient = backup.make_identity(tmp_path / "recovery.age")
    assert recipient in (tmp_path / "recovery.age").read_text()
    assert stat.S_IMODE((tmp_path / "recovery.age").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="is there already"):
        backup.make_identity(tmp_path / "recovery.age")


def test_a_folder_that_cannot_be_written_is_said(plan: BackupPlan, tmp_path: Path) -> None:
    (tmp_path / "backup").write_text("a file in its place")
    with pytest.raises(StorageError, match="Not a directory") as caught:
        backup.back_up(plan, tmp_path)
    assert "backup.folder" in caught.value.next_command

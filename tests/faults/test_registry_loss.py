"""The registry's file is lost under writes, again and again, and comes back from its replica."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bucket_rig import BUCKET, bucket
from registry_rig import Lost
from tests.conftest import free_port_base

RECOVERY_POINT_S, RESTORE_S = 5.0, 60.0
pytestmark = pytest.mark.real


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where backups go."""
    if request.param == "folder":
        yield str(tmp_path / "a backup")
        return
    with bucket(tmp_path / "bucket", free_port_base(1)) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        yield f"gs://{BUCKET}/a/backup"


def lose(folder: Path, place: str, times: int) -> None:
    lost = Lost(folder, place)
    for _ in range(times):
        loss = lost.lose(3)
        assert loss.acknowledged > 20
        assert loss.restored > 0
        assert loss.integrity == "ok"
        assert loss.recovery_point <= RECOVERY_POINT_S
        assert loss.restore <= RESTORE_S


def test_what_was_acknowledged_before_the_recovery_point_is_never_lost(tmp_path: Path, place: str) -> None:
    (tmp_path / "a state").mkdir()
    lose(tmp_path / "a state", place, 5)


@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_a_hundred_times(tmp_path: Path, place: str) -> None:
    (tmp_path / "state").mkdir()
    lose(tmp_path / "state", place, 50)

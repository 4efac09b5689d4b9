"""The command line's own last resort: what no verb foresaw and a user can still mend."""

import errno
from pathlib import Path

import pytest

from torchrelay import cli
from torchrelay.cli import plan
from torchrelay.cli.status import _text
from torchrelay.config import write_json
from torchrelay.handover import ArchiveRecord


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_told_in_three_parts(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:
        raise OSError(number, "No space left on device", "/state/desired.json")

    monkeypatch.setattr(cli, "verbs", fill)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "/state/desired.json" in said
    assert "expected:" in said
    assert "make doctor" in said


def test_another_error_of_the_system_is_ours_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cli, "verbs", fail)
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


@pytest.mark.parametrize("public", [None, "https://relay.example.org:18542"])
def test_status_says_where_other_machines_reach_a_perimeter(public: str | None) -> None:
    perimeter = {"gateway": "http://127.0.0.1:18510", "public": public, "components": {}}
    tracking = {"url": "http://127.0.0.1:18500", "public": public, "healthy": True}
    said = _text({"tracking": tracking, "perimeters": {"dev": perimeter}})
    assert said.count("https://relay.example.org:18542  from other machines") == (2 if public else 0)


@pytest.mark.parametrize(
    ("record", "said"), [(None, "what the chain builds would replace it"), ("3", "version 3 would be deployed anew")]
)
def test_a_plan_is_told_also_after_a_package_leg_that_was_cut_short(
    record: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "results", lambda _name: tmp_path)
    if record:
        built = ArchiveRecord(component="tiny", version=record, digest="d", environment="e", url="u")
        write_json(tmp_path / "archive.json", built)
    rules = ["package_archive", "prove_archive", "deploy_model"]
    assert plan._change("tiny", rules, {"wanted": "3", "converged": True}).startswith(said)

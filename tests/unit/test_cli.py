"""The command line's own last resort: what no verb foresaw and a user can still mend."""

import errno

import pytest

from torchrelay import cli
from torchrelay.cli.status import _text


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

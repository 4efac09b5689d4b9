"""`clean` deletes what was made here, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from torchrelay import config
from torchrelay.cli.site import clean
from torchrelay.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("components/tiny", "config", "results/tiny", "data/tiny", "state"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "Snakefile").touch()
    (tmp_path / "components/tiny/model.py").touch()
    (tmp_path / "config/defaults.yaml").write_text("state: state\nkeys: keys\nport_base: 19000\n")
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    for name in ("STATE", "CONFIG", "KEYS", "PORT_BASE"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    config.settings.cache_clear()
    yield tmp_path
    config.settings.cache_clear()


def _clean(*words: str) -> Result:
    return CliRunner().invoke(clean, words)


def test_without_a_yes_nothing_goes_and_it_says_what_would(checkout: Path) -> None:
    (checkout / "state/site.json").touch()
    error = _clean().exception
    assert isinstance(error, ConfigError)
    assert str(checkout / "results") in error.found
    assert (checkout / "state/site.json").exists()


def test_with_a_yes_what_was_made_goes_and_the_sources_stay(checkout: Path) -> None:
    (checkout / "state/site.json").touch()
    assert _clean("--confirm", "yes").exit_code == 0
    left = {path.name for path in checkout.iterdir()}
    assert left == {"components", "config", "Snakefile"}
    assert (checkout / "components/tiny/model.py").exists()


def test_a_folder_that_is_no_sites_is_not_deleted(checkout: Path) -> None:
    (checkout / "state/thesis.tex").touch()
    error = _clean("--confirm", "yes").exception
    assert isinstance(error, ConfigError)
    assert "holds nothing of a site" in error.found
    assert (checkout / "state/thesis.tex").exists()
    assert (checkout / "results").exists()

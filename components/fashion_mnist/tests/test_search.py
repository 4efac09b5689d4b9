"""The search where trials diverge; with real trials and a real MLflow server it is in tests/e2e of the checkout."""

import json
from unittest.mock import MagicMock

import pytest

import search
from train import DivergedError


@pytest.fixture
def run_search(tmp_path, monkeypatch):
    """Search with two trials that end as told: with an accuracy, or without."""
    tracked = MagicMock()
    tracked.start_run.return_value.__exit__.return_value = False
    monkeypatch.setattr(search, "mlflow", tracked)
    monkeypatch.setattr(search, "read_part", lambda *_: None)
    words = ["search.py", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--trials", "2"]
    monkeypatch.setattr(search.sys, "argv", words)

    def run(*accuracies: float | None) -> None:
        ends = iter(accuracies)

        def fit(*_: object) -> tuple[None, list[dict[str, float]]]:
            accuracy = next(ends)
            if accuracy is None:
                raise DivergedError("training diverged")
            return None, [{"val_accuracy": accuracy}]

        monkeypatch.setattr(search, "fit", fit)
        search.main()

    return run


def test_a_trial_that_diverges_does_not_end_the_search(run_search, tmp_path, capsys):
    run_search(None, 0.5)
    assert "best validation accuracy 0.5000 of 2 trials: -P learning_rate=" in capsys.readouterr().out
    assert {"learning_rate", "dropout", "shift"} <= set(json.loads((tmp_path / "out" / "best.json").read_text()))


def test_a_search_without_a_result_fails_and_writes_nothing(run_search, tmp_path):
    with pytest.raises(SystemExit, match="none of 2 trials came to an end"):
        run_search(None, None)
    assert not (tmp_path / "out").exists()

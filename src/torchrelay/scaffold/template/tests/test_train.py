"""The recipe: it learns, the same weights again, and its main leaves what the other legs read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
from train import Part, Recipe, fit, read_part

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    raw, validated, prepared = (str(folder / name) for name in ("raw", "validated", "prepared"))
    for words in (
        ["extract", "--output", raw],
        ["validate", "--input", raw, "--output", validated],
        ["prepare", "--input", raw, validated, "--output", prepared],
    ):
        assert data.main([*words, "--params", str(HERE / "params.yaml")]) == 0
    return Path(prepared)


def parts(prepared: Path) -> tuple[Part, Part]:
    cpu = torch.device("cpu")
    return read_part(prepared / "train.npz", cpu), read_part(prepared / "val.npz", cpu)


def test_training_learns_more_than_a_line_could_say(prepared: Path) -> None:
    _, metrics = fit(Recipe(), *parts(prepared), lambda _epoch, _metrics: None)
    assert metrics["val_accuracy"] > 0.95


def test_the_same_recipe_gives_the_same_weights(prepared: Path) -> None:
    recipe = Recipe(epochs=1)
    one, other = (fit(recipe, *parts(prepared), lambda _epoch, _metrics: None)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_main_leaves_every_file_that_the_other_legs_read(prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    subprocess.run(
        [sys.executable, str(HERE / "train.py"), "--data", str(prepared), "--output", str(output), "--epochs", "2"],
        env={"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "PATH": ""},
        cwd=tmp_path,
        check=True,
    )
    golden = json.loads((output / "golden.json").read_text())
    assert len(golden["instances"]) == len(golden["predictions"]) == 16
    run = json.loads((output / "run.json").read_text())
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert run["metrics"]["accuracy"] == sum(evaluation["scores"]) / len(evaluation["scores"])
    assert run["model_uri"].startswith("models:/")
    assert (output / "model.safetensors").is_file()

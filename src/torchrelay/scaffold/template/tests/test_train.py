"""The recipe: it learns, the same weights again, and its main leaves what the other legs read."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

import data
from train import DivergedError, Part, Recipe, fit, pinned_requirements, read_part

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


def test_a_training_that_diverges_stops_at_once_and_says_so(prepared: Path) -> None:
    epochs: list[int] = []
    with pytest.raises(DivergedError, match=r"in epoch 1 .* is nan"):
        fit(Recipe(learning_rate=1e30), *parts(prepared), lambda epoch, _metrics: epochs.append(epoch))
    assert epochs == [1]


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_models_requirements_are_the_variants_lock(variant: str) -> None:
    pins = pinned_requirements(variant)
    assert any(pin.startswith("nvidia-") for pin in pins) == (variant == "cuda")
    assert any(pin.startswith("torch==") for pin in pins)


def test_main_leaves_every_file_that_the_other_legs_read_and_a_model_that_mlflow_can_serve(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    words = ["--data", str(prepared), "--output", str(output), "--epochs", "2"]
    subprocess.run([sys.executable, str(HERE / "train.py"), *words], cwd=tmp_path, check=True)
    golden = json.loads((output / "golden.json").read_text())
    assert len(golden["instances"]) == len(golden["predictions"]) == 16
    run = json.loads((output / "run.json").read_text())
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert run["metrics"]["accuracy"] == sum(evaluation["scores"]) / len(evaluation["scores"])
    assert (output / "model.safetensors").is_file()
    # MLflow warns of itself and of what it imports, past any filter.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        logged = mlflow.get_run(run["run_id"])
        served = mlflow.pyfunc.load_model(run["model_uri"]).predict(np.array(golden["instances"], np.float32))
    assert Path(sys.prefix).name in logged.data.tags["torchrelay.environment"]
    assert logged.inputs.dataset_inputs[0].dataset.schema
    assert [answer["class"] for answer in served] == [answer["class"] for answer in golden["predictions"]]

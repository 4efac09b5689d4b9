"""Training and search as their READMEs say, as processes, on made-up data, against a real MLflow server.

They take most of a minute on two cores because each process imports torch and MLflow anew, and `mlflow run` is one more
of them. They run two at a time while the tests wait for what they need.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
import yaml

from tests.conftest import ROOT
from torchrelay import scaffold
from torchrelay.tracking import Run, Tracking

pytestmark = [pytest.mark.real]

# With random shifts and dropout, so that every source of chance takes part.
RECIPE = {"epochs": 2, "width": 8, "shift": 2, "dropout": 0.2, "batch_size": 32}
DATA_HASH = "0123456789abcdef0123456789abcdef.dir"
STAGES = {"extract": [], "validate": ["raw"], "prepare": ["raw", "validated"]}


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the folder that it was told to write to."""

    status: int
    told: str
    output: Path


@dataclass(frozen=True)
class Desk:
    """A folder laid out like a checkout with one component and its data, an interpreter, and a tracking server."""

    root: Path
    name: str
    python: Path
    tracking: Tracking

    @property
    def component(self) -> Path:
        return self.root / "components" / self.name

    @property
    def data(self) -> Path:
        return self.root / "data" / self.name

    def prepare(self, source: Path) -> None:
        """Run the data stages on the files of a folder."""
        for stage, inputs in STAGES.items():
            output = {"extract": "raw", "validate": "validated"}.get(stage, "prepared")
            given = ["--input", *(str(self.data / name) for name in inputs)] if inputs else []
            words = ["data.py", stage, "--params", "params.yaml", *given, "--output", str(self.data / output)]
            environment = self._environment() | {"TORCHRELAY_DATA": str(source)}
            subprocess.run([self.python, *words], cwd=self.component, env=environment, check=True)

    def mlflow_run(self, *, search: bool = False, **parameters: object) -> Ended:
        """The README's command for training, or for a search, with other parameters."""
        readme = re.sub(r" \\\n +", " ", (self.component / "README.md").read_text(encoding="utf-8"))
        lines = [line.strip().removeprefix("$ ") for line in readme.splitlines()]
        [command] = [line for line in lines if line.startswith("mlflow run") and ("-e search" in line) == search]
        for name, value in parameters.items():
            command = re.sub(rf" -P {name}=\S+", "", command) + f" -P {name}={value}"
        # The template's README gives commands to type in the component's folder.
        folder = self.component if command.startswith("mlflow run .") else self.root
        return self._run(["bash", "-c", command], folder, Path(str(parameters["output"])))

    def train(self, output: Path, **parameters: object) -> Ended:
        """train.py without `mlflow run`, in an experiment named after the folder."""
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]
        words = ["train.py", f"--data={self.data / 'prepared'}", f"--output={output}", *flags]
        return self._run([str(self.python), *words], self.component, output, MLFLOW_EXPERIMENT_NAME=output.name)

    def _run(self, command: list[str], folder: Path, output: Path, **more: str) -> Ended:
        done = subprocess.run(
            command,
            cwd=folder,
            env=self._environment() | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=240,
        )
        return Ended(done.returncode, done.stdout, output)

    def _environment(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "TORCHRELAY_"))}
        return clean | {
            "PATH": f"{self.python.parent}{os.pathsep}{clean['PATH']}",
            "MLFLOW_TRACKING_URI": self.tracking.url,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GIT_PYTHON_REFRESH": "quiet",
            # Bit for bit is promised for the CPU.
            "CUDA_VISIBLE_DEVICES": "",
            # More than one, since it is threads that would add up in another order.
            "OMP_NUM_THREADS": "2",
            # Threads that spin while they wait would take the cores from the process beside.
            "OMP_WAIT_POLICY": "passive",
        }

    def runs(self, ended: Ended) -> tuple[Run, list[Run]]:
        """The run that `mlflow run` made for this folder, else train.py by itself, and its children."""
        found = self._get("experiments/search", max_results="100")["experiments"]
        runs = [run for one in found for run in self.tracking.search_runs(one["name"])]
        by_mlflow = [run for run in runs if run.parameters.get("output") == str(ended.output)]
        [parent] = by_mlflow or self.tracking.search_runs(ended.output.name)
        return parent, [run for run in runs if run.tags.get("mlflow.parentRunId") == parent.run_id]

    def history(self, run: Run, metric: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("metrics/get-history", run_id=run.run_id, metric_key=metric)["metrics"]
        return found

    def inputs(self, run: Run) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("runs/get", run_id=run.run_id)["run"]["inputs"]["dataset_inputs"]
        return found

    def model_file(self, uri: str, file: str) -> bytes:
        """A file of the logged model models:/m-…"""
        model = self._get(f"logged-models/{uri.removeprefix('models:/')}")["model"]
        place = model["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
        answer = urllib3.request("GET", f"{self.tracking.url}/api/2.0/mlflow-artifacts/artifacts/{place}/{file}")
        assert answer.status == 200, (file, answer.data)
        return answer.data

    def _get(self, path: str, **fields: str) -> Any:
        answer = urllib3.request("GET", f"{self.tracking.url}/api/2.0/mlflow/{path}", fields=fields)
        assert answer.status == 200, answer.data
        return answer.json()


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def make_images(folder: Path) -> Path:
    """The four files of Fashion-MNIST with images of noise, and a bar whose row tells the class."""
    folder.mkdir()
    draw = np.random.default_rng(7)
    for prefix, count in (("train", 320), ("t10k", 60)):
        labels = np.arange(count) % 10
        images = draw.integers(0, 60, (count, 28, 28))
        images[np.arange(count), 2 * labels + 4] = 255
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, component_python: str, mlflow_server: str) -> Desk:
    """fashion_mnist with the data of a folder of ours."""
    root = tmp_path_factory.mktemp("fashion")
    made = Desk(root, "fashion_mnist", Path(component_python), Tracking(mlflow_server))
    shutil.copytree(
        ROOT / "components" / made.name, made.component, ignore=shutil.ignore_patterns("__pycache__", "tests")
    )
    made.prepare(make_images(root / "mine"))
    return made


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory, component_python: str, mlflow_server: str) -> Desk:
    """A component fresh from the template, and a few points for it to search with."""
    root = tmp_path_factory.mktemp("moons")
    (root / "components").mkdir()
    (root / "Snakefile").touch()
    made = Desk(root, "tiny_moons", Path(component_python), Tracking(mlflow_server))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHRELAY_ROOT", str(root))
        scaffold.create(made.name)
    (made.data / "prepared").mkdir(parents=True)
    draw = np.random.default_rng(7)
    for part in ("train", "val"):
        labels = np.arange(60) % 2
        points = draw.normal(labels[:, None], 0.5, (60, 2)).astype(np.float32)
        np.savez(made.data / "prepared" / f"{part}.npz", instances=points, labels=labels)
    return made


def train(desk: Desk) -> Ended:
    return desk.mlflow_run(output=desk.root / "trained", data_hash=DATA_HASH, seed=3, **RECIPE)


def trained_before(output: Path) -> Path:
    """The folder, with the run.json of an earlier training."""
    output.mkdir()
    (output / "run.json").write_text("{}")
    return output


def raise_at_a_label(desk: Desk) -> Ended:
    """A training that raises in the middle of an epoch, at a label that is no class."""
    broken = desk.data / "broken"
    shutil.copytree(desk.data / "prepared", broken)
    with np.load(broken / "train.npz") as arrays:
        instances, labels = arrays["instances"], arrays["labels"].copy()
    labels[100] = 10
    np.savez(broken / "train.npz", instances=instances, labels=labels)
    return desk.mlflow_run(output=trained_before(desk.root / "raises"), data=broken, **RECIPE)


def diverge(desk: Desk) -> Ended:
    return desk.train(trained_before(desk.root / "diverges"), **RECIPE | {"learning_rate": 1e30})


def search(desk: Desk) -> Ended:
    """Two trials of one epoch each."""
    return desk.mlflow_run(search=True, output=desk.root / "searched", trials=2, epochs=1)


@pytest.fixture(scope="module")
def started(desk: Desk, moons: Desk) -> Iterator[dict[str, Future[Ended]]]:
    """Every process of this module; those that have not begun when the tests are done never do."""
    jobs: dict[str, Callable[[], Ended]] = {
        "trained": lambda: train(desk),
        "again": lambda: desk.train(desk.root / "again", seed=3, **RECIPE),
        "other": lambda: desk.train(desk.root / "other", seed=4, **RECIPE),
        "raises": lambda: raise_at_a_label(desk),
        "diverges": lambda: diverge(desk),
        "fashion_mnist": lambda: search(desk),
        "tiny_moons": lambda: search(moons),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(job) for name, job in jobs.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def trained(started: dict[str, Future[Ended]]) -> Ended:
    """One training by `mlflow run`."""
    ended = started["trained"].result()
    assert ended.status == 0, ended.told
    return ended


def record(ended: Ended) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ended.output / "run.json").read_text())
    return found


# --- what MLflow is told ---------------------------------------------------------------------------------------------


def test_the_run_has_the_parameters_and_every_epochs_metrics(desk: Desk, trained: Ended) -> None:
    run, _ = desk.runs(trained)
    assert (run.run_id, run.status) == (record(trained)["run_id"], "FINISHED")
    given = {name: str(value) for name, value in RECIPE.items()} | {"seed": "3", "data_hash": DATA_HASH, "threads": "2"}
    assert given.items() <= run.parameters.items()
    assert {"learning_rate", "weight_decay", "golden_samples", "device", "torch", "python", "machine"} <= {
        *run.parameters
    }
    for metric in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate", "epoch_seconds"):
        assert [point["step"] for point in desk.history(run, metric)] == [1, 2], metric
    scores = json.loads((trained.output / "evaluation.json").read_text())["scores"]
    assert run.metrics["accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert desk.history(run, "val_loss")[-1]["value"] == record(trained)["metrics"]["val_loss"]


def test_the_run_names_its_data_by_dvcs_hash_and_by_where_they_came_from(desk: Desk, trained: Ended) -> None:
    [found] = desk.inputs(desk.runs(trained)[0])
    assert found["tags"] == [{"key": "mlflow.data.context", "value": "training"}]
    dataset = found["dataset"]
    assert (dataset["name"], dataset["digest"]) == ("fashion_mnist", DATA_HASH)
    assert dataset["source_type"] == "local"
    assert json.loads(dataset["source"]) == {"uri": str(desk.root / "mine")}
    with np.load(desk.data / "prepared" / "train.npz") as arrays:
        assert json.loads(dataset["profile"])["features_shape"] == list(arrays["instances"].shape)


def test_the_run_and_its_model_name_the_environment(desk: Desk, trained: Ended) -> None:
    run, _ = desk.runs(trained)
    environment = json.loads((desk.python.parents[1] / "environment.json").read_text())
    lock = (desk.component / f"requirements.{environment['variant']}.lock").read_text()
    assert run.tags["torchrelay.environment"] == environment["name"]
    assert run.tags["torchrelay.environment.lock"] == hashlib.sha256(lock.encode()).hexdigest()
    told = desk.model_file(record(trained)["model_uri"], "requirements.txt").decode().splitlines()
    pins = re.findall(r"^[A-Za-z0-9][^\s\\]*==[^\s\\]+", lock, re.M)
    assert len(pins) > 50
    assert {*pins} <= {line.partition(";")[0] for line in told}
    assert [line for line in told if line.startswith("torch==")]


def test_the_model_has_its_signature_and_an_input_example(desk: Desk, trained: Ended) -> None:
    uri = record(trained)["model_uri"]
    described = yaml.safe_load(desk.model_file(uri, "MLmodel"))
    [taken] = json.loads(described["signature"]["inputs"])
    assert taken["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 28, 28]}
    given = {column["name"]: column["type"] for column in json.loads(described["signature"]["outputs"])}
    assert given == {"class": "long", "label": "string", "probabilities": "array"}
    example = json.loads(desk.model_file(uri, described["saved_input_example_info"]["artifact_path"]))
    assert np.shape(example) == (2, 28, 28)


def test_plots_golden_set_and_evaluation_are_artifacts(desk: Desk, trained: Ended) -> None:
    run, _ = desk.runs(trained)
    for plot in ("curves", "confusion"):
        content = desk.tracking.download_artifact(run.run_id, f"plots/{plot}.png")
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))
        assert min(width, height) > 200
        assert len(content) > 5000
    for file in ("golden.json", "evaluation.json"):
        assert desk.tracking.download_artifact(run.run_id, file) == (trained.output / file).read_bytes()
    golden = json.loads((trained.output / "golden.json").read_text())
    assert len(golden["instances"]) == len(golden["predictions"]) == 16
    assert {"class", "label", "probabilities"} == {*golden["predictions"][0]}


# --- the same again --------------------------------------------------------------------------------------------------


def sha256(ended: Ended) -> str:
    assert ended.status == 0, ended.told
    return hashlib.sha256((ended.output / "model.safetensors").read_bytes()).hexdigest()


def test_a_rerun_gives_the_same_weights_bit_for_bit_and_another_seed_does_not(
    trained: Ended, started: dict[str, Future[Ended]]
) -> None:
    assert record(trained)["device"] == "cpu"
    assert sha256(started["again"].result()) == sha256(trained)
    assert sha256(started["other"].result()) != sha256(trained)


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "reason"),
    [("raises", "IndexError: Target 10 is out of bounds"), ("diverges", "training diverged: in epoch 1 train_loss is")],
)
def test_a_training_that_fails_is_a_failed_run_that_says_why(
    desk: Desk, started: dict[str, Future[Ended]], case: str, reason: str
) -> None:
    ended = started[case].result()
    assert ended.status != 0
    assert reason in ended.told
    assert not (ended.output / "run.json").exists()
    run, _ = desk.runs(ended)
    assert run.status == "FAILED"
    assert run.ended is not None
    assert reason in run.tags["torchrelay.error"]


def test_a_diverged_training_stops_at_once_and_says_what_to_try(desk: Desk, started: dict[str, Future[Ended]]) -> None:
    ended = started["diverges"].result()
    assert re.search(r"^✗ training diverged.*\n  expected: a finite loss\n  next:     try a smaller", ended.told, re.M)
    assert "Traceback" not in ended.told
    [loss] = desk.history(desk.runs(ended)[0], "train_loss")
    assert not math.isfinite(float(loss["value"]))


# --- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion_mnist", "tiny_moons"])
def test_a_search_keeps_every_trial_as_a_child_run_and_reports_the_best(
    desk: Desk, moons: Desk, started: dict[str, Future[Ended]], name: str
) -> None:
    here = {"fashion_mnist": desk, "tiny_moons": moons}[name]
    ended = started[name].result()
    assert ended.status == 0, ended.told
    parent, trials = here.runs(ended)
    assert [run.status for run in (parent, *trials)] == ["FINISHED"] * 3
    best = json.loads((ended.output / "best.json").read_text())
    assert json.loads(here.tracking.download_artifact(parent.run_id, "best.json")) == best
    winner = max(trials, key=lambda run: run.metrics["val_accuracy"])
    assert parent.metrics["best_val_accuracy"] == winner.metrics["val_accuracy"]
    assert {key: str(value) for key, value in best.items()}.items() <= winner.parameters.items()
    [line] = re.findall(r"^best validation accuracy (\S+) of 2 trials: (.+)$", ended.told, re.M)
    assert line == (f"{winner.metrics['val_accuracy']:.4f}", " ".join(f"-P {key}={best[key]}" for key in best))
    taken = yaml.safe_load((here.component / "MLproject").read_text())["entry_points"]["main"]["parameters"]
    assert {*best} <= {*taken}

"""The training recipe, from top to bottom: read, fit, judge, write, log. `mlflow run` calls it.

It leaves model.safetensors, golden.json and evaluation.json in the output folder and, when everything else is in
place, run.json. On one machine type the same parameters, data and thread count give the same weights, bit for bit.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Without these, MLflow draws progress bars into the log and asks git questions that `mlflow run` has answered.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
import numpy as np
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.models import ModelSignature
from mlflow.types import DataType, Schema, TensorSpec
from mlflow.types.schema import Array, ColSpec
from torch import Tensor, nn

from handler import Predictor
from model import FEATURES, LABELS, Network, save

HERE = Path(__file__).resolve().parent
Metrics = dict[str, float]
Part = tuple[Tensor, Tensor]

# Where `extract` has the data from, in MLflow's terms. REPLACE THIS together with it, for example by
# ("http", {"url": "https://example.org/points.csv"}) or ("local", {"uri": "/srv/points"}).
SOURCE = ("code", {"tags": {"mlflow.source.type": "LOCAL", "mlflow.source.name": "data.py"}})


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters."""

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.01
    hidden: int = 16
    seed: int = 1


class DivergedError(Exception):
    """The loss is no number any more, and no later step would make it one."""


def main() -> None:
    """Train, write the files of the hand-over and log everything to the run that `mlflow run` opened."""
    given = read_arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "run.json").unlink(missing_ok=True)
    recipe = Recipe(**{field.name: getattr(given, field.name) for field in fields(Recipe)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = (read_part(given.data / f"{name}.npz", device) for name in ("train", "val"))
    environment = running_environment()
    with tracked_run() as run:
        log_start(run, asdict(recipe) | facts(device), environment)
        log_data(run, train, given.data_hash)
        network, last = fit(recipe, train, val, log_epoch)
        mlflow.flush_async_logging()
        save(network, given.output / "model.safetensors")
        # What is judged is what was written, by the code that will serve it.
        predictor = Predictor(given.output)
        evaluation = evaluate(predictor, given.data / "test.npz")
        golden = record_golden(predictor, given.data / "test.npz", given.golden_samples, given.golden_tolerance)
        final = last | {"accuracy": sum(evaluation["scores"]) / len(evaluation["scores"])}
        mlflow.log_metrics({"accuracy": final["accuracy"]}, step=recipe.epochs)
        for name, content in (("evaluation.json", evaluation), ("golden.json", golden)):
            write_json(given.output / name, content)
            mlflow.log_artifact(str(given.output / name))
        model_uri = log_model(given.output / "model.safetensors", environment["variant"])
        parameters = mlflow.get_run(run.info.run_id).data.params
        record = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "model_uri": model_uri}
        record |= {"metrics": final, "parameters": dict(parameters), "device": str(device)}
        write_json(given.output / "run.json", record)
    print(f"train: test accuracy {final['accuracy']:.4f}, run {run.info.run_id}, files in {given.output}")


def read_arguments() -> argparse.Namespace:
    """The flags of the MLproject's `main` entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npz, val.npz and test.npz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-hash", default="unknown", help="DVC's hash of the data folder")
    parser.add_argument("--golden-samples", type=int, default=16)
    parser.add_argument("--golden-tolerance", type=float, default=1e-4)
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args()


def read_part(path: Path, device: torch.device) -> Part:
    """Points float32 (N, 2) and labels int64 (N,) of one of the files that `prepare` wrote."""
    with np.load(path) as arrays:
        points, labels = torch.from_numpy(arrays["instances"]), torch.from_numpy(arrays["labels"])
    return points.to(device), labels.to(device)


# --- fit -------------------------------------------------------------------------------------------------------------


def fit(recipe: Recipe, train: Part, val: Part, report: Callable[[int, Metrics], None]) -> tuple[Network, Metrics]:
    """Train with Adam; `report` gets every epoch's metrics, counted from 1. Returns the last ones."""
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    network = Network(recipe.hidden).to(train[0].device)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    metrics: Metrics = {}
    for epoch in range(1, recipe.epochs + 1):
        metrics = one_epoch(recipe, network, optimizer, train) | judge(network, val)
        print(f"epoch {epoch}/{recipe.epochs}: validation accuracy {metrics['val_accuracy']:.4f}", flush=True)
        report(epoch, metrics)
        require_finite(epoch, metrics)
    return network.eval(), metrics


def require_finite(epoch: int, metrics: Metrics) -> None:
    """Give up on a network whose loss is no number: it would say the same of every point."""
    lost = [name for name in ("train_loss", "val_loss") if not math.isfinite(metrics[name])]
    if lost:
        found = f"training diverged: in epoch {epoch} {lost[0]} is {metrics[lost[0]]}"
        raise DivergedError(f"{found}\n  expected: a finite loss\n  next:     try a smaller learning_rate")


def one_epoch(recipe: Recipe, network: Network, optimizer: torch.optim.Optimizer, train: Part) -> Metrics:
    """One pass over the training points in a new order."""
    network.train()
    points, labels = train
    losses = []
    for rows in torch.randperm(len(labels)).to(labels.device).split(recipe.batch_size):
        loss = nn.functional.cross_entropy(network(points[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"train_loss": torch.stack(losses).mean().item()}


@torch.inference_mode()
def judge(network: Network, val: Part) -> Metrics:
    """Loss and accuracy on points that training does not see."""
    network.eval()
    points, labels = val
    logits = network(points)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"val_loss": nn.functional.cross_entropy(logits, labels).item(), "val_accuracy": accuracy}


# --- what the other legs read ----------------------------------------------------------------------------------------


def evaluate(predictor: Predictor, path: Path) -> dict[str, Any]:
    """One score per sample of the frozen test set, in its order: 1 for a hit, 0 for a miss; and each sample's class."""
    with np.load(path) as arrays:
        instances, labels = arrays["instances"].tolist(), arrays["labels"].tolist()
    answers = predictor.predict(predictor.encode(instances))
    return {
        "test_set": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scores": [float(answer["class"] == label) for answer, label in zip(answers, labels, strict=True)],
        "slices": {"class": [LABELS[label] for label in labels]},
    }


def record_golden(predictor: Predictor, path: Path, samples: int, tolerance: float) -> dict[str, Any]:
    """The first test points, and what the predictor says of them now."""
    with np.load(path) as arrays:
        instances = arrays["instances"][:samples].tolist()
    predictions = predictor.predict(predictor.encode(instances))
    return {"instances": instances, "predictions": predictions, "tolerance": tolerance}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside and rename: a reader sees a whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    aside.replace(path)


# --- what MLflow is told ---------------------------------------------------------------------------------------------


@contextmanager
def tracked_run() -> Iterator[mlflow.ActiveRun]:
    """The run that `mlflow run` opened (MLFLOW_RUN_ID), or a new one; failed, and why, if an exception leaves it."""
    with mlflow.start_run() as run:
        try:
            yield run
        except BaseException as error:
            mlflow.set_tag("torchrelay.error", f"{type(error).__name__}: {error}"[:1000])
            raise


def running_environment() -> dict[str, str]:
    """What Torchrelay wrote beside the interpreter when the environment was whole; one made by hand has its path."""
    described = Path(sys.prefix) / "environment.json"
    if described.is_file():
        found: dict[str, str] = json.loads(described.read_text(encoding="utf-8"))
        return found
    return {"name": sys.prefix, "variant": "cuda" if torch.version.cuda else "cpu"}


def log_start(run: mlflow.ActiveRun, parameters: dict[str, Any], environment: dict[str, str]) -> None:
    """What decides the weights beside the data: parameters that `mlflow run` did not log already, the environment."""
    mlflow.log_params({name: value for name, value in parameters.items() if name not in run.data.params})
    # The names that a registered version has for the same.
    names = {"name": "torchrelay.environment", "lock_sha256": "torchrelay.environment.lock"}
    mlflow.set_tags({tag: environment[name] for name, tag in names.items() if name in environment})


def facts(device: torch.device) -> dict[str, str]:
    """What a rerun must have in common with this run to give the same weights."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def log_data(run: mlflow.ActiveRun, train: Part, data_hash: str) -> None:
    """The training data under DVC's hash. `mlflow.data.from_numpy` would want scipy, only to name the element types."""
    points, labels = train
    tensors = {
        "features": Schema([TensorSpec(np.dtype(np.float32), (-1, FEATURES))]).to_json(),
        "targets": Schema([TensorSpec(np.dtype(np.int64), (-1,))]).to_json(),
    }
    dataset = Dataset(
        name=HERE.name,
        digest=data_hash[:36],
        source_type=SOURCE[0],
        source=json.dumps(SOURCE[1]),
        schema=json.dumps({"mlflow_tensorspec": tensors}),
        profile=json.dumps({"features_shape": list(points.shape), "targets_shape": list(labels.shape)}),
    )
    context = [InputTag("mlflow.data.context", "training")]
    mlflow.MlflowClient().log_inputs(run.info.run_id, [DatasetInput(dataset, context)])


def log_epoch(epoch: int, metrics: Metrics) -> None:
    """One request for an epoch, sent while the next one computes."""
    mlflow.log_metrics(metrics, step=epoch, synchronous=False)


def log_model(weights: Path, variant: str) -> str:
    """Log code and weights, with the environment's lock as given requirements; returns the model's URI."""
    inputs = Schema([TensorSpec(np.dtype(np.float32), (-1, FEATURES))])
    probabilities = ColSpec(Array(DataType.double), "probabilities")
    outputs = Schema([ColSpec(DataType.long, "class"), ColSpec(DataType.string, "label"), probabilities])
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(HERE / "served.py"),
        code_paths=[str(HERE / "model.py"), str(HERE / "handler.py")],
        artifacts={"weights": str(weights)},
        pip_requirements=pinned_requirements(variant),
        signature=ModelSignature(inputs=inputs, outputs=outputs),
        input_example=np.zeros((2, FEATURES), np.float32),
    )
    return str(info.model_uri)


def pinned_requirements(variant: str) -> list[str]:
    """Every package of the variant's lock with its version, without hashes; inferring them would take seconds."""
    lock = (HERE / f"requirements.{variant}.lock").read_text(encoding="utf-8")
    torch_pin = (HERE / "requirements.torch").read_text(encoding="utf-8")
    return [line.split("\\")[0].strip() for line in (lock + torch_pin).splitlines() if re.match(r"[A-Za-z0-9]", line)]


if __name__ == "__main__":
    try:
        main()
    except DivergedError as error:
        sys.exit(f"✗ {error}")

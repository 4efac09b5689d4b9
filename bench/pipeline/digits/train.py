"""The training recipe of the benchmark's digits component: read, fit, judge, write, log. `mlflow run` calls it.

It is the same work as `peers/bash/train.py` does: two epochs, one metric each, the test metric, the model logged.
"""

import argparse
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As fashion_mnist has them: no progress bars in the log, no second look at what is installed.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")

import mlflow
import numpy as np
import torch
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor, nn

from handler import Predictor
from model import LABELS, SIDE, Network, save

HERE = Path(__file__).resolve().parent
RECIPE = ("epochs", "batch_size", "learning_rate", "hidden", "seed")
Part = tuple[Tensor, Tensor]
Metrics = dict[str, float]


def main() -> None:
    """Train, write the files of the hand-over and log everything to the run that `mlflow run` opened."""
    given = read_arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    train, val = (read_part(given.data / f"{name}.npz") for name in ("train", "val"))
    with mlflow.start_run() as run:
        mlflow.log_param("torch", torch.__version__)
        network = fit(given, train, val, lambda epoch, metrics: mlflow.log_metrics(metrics, step=epoch))
        save(network, given.output / "model.safetensors")
        predictor = Predictor(given.output)
        evaluation = evaluate(predictor, given.data / "test.npz")
        golden = record_golden(predictor, given.data / "test.npz", given.golden_samples, given.golden_tolerance)
        final = {"accuracy": sum(evaluation["scores"]) / len(evaluation["scores"])}
        mlflow.log_metrics(final, step=given.epochs)
        write_json(given.output / "evaluation.json", evaluation)
        write_json(given.output / "golden.json", golden)
        model_uri = log_model(given.output / "model.safetensors")
        record = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "model_uri": model_uri}
        parameters = {name: getattr(given, name) for name in RECIPE}
        write_json(given.output / "run.json", record | {"metrics": final, "parameters": parameters, "device": "cpu"})
    print(f"train: test accuracy {final['accuracy']:.4f}, run {run.info.run_id}")


def read_arguments() -> argparse.Namespace:
    """The flags of the MLproject's `main` entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npz, val.npz and test.npz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data-hash", default="unknown", help="DVC's hash of the data folder")
    parser.add_argument("--golden-samples", type=int, default=16)
    parser.add_argument("--golden-tolerance", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def read_part(path: Path) -> Part:
    """Images uint8 (N, 8, 8) and labels int64 (N,) of one of the files that `prepare` wrote."""
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["instances"]), torch.from_numpy(arrays["labels"]).long()


def fit(given: argparse.Namespace, train: Part, val: Part, report: Callable[[int, Metrics], None]) -> Network:
    """Train with Adam; `report` gets every epoch's metrics, counted from 1."""
    torch.manual_seed(given.seed)
    network = Network(given.hidden)
    optimizer = torch.optim.Adam(network.parameters(), lr=given.learning_rate)
    images, labels = train
    for epoch in range(1, given.epochs + 1):
        losses = []
        for rows in torch.randperm(len(labels)).split(given.batch_size):
            loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        metrics = {"train_loss": sum(losses) / len(losses), "val_accuracy": accuracy(network, val)}
        print(f"epoch {epoch}/{given.epochs}: validation accuracy {metrics['val_accuracy']:.4f}", flush=True)
        report(epoch, metrics)
    return network


@torch.inference_mode()
def accuracy(network: Network, part: Part) -> float:
    """The share of images whose class the network finds."""
    images, labels = part
    return (network(images).argmax(1) == labels).float().mean().item()


def evaluate(predictor: Predictor, path: Path) -> dict[str, Any]:
    """One score per sample of the frozen test set, in its order, and each sample's class."""
    with np.load(path) as arrays:
        instances, labels = arrays["instances"].tolist(), arrays["labels"].tolist()
    answers = predictor.predict(predictor.encode(instances))
    return {
        "test_set": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scores": [float(answer["class"] == label) for answer, label in zip(answers, labels, strict=True)],
        "slices": {"class": [LABELS[label] for label in labels]},
    }


def record_golden(predictor: Predictor, path: Path, samples: int, tolerance: float) -> dict[str, Any]:
    """The first test images, and what the predictor says of them now."""
    with np.load(path) as arrays:
        instances = arrays["instances"][:samples].tolist()
    predictions = predictor.predict(predictor.encode(instances))
    return {"instances": instances, "predictions": predictions, "tolerance": tolerance}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside and rename: a reader sees a whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    aside.replace(path)


def log_model(weights: Path) -> str:
    """Log code and weights, with the environment's lock as given requirements; the model's URI."""
    images = TensorSpec(np.dtype(np.uint8), (-1, SIDE, SIDE))
    with warnings.catch_warnings():
        # MLflow has no type hint for an array and asks for one all the same.
        warnings.filterwarnings("ignore", message=".*Add type hints to the `predict` method")
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(HERE / "served.py"),
            code_paths=[str(HERE / "model.py"), str(HERE / "handler.py")],
            artifacts={"weights": str(weights)},
            pip_requirements=pinned_requirements(),
            signature=ModelSignature(inputs=Schema([images])),
        )
    return str(info.model_uri)


def pinned_requirements() -> list[str]:
    """What the model's code imports, as the locks pin it; MLflow compares each with what is installed."""
    files = (HERE / "requirements.cpu.lock", HERE / "requirements.torch")
    locks = "".join(file.read_text(encoding="utf-8") for file in files)
    return re.findall(r"^(?:mlflow-skinny|torch|numpy|safetensors)==[^ \\\n]+", locks, re.M)


if __name__ == "__main__":
    main()

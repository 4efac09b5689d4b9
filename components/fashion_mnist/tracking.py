"""What training tells MLflow: parameters, data, metrics per epoch, plots, and the model as code and weights."""

import json
import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

# Without these, MLflow draws progress bars into the log, and compares the lock with what is installed twice.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")

import mlflow
import numpy as np
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.models import ModelSignature
from mlflow.types import DataType, Schema, TensorSpec
from mlflow.types.schema import Array, ColSpec

from model import SIDE

if TYPE_CHECKING:
    from train import Metrics, Part

HERE = Path(__file__).resolve().parent
LONGEST_TAG = 1000


class TrackedRun:
    """The run that `mlflow run` opened (MLFLOW_RUN_ID), or a new one; failed if an exception leaves it."""

    def __enter__(self) -> "TrackedRun":
        self.environment = running_environment()
        self.run = mlflow.start_run()
        self.run_id = self.run.info.run_id
        self.model_uri = ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            mlflow.set_tag("torchrelay.error", f"{kind.__name__}: {error}"[:LONGEST_TAG])
        mlflow.end_run("FAILED" if kind else "FINISHED")

    def log_start(self, parameters: dict[str, Any], train: "Part", prepared: Path, data_hash: str) -> None:
        """What decides the weights: parameters that `mlflow run` did not log already, the environment, the data."""
        logged = self.run.data.params
        mlflow.log_params({name: value for name, value in parameters.items() if name not in logged})
        # The names that a registered version has for the same.
        names = {"name": "torchrelay.environment", "lock_sha256": "torchrelay.environment.lock"}
        mlflow.set_tags({tag: self.environment[name] for name, tag in names.items() if name in self.environment})
        mlflow.MlflowClient().log_inputs(self.run_id, [describe_data(train, prepared, data_hash)])

    def log_epoch(self, epoch: int, metrics: "Metrics") -> None:
        """One request for an epoch, sent while the next one computes."""
        mlflow.log_metrics(metrics, step=epoch, synchronous=False)

    def log_end(self, output: Path, final: "Metrics", history: "list[Metrics]", confusion: Any) -> None:
        """The final metrics, the files, the plots and the model."""
        from plots import draw_confusion, draw_curves

        mlflow.flush_async_logging()
        mlflow.log_metrics({"accuracy": final["accuracy"]}, step=len(history))
        plots = output / "plots"
        plots.mkdir(exist_ok=True)
        draw_curves(history, plots / "curves.png")
        draw_confusion(confusion, plots / "confusion.png")
        mlflow.log_artifacts(str(plots), "plots")
        mlflow.log_artifact(str(output / "golden.json"))
        mlflow.log_artifact(str(output / "evaluation.json"))
        self.model_uri = log_model(output / "model.safetensors", self.environment["variant"])

    def record(self, final: "Metrics", device: str) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "run_id": self.run_id,
            "experiment_id": self.run.info.experiment_id,
            "model_uri": self.model_uri,
            "metrics": final,
            "parameters": dict(mlflow.get_run(self.run_id).data.params),
            "device": device,
        }


def running_environment() -> dict[str, str]:
    """What Torchrelay wrote beside the interpreter when the environment was whole; one made by hand has its path."""
    described = Path(sys.prefix) / "environment.json"
    if described.is_file():
        found: dict[str, str] = json.loads(described.read_text(encoding="utf-8"))
        return found
    return {"name": sys.prefix, "variant": "cuda" if torch.version.cuda else "cpu"}


def describe_data(train: "Part", prepared: Path, data_hash: str) -> DatasetInput:
    """The training data under DVC's hash. `mlflow.data.from_numpy` would want scipy, only to name the element types."""
    tensors = {
        "features": Schema([TensorSpec(np.dtype(np.uint8), (-1, SIDE, SIDE))]).to_json(),
        "targets": Schema([TensorSpec(np.dtype(np.int64), (-1,))]).to_json(),
    }
    kind, source = describe_source(prepared)
    dataset = Dataset(
        name="fashion_mnist",
        digest=data_hash[:36],
        source_type=kind,
        source=json.dumps(source),
        schema=json.dumps({"mlflow_tensorspec": tensors}),
        profile=json.dumps({"features_shape": list(train.images.shape), "targets_shape": list(train.labels.shape)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def describe_source(prepared: Path) -> tuple[str, dict[str, str]]:
    """Where `extract` had the files from, in MLflow's terms; the folder itself where nothing says so of these files."""
    prepared = prepared.absolute()
    kept, accepted = (read_json(prepared.parent / name) for name in ("source.json", "validated/validation.json"))
    known = "files" in kept and kept["files"] == accepted.get("files")
    source = str(kept["source"] if known else prepared)
    return ("http", {"url": source}) if "://" in source else ("local", {"uri": source})


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing where there is none."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def log_model(weights: Path, variant: str) -> str:
    """Log code and weights, with the environment's lock as given requirements; the model's URI."""
    example = np.zeros((2, SIDE, SIDE), np.uint8)
    prediction: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.long, "class"),
        ColSpec(DataType.string, "label"),
        ColSpec(Array(DataType.double), "probabilities"),
    ]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, SIDE, SIDE))]), outputs=Schema(prediction)
    )
    info = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(HERE / "served.py"),
        code_paths=[str(HERE / "model.py"), str(HERE / "handler.py")],
        artifacts={"weights": str(weights)},
        pip_requirements=pinned_requirements(variant),
        signature=signature,
        input_example=example,
    )
    return str(info.model_uri)


def pinned_requirements(variant: str) -> list[str]:
    """Every package of the variant's lock with its version, without hashes; inferring them would take seconds."""
    lock = (HERE / f"requirements.{variant}.lock").read_text(encoding="utf-8")
    torch_pin = (HERE / "requirements.torch").read_text(encoding="utf-8")
    return [line.split("\\")[0].strip() for line in (lock + torch_pin).splitlines() if re.match(r"[A-Za-z0-9]", line)]

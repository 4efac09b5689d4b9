"""What training tells MLflow: parameters, data, metrics per epoch, plots, and the model as code and weights."""

import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

# Without these, MLflow draws progress bars into the log, and compares the lock with what is installed twice.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")

import mlflow
import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.models import ModelSignature
from mlflow.types import DataType, Schema, TensorSpec
from mlflow.types.schema import Array, ColSpec

from model import SIDE

if TYPE_CHECKING:
    from train import Metrics, Part

HERE = Path(__file__).resolve().parent
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


class TrackedRun:
    """The run that `mlflow run` opened (MLFLOW_RUN_ID), or a new one; failed if an exception leaves it."""

    def __enter__(self) -> "TrackedRun":
        self.run = mlflow.start_run()
        self.run_id = self.run.info.run_id
        self.model_uri = ""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mlflow.end_run("FAILED" if kind else "FINISHED")

    def log_start(self, facts: dict[str, str], train: "Part", data_hash: str) -> None:
        """The environment's facts, and the training data under DVC's hash."""
        logged = self.run.data.params
        mlflow.log_params({name: value for name, value in facts.items() if name not in logged})
        mlflow.MlflowClient().log_inputs(self.run_id, [describe_data(train, data_hash)])

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
        self.model_uri = log_model(output / "model.safetensors")

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


def describe_data(train: "Part", data_hash: str) -> DatasetInput:
    """The training data under DVC's hash. `mlflow.data.from_numpy` would want scipy, only to name the element types."""
    tensors = {
        "features": Schema([TensorSpec(np.dtype(np.uint8), (-1, SIDE, SIDE))]).to_json(),
        "targets": Schema([TensorSpec(np.dtype(np.int64), (-1,))]).to_json(),
    }
    dataset = Dataset(
        name="fashion_mnist",
        digest=data_hash[:36],
        source_type="http",
        source=json.dumps({"url": URL}),
        schema=json.dumps({"mlflow_tensorspec": tensors}),
        profile=json.dumps({"features_shape": list(train.images.shape), "targets_shape": list(train.labels.shape)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def log_model(weights: Path) -> str:
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
        pip_requirements=pinned_requirements(),
        signature=signature,
        input_example=example,
    )
    return str(info.model_uri)


def pinned_requirements() -> list[str]:
    """Every package of the CPU lock with its version, without hashes; inferring them would take seconds."""
    lock = (HERE / "requirements.cpu.lock").read_text(encoding="utf-8")
    torch = (HERE / "requirements.torch").read_text(encoding="utf-8")
    return [line.split("\\")[0].strip() for line in (lock + torch).splitlines() if re.match(r"[A-Za-z0-9]", line)]

"""The training recipe of fashion_mnist, from top to bottom: read, fit, judge, write, log. `mlflow run` calls it.

It leaves model.safetensors, golden.json, evaluation.json and plots in the output folder and, when everything
else is in place, run.json. On one machine type the same parameters, data and thread count give the same
weights, bit for bit.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from handler import Predictor
from model import LABELS, SIDE, Network, save

Metrics = dict[str, float]
Report = Callable[[int, Metrics], None]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters. `shift` is the largest random shift in pixels."""

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 0.01
    weight_decay: float = 0.01
    width: int = 24
    dropout: float = 0.0
    shift: int = 0
    seed: int = 1


@dataclass(frozen=True)
class Part:
    """Images uint8 (N, 28, 28) and labels int64 (N,) on the device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Learner:
    """A network and what changes its weights."""

    network: Network
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


class DivergedError(Exception):
    """The loss is no number any more, and no later step would make it one."""


def main() -> None:
    """Train, write the files of the hand-over and log everything to the run that `mlflow run` opened."""
    given = read_arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "run.json").unlink(missing_ok=True)
    recipe = Recipe(**{field.name: getattr(given, field.name) for field in fields(Recipe)})
    device = choose_device()
    train, val = (read_part(given.data / f"{name}.npz", device) for name in ("train", "val"))

    from tracking import TrackedRun

    with TrackedRun() as run:
        run.log_start(asdict(recipe) | facts(device), train, given.data, given.data_hash)
        network, history = fit(recipe, train, val, run.log_epoch)
        save(network, given.output / "model.safetensors")
        predictor = Predictor(given.output)
        evaluation, confusion = evaluate(predictor, given.data / "test.npz")
        write_json(given.output / "evaluation.json", evaluation)
        golden = record_golden(predictor, given.data / "test.npz", given.golden_samples, given.golden_tolerance)
        write_json(given.output / "golden.json", golden)
        final = history[-1] | {"accuracy": sum(evaluation["scores"]) / len(evaluation["scores"])}
        run.log_end(given.output, final, history, confusion)
        write_json(given.output / "run.json", run.record(final, str(device)))
    say(f"test accuracy {final['accuracy']:.4f}, run {run.run_id}, files in {given.output}")


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


def choose_device() -> torch.device:
    """The GPU where there is one; else every core that this process may use."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    return torch.device("cpu")


def facts(device: torch.device) -> dict[str, str]:
    """What a rerun must have in common with this run to give the same weights."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def read_part(path: Path, device: torch.device) -> Part:
    """One of the files that `prepare` wrote."""
    if not path.is_file():
        sys.exit(f"✗ {path} does not exist\n  expected: the prepared data\n  next:     dvc repro prepare@fashion_mnist")
    with np.load(path) as arrays:
        images, labels = torch.from_numpy(arrays["instances"]), torch.from_numpy(arrays["labels"])
    return Part(images.to(device), labels.long().to(device))


# --- fit -------------------------------------------------------------------------------------------------------------


def fit(recipe: Recipe, train: Part, val: Part, report: Report) -> tuple[Network, list[Metrics]]:
    """Train with AdamW on a one-cycle schedule; `report` gets every epoch's metrics, counted from 1."""
    device = train.images.device
    torch.manual_seed(recipe.seed)
    # Bit for bit is promised for the CPU; on a GPU an operation without a deterministic form only warns.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    draw = torch.Generator().manual_seed(recipe.seed)
    network = Network(recipe.width, recipe.dropout).to(device)
    steps = len(train.labels) // min(recipe.batch_size, len(train.labels))
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / (recipe.epochs * steps)))
    learner = Learner(network, optimizer, schedule)
    history: list[Metrics] = []
    for epoch in range(1, recipe.epochs + 1):
        began = time.monotonic()
        metrics = one_epoch(recipe, learner, train, draw) | judge(network, val)
        metrics |= {"learning_rate": float(schedule.get_last_lr()[0]), "epoch_seconds": time.monotonic() - began}
        history.append(metrics)
        say(
            f"epoch {epoch}/{recipe.epochs}: loss {metrics['train_loss']:.4f}, validation accuracy"
            f" {metrics['val_accuracy']:.4f}, {metrics['epoch_seconds']:.1f} s"
        )
        report(epoch, metrics)
        require_finite(epoch, metrics)
    return network.eval(), history


def require_finite(epoch: int, metrics: Metrics) -> None:
    """Give up on a network whose loss is no number: it would say the same of every image."""
    lost = [name for name in ("train_loss", "val_loss") if not math.isfinite(metrics[name])]
    if lost:
        found = f"training diverged: in epoch {epoch} {lost[0]} is {metrics[lost[0]]}"
        raise DivergedError(f"{found}\n  expected: a finite loss\n  next:     try a smaller learning_rate")


def one_cycle(done: float) -> float:
    """The share of the learning rate when this share of the steps is done: up for a quarter, then down as a cosine."""
    rise = 0.25
    return max(done / rise, 0.04) if done < rise else (1 + math.cos(math.pi * (done - rise) / (1 - rise))) / 2


def one_epoch(recipe: Recipe, learner: Learner, train: Part, draw: torch.Generator) -> Metrics:
    """One pass over the training images in a new order; an incomplete last batch waits for the next pass."""
    learner.network.train()
    size = min(recipe.batch_size, len(train.labels))
    rows = torch.randperm(len(train.labels), generator=draw)[: len(train.labels) // size * size]
    losses, hits = [], []
    for batch in rows.to(train.labels.device).view(-1, size):
        labels = train.labels[batch]
        logits = learner.network(augment(train.images[batch], recipe.shift, draw))
        loss = nn.functional.cross_entropy(logits, labels)
        learner.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learner.optimizer.step()
        learner.schedule.step()
        losses.append(loss.detach())
        hits.append((logits.detach().argmax(1) == labels).float().mean())
    return {"train_loss": torch.stack(losses).mean().item(), "train_accuracy": torch.stack(hits).mean().item()}


def augment(images: Tensor, shift: int, draw: torch.Generator) -> Tensor:
    """Mirror half of the images and move each by up to `shift` pixels, filling with black."""
    count, device = len(images), images.device
    straight = torch.arange(SIDE)
    mirrored = torch.rand(count, 1, generator=draw) < 0.5
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=draw)
    rows = (straight + offsets[0]).to(device)
    columns = (torch.where(mirrored, SIDE - 1 - straight, straight) + offsets[1]).to(device)
    padded = nn.functional.pad(images, (shift,) * 4)
    return padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.inference_mode()
def judge(network: Network, val: Part) -> Metrics:
    """Loss and accuracy on images that training does not see."""
    network.eval()
    logits = torch.cat([network(images) for images in torch.split(val.images, 500)])
    accuracy = (logits.argmax(1) == val.labels).float().mean().item()
    return {"val_loss": nn.functional.cross_entropy(logits, val.labels).item(), "val_accuracy": accuracy}


# --- what the other legs read ----------------------------------------------------------------------------------------


def evaluate(predictor: Predictor, path: Path) -> tuple[dict[str, Any], Any]:
    """The frozen test set through the code that will serve: scores per image, and the confusion matrix."""
    with np.load(path) as arrays:
        images, labels = torch.from_numpy(arrays["instances"]), arrays["labels"]
    classes = np.array([answer["class"] for batch in torch.split(images, 256) for answer in predictor.predict(batch)])
    confusion = np.zeros((len(LABELS), len(LABELS)), int)
    np.add.at(confusion, (labels, classes), 1)
    evaluation = {
        "test_set": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scores": (classes == labels).astype(float).tolist(),
        "slices": {"class": [LABELS[label] for label in labels]},
    }
    return evaluation, confusion


def record_golden(predictor: Predictor, path: Path, samples: int, tolerance: float) -> dict[str, Any]:
    """Test images, class by class in turn, and what the predictor says of them now."""
    with np.load(path) as arrays:
        images, labels = arrays["instances"], arrays["labels"]
    turns = np.array([np.count_nonzero(labels[:row] == labels[row]) for row in range(len(labels))])
    chosen = np.lexsort((labels, turns))[:samples]
    instances = images[chosen].tolist()
    return {
        "instances": instances,
        "predictions": predictor.predict(predictor.encode(instances)),
        "tolerance": tolerance,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside and rename: a reader sees a whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    aside.replace(path)


def say(line: str) -> None:
    """Print one line of progress at once."""
    print(line, flush=True)


if __name__ == "__main__":
    # cuBLAS is only deterministic with a workspace of fixed size, set before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        main()
    except DivergedError as error:
        sys.exit(f"✗ {error}")

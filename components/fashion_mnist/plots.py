"""The two pictures of a training run. `Figure` alone draws to a file; pyplot would take a second more to import."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from model import LABELS


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss and accuracy by epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, label in (("train", "training"), ("val", "validation")):
            axes.plot(epochs, [metrics[f"{part}_{name}"] for metrics in history], marker="o", label=label)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=90)


def draw_confusion(confusion: Any, path: Path) -> None:
    """How many test images of each class (rows) were taken for which (columns)."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(confusion, cmap="Blues")
    axes.set(title="test images", xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(LABELS)), LABELS, rotation=45, ha="right")
    axes.set_yticks(range(len(LABELS)), LABELS)
    for row, counts in enumerate(confusion):
        for column, count in enumerate(counts):
            shade = "white" if count > confusion.max() / 2 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=shade)
    figure.savefig(path, dpi=90)

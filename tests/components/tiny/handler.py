"""Serves the tiny model; a few magic numbers make it fail in the ways that real predictors fail."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model import Tiny

ENCODE_BUG, PREDICT_BUG, NOT_JSON, IN_PLACE, LEAK = 1001.0, 1002.0, 1003.0, 1004.0, 1005.0


class Predictor:
    """Three numbers in, a class and its probabilities out."""

    def __init__(self, folder: Path) -> None:
        self.model = Tiny().eval()
        self.model.load_state_dict(load_file(folder / "model.safetensors"))

    def decode(self, body: bytes, content_type: str) -> list[Any]:
        """One instance from a line of comma-separated numbers."""
        if content_type != "text/csv":
            raise ValueError(f"content type {content_type}; expected application/json or text/csv")
        return [[float(number) for number in body.split(b",")]]

    def encode(self, instances: list[Any]) -> torch.Tensor:
        """(N, 3) floats."""
        for index, instance in enumerate(instances):
            if not isinstance(instance, list) or len(instance) != 3:
                raise ValueError(f"instance {index} is not a list of 3 numbers")
            if instance[0] == ENCODE_BUG:
                raise KeyError(instance[0])
        return torch.tensor(instances, dtype=torch.float32)

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """One prediction per row."""
        if (batch[:, 0] == PREDICT_BUG).any():
            raise RuntimeError("a row that breaks the forward pass")
        batch[batch[:, 0] == IN_PLACE] = 0.0
        if (batch[:, 0] == LEAK).any():
            self.kept = b"x" * 2**30
        rows = self.model(batch).softmax(1).tolist()
        answers = [
            {"class": best, "label": "ab"[best], "probabilities": row, "value": row[0]}
            for best, row in ((row.index(max(row)), row) for row in rows)
        ]
        for answer in (answers[index] for index in (batch[:, 0] == NOT_JSON).nonzero().flatten().tolist()):
            answer["probabilities"] = [float("nan")]
        return answers

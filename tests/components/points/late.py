"""Predictors that are good wherever they are tried out, and turn bad where they serve."""

import os
from pathlib import Path
from typing import Any

import torch
from good import Predictor as Good

SERVED = "TORCHRELAY_INSTANCE" in os.environ


class Late(Good):
    """Good for the first forward passes; then `spoilt` answers, of some only once the tests say so by a file."""

    good_calls, when_told = 10, False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calls = 0
        self.sign = Path(os.environ.get("TORCHRELAY_INSTANCE", os.devnull)) / "turned"

    def predict(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """What the good one answers, or `spoilt`."""
        self.calls += 1
        if SERVED and self.calls > self.good_calls and (not self.when_told or self.sign.exists()):
            return self.spoilt(batch)
        return self.answers(batch)

    def answers(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """What the good one answers."""
        return super().predict(batch)

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """What is wrong with it."""
        raise NotImplementedError

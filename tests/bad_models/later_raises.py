"""Raises on every request once it was told to."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    when_told = True

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        raise RuntimeError("no more")

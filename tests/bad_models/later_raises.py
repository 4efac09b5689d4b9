"""Raises on every request six seconds after the first ones: past its time as a shadow."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    good_s = 6.0

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        raise RuntimeError("no more")

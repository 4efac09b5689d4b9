"""Raises on one request of eight from the tenth on."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        if self.calls % 8 == 0:
            raise RuntimeError("one of eight")
        return self.answers(batch)

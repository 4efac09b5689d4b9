"""Leaves the answer to every second request out from the tenth on."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return self.answers(batch)[: self.calls % 2]

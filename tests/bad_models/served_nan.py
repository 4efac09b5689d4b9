"""Gives no numbers from the tenth request on."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{**one, "probabilities": [float("nan")] * 4} for one in self.answers(batch)]

"""Gives three probabilities of four classes from the tenth request on; the class is right."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{**one, "probabilities": one["probabilities"][:3]} for one in self.answers(batch)]

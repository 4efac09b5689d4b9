"""Gives what callers rely on under another name from the tenth request on."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{"label": one["class"], "scores": one["probabilities"]} for one in self.answers(batch)]

"""Keeps 64 MB with every request, until there is no more."""

from typing import Any, ClassVar

import torch
from late import Late


class Predictor(Late):
    kept: ClassVar[list[bytearray]] = []

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        self.kept.append(bytearray(2**26))
        return self.answers(batch)

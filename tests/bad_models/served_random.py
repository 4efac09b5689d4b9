"""Guesses from the tenth request on."""

import random
from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{**one, "class": random.randrange(4)} for one in self.answers(batch)]

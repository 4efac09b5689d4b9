"""Ends its process once it was told to, and again whenever it is loaded anew."""

import os
from typing import Any

import torch
from late import Late


class Predictor(Late):
    when_told = True

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        os._exit(3)

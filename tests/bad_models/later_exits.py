"""Ends its process six seconds after the first requests, and again whenever it is loaded anew."""

import os
from typing import Any

import torch
from late import Late


class Predictor(Late):
    good_s = 6.0

    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        os._exit(3)

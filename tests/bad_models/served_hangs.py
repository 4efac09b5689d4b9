"""Never answers from the tenth request on."""

import time
from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        time.sleep(3600)
        return []

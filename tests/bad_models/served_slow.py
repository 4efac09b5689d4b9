"""Takes 300 ms from the tenth request on; the objective is half of that."""

import time
from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        time.sleep(0.3)
        return self.answers(batch)

"""Says more than it did from the tenth request on; the class is right."""

from typing import Any

import torch
from late import Late


class Predictor(Late):
    def spoilt(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        return [{**one, "debug": repr(batch)} for one in self.answers(batch)]

"""One learned number: the least that still tells two versions apart."""

from pathlib import Path

import torch
from safetensors.torch import load_file


class Scale(torch.nn.Module):
    """Multiplies by `factor`."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * self.factor


def restored(file: Path) -> Scale:
    scale = Scale()
    scale.load_state_dict(load_file(file))
    return scale.eval()

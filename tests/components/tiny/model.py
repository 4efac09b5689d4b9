"""A linear layer from three numbers to two classes."""

import torch
from scale import SCALE


class Tiny(torch.nn.Module):
    """(N, 3) floats to (N, 2) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.linear(x * SCALE)

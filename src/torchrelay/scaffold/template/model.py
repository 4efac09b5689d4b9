"""The network, and how it is written to and read from a safetensors file.

Both training and serving import this, so what is served is what was trained.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FEATURES = 2
LABELS = ("upper", "lower")


class Network(nn.Module):
    """One hidden layer of `hidden` units."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, len(LABELS)))

    def forward(self, points: Tensor) -> Tensor:
        """Logits (N, 2) of points (N, 2)."""
        logits: Tensor = self.layers(points)
        return logits


def save(network: Network, path: Path) -> None:
    """Write the weights; the same weights give the same bytes."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}, path)


def load(path: Path) -> Network:
    """The network of the file, in evaluation mode. Its size is read from the weights, so no second file is needed."""
    state: dict[str, torch.Tensor] = load_file(path)
    network = Network(hidden=len(state["layers.0.bias"]))
    network.load_state_dict(state)
    network.eval()
    return network

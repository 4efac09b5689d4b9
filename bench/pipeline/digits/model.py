"""The network of the benchmark's digits component, and how it is written to and read from a safetensors file."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE = 8
BRIGHTEST = 16
LABELS = tuple("0123456789")


class Network(nn.Module):
    """One hidden layer of `hidden` units."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIDE * SIDE, hidden), nn.ReLU(), nn.Linear(hidden, len(LABELS)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 8, 8) with pixels from 0 to 16, of any element type."""
        logits: Tensor = self.layers(images.flatten(1).float() / BRIGHTEST)
        return logits


def save(network: Network, path: Path) -> None:
    """Write the weights; the same weights give the same bytes."""
    save_file({name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}, path)


def load(path: Path) -> Network:
    """The network of the file, in evaluation mode."""
    state: dict[str, torch.Tensor] = load_file(path)
    network = Network(hidden=len(state["layers.0.bias"]))
    network.load_state_dict(state)
    return network.eval()

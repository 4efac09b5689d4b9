"""The network of fashion_mnist, and how it is written to and read from a safetensors file.

Both training and serving import this, so what is served is what was trained.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 28
LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and standard deviation of the training pixels, 0 to 255.
PIXEL_MEAN, PIXEL_DEVIATION = 72.94, 90.02


def block(inputs: int, outputs: int) -> list[nn.Module]:
    """Convolve, normalise, rectify and halve the side."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]


class Network(nn.Module):
    """Three convolutions of `width`, 2 `width` and 4 `width` channels and one linear layer."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(*block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * width * 9, len(LABELS)))
        # oneDNN's convolutions are two to three times as fast on this layout.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 28, 28) with pixels from 0 to 255, of any element type."""
        pixels = (images.float().unsqueeze(1) - PIXEL_MEAN) / PIXEL_DEVIATION
        logits: Tensor = self.head(self.features(pixels.contiguous(memory_format=torch.channels_last)))
        return logits


def save(network: Network, path: Path) -> None:
    """Write the weights; the same weights give the same bytes."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    path.write_bytes(to_bytes(state))


def load(path: Path) -> Network:
    """The network of the file, in evaluation mode, its batch norms folded into its convolutions."""
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    network = Network(width=state["features.0.weight"].shape[0])
    network.load_state_dict(state)
    return fold(network.eval())


def fold(network: Network) -> Network:
    """Fold each batch norm into the convolution before it: the same answers, three layers less to run."""
    layers = list(network.features)
    for index, layer in enumerate(layers):
        before = layers[index - 1]
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            layers[index - 1] = fuse_conv_bn_eval(before, layer)
    network.features = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.BatchNorm2d)))
    return network

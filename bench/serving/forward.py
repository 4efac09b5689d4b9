"""The ceiling: the predictor's own `predict` on ready tensors, one thread, no server.

    python forward.py FOLDER SECONDS

Runs in the component's environment. FOLDER is an unpacked archive. Prints images/s for batches of 1 and 32 as JSON.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Measure both batch sizes and print them."""
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    predictor = importlib.import_module("handler").Predictor(folder)
    instances = json.loads((folder / "golden.json").read_bytes())["instances"]
    print(json.dumps({size: images_per_second(predictor, instances, size, seconds) for size in (1, 32)}))


def images_per_second(predictor: Any, instances: list[Any], size: int, seconds: float) -> float:
    """How many images a second go through in batches of `size`."""
    batch = predictor.encode((instances * size)[:size])
    for _ in range(20):
        predictor.predict(batch)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        predictor.predict(batch)
        count += size
    return count / (time.perf_counter() - began)


main()

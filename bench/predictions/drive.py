"""Times the handler itself: `handle()` with and without the prediction log, on TorchServe's own context, no server.

    python drive.py MODEL COMPONENT LOG ROUNDS SECONDS

Runs in the component's environment. MODEL gets what an archive of COMPONENT (a folder like components/fashion_mnist)
holds, but for weights of no training, which cost the same. Prints a JSON object a turn: the microseconds of each call.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ts.context import Context, RequestProcessor

GOLDEN = 16
MODES = ("without", "with", "with inputs")
SIZES = (1, 32)
PAUSE_S = {"back to back": 0.0, "with pauses": 0.002}


def main() -> None:
    """All modes in every round, another one first each time."""
    folder, component, log = map(Path, sys.argv[1:4])
    rounds, seconds = int(sys.argv[4]), float(sys.argv[5])
    torch.manual_seed(1)
    images = torch.randint(0, 256, (GOLDEN, 28, 28), dtype=torch.uint8).tolist()
    handler = loaded(folder, component, images)
    logs = {
        "without": None,
        "with": handler.Log(log / "with", handler.headers, False, 2**28),
        "with inputs": handler.Log(log / "inputs", handler.headers, True, 2**28),
    }
    for number in range(-1, rounds):  # the first one is for warming up
        for pace, pause in PAUSE_S.items():
            for size, mode in ((size, MODES[(number + turn) % 3]) for size in SIZES for turn in range(3)):
                handler.log = logs[mode]
                calls = turn_of(handler, images, size, seconds if number >= 0 else 0.3, pause)
                settle(logs[mode])
                if number >= 0:
                    print(json.dumps({"round": number, "pace": pace, "size": size, "mode": mode, **calls}), flush=True)
    dropped = {mode: log.refused + log.lost for mode, log in logs.items() if log}
    print(json.dumps({"dropped": dropped}), flush=True)


def loaded(folder: Path, component: Path, images: list[Any]) -> Any:
    """The base handler, initialized."""
    sys.path.insert(0, str(folder))
    import model

    network = model.Network(width=24)
    model.save(network, folder / "model.safetensors")
    (folder / "release.json").write_text(json.dumps({"component": component.name, "version": "1"}))
    (folder / "golden.json").write_text(json.dumps({"instances": images}))
    (folder / "digests" / component.name).mkdir(parents=True)
    (folder / "digests" / component.name / "1").write_text("d" * 64)
    os.environ["TORCHRELAY_INSTANCE"] = str(folder)
    handler = importlib.import_module("torchrelay_handler").TorchrelayHandler()
    handler.initialize(Context("bench", str(folder), {}, 32, -1, "0.12.0"))
    return handler


def turn_of(handler: Any, images: list[Any], size: int, seconds: float, pause: float) -> dict[str, Any]:
    """Microseconds of each call during `seconds`, and processor seconds of all threads for each call."""
    context = Context("bench", "", {}, 32, -1, "0.12.0")
    took, end, busy = [], time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end:
        rows = [{"body": {"instances": [images[index % GOLDEN]]}} for index in range(size)]
        context.request_ids = {index: f"{len(took)}-{index}" for index in range(size)}
        context.request_processor = [RequestProcessor(dict(HEADERS)) for _ in range(size)]
        began = time.perf_counter()
        handler.handle(rows, context)
        took.append(time.perf_counter() - began)
        if pause:
            time.sleep(pause)
    return {"us": [round(one * 1e6, 1) for one in took], "cpu_us": (time.process_time() - busy) / len(took) * 1e6}


HEADERS = {
    "content-type": "application/json",
    "content-length": "2400",
    "host": "127.0.0.1:18510",
    "user-agent": "bench",
    "x-torchrelay-request-id": "0f8fad5b-d9cb-469f-a165-70867728950e",
    "x-forwarded-proto": "http",
}


def settle(log: Any) -> None:
    """Let the writer finish, so that it does not work during the next turn."""
    while log and log.queue:
        time.sleep(0.05)
    time.sleep(0.05)


main()

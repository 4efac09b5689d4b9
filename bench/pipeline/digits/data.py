"""The data stages of the benchmark's digits component, which DVC runs one by one: extract, validate, prepare."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FILE = "digits.npz"
SIDE = 8
BRIGHTEST = 16
CLASSES = 10
NEXT = "bench/pipeline/run, which exports the digits anew"


class BadDataError(Exception):
    """What was found, what was expected, and what to type next."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}\n  expected: {expected}\n  next:     {NEXT}")


def extract(params: dict[str, Any], output: Path) -> None:
    """Copy the exported file."""
    output.mkdir(parents=True, exist_ok=True)
    source = Path(params["source"]) / FILE
    if not source.is_file():
        raise BadDataError(f"{source} does not exist", "the digits as a file")
    shutil.copyfile(source, output / FILE)


def validate(raw: Path, output: Path) -> None:
    """Refuse digits that break a rule; write `validation.json` if they keep all."""
    images, labels = read(raw)
    if breaches := list(broken_rules(images, labels)):
        raise BadDataError(f"{raw / FILE}: {'; '.join(breaches)}", "every rule kept")
    output.mkdir(parents=True, exist_ok=True)
    report = {"verdict": "accepted", "records": len(labels), "sha256": digest(raw / FILE)}
    (output / "validation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read(raw: Path) -> tuple[Array, Array]:
    """Images uint8 (N, 8, 8) and labels uint8 (N,)."""
    with np.load(raw / FILE) as arrays:
        return arrays["instances"], arrays["labels"]


def broken_rules(images: Array, labels: Array) -> Iterator[str]:
    """Every rule that is broken, in words."""
    if images.shape[1:] != (SIDE, SIDE) or len(images) != len(labels):
        yield f"images of shape {images.shape} for {len(labels)} labels (rule shape)"
    if images.dtype != np.uint8 or images.max() > BRIGHTEST:
        yield f"a pixel outside 0 to {BRIGHTEST} (rule byte)"
    if set(labels.tolist()) != set(range(CLASSES)):
        yield f"labels {sorted(set(labels.tolist()))} (rule classes: 0 to {CLASSES - 1})"
    if len(np.unique(images.reshape(len(images), -1), axis=0)) != len(images):
        yield "the same image twice (rule unique_key)"


def prepare(params: dict[str, Any], raw: Path, validated: Path, output: Path) -> None:
    """Write train.npz, val.npz and test.npz: `instances` uint8 (N, 8, 8), `labels` uint8 (N,)."""
    report = json.loads((validated / "validation.json").read_text(encoding="utf-8"))
    if report["sha256"] != digest(raw / FILE):
        raise BadDataError(f"{raw / FILE} changed since it was validated", "the validated file")
    images, labels = read(raw)
    order = np.random.default_rng(params["seed"]).permutation(len(labels))
    tests, held = (round(params[name] * len(labels)) for name in ("test", "validation"))
    parts = {"test": order[:tests], "val": order[tests : tests + held], "train": order[tests + held :]}
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        np.savez(output / f"{name}.npz", instances=images[rows], labels=labels[rows])


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; 0, or 1 with the reason on stderr."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("extract", "validate", "prepare"))
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--input", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    params = yaml.safe_load(given.params.read_text(encoding="utf-8"))
    try:
        if given.stage == "extract":
            extract(params, given.output)
        elif given.stage == "validate":
            validate(*given.input, given.output)
        else:
            prepare(params, *given.input, given.output)
    except BadDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benches share that work on a copy of this checkout: their options, and how they begin and end."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
from checkout import Checkout, copy_checkout
from torchrelay.console import show_error
from torchrelay.errors import TorchrelayError

Measure = Callable[[argparse.Namespace, Checkout], tuple[dict[str, Any], str]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which component, on how quiet a machine, and where the copy lies."""
    parser.add_argument("--component", default="fashion_mnist", help="which component (default: fashion_mnist)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to lay the copy out (default: /tmp)")
    parser.add_argument("--keep", action="store_true", help="keep the copy")


def measure_in_copy(name: str, given: argparse.Namespace, measure: Measure) -> dict[str, Any]:
    """Lay the copy out, measure in it, write the result as JSON and text, and stop all of it; the result."""
    results = report.results(name)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=given.folder))
    report.say(f"working in {folder}")
    copy = copy_checkout(folder)
    copy.enter()
    try:
        content, text = measure(given, copy)
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    finally:
        copy.relay("down")
        if not given.keep:
            shutil.rmtree(folder)
    report.save(results, content, text)
    return content

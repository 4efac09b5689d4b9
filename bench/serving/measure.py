"""Requests per second and latency of what dev serves: through the gateway, past it, by `mlflow models serve`, and raw.

    make deploy-dev && .venv/bin/python bench/serving/run

The servers stand side by side and take turns in every round, so that whatever else the machine does hits them alike.
Ratios are taken within a round; the median over the rounds is what counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from serving.client import Shot, require_wrk, shoot
from serving.targets import Deployed, deployed, mlflow_environment, mlflow_server, unpack
from torchrelay.archive import golden_set
from torchrelay.components import environment
from torchrelay.config import settings
from torchrelay.console import show_error
from torchrelay.errors import TorchrelayError

CONCURRENCY = (1, 8, 32)
# What the issue asks for, by concurrency: our rate over mlflow's.
BAR_MLFLOW = {1: 1.0, 8: 3.0, 32: 5.0}
BAR_GATEWAY_MS = 0.4
BAR_GATEWAY_SHARE = 0.9
_FORWARD = Path(__file__).with_name("forward.py")
_MLFLOW_PORT = 95  # of the hundred ports of this checkout

Round = dict[str, dict[int, Shot]]


def main() -> None:
    """Start what is compared, run the rounds, write the result."""
    given = arguments()
    try:
        require_wrk()
        target = deployed(given.component)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            body = prepare(target, folder)
            urls = {"gateway": target.gateway, "engine": target.engine}
            if not given.without_mlflow:
                port = settings().port_base + _MLFLOW_PORT
                urls["mlflow"] = stack.enter_context(mlflow_server(mlflow_environment(), target, port))
            report.await_quiet(given.quiet, given.patience)
            machine = report.machine()
            rounds, forward = measure(given, target, urls, folder, body)
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    machine["load_after"] = round(report.load(), 2)
    content: dict[str, Any] = {"machine": machine, "target": {**asdict(target), "archive": str(target.archive)}}
    content |= {"rounds": [plain(one) for one in rounds], "forward": forward}
    report.save(report.results("serving"), content, text(target, machine, rounds, forward))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", default="fashion_mnist", help="a deployed component (default: fashion_mnist)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each server has its turn (default: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="length of one turn at one concurrency (default: 5)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    parser.add_argument("--without-mlflow", action="store_true", help="leave out `mlflow models serve`")
    return parser.parse_args()


def prepare(target: Deployed, folder: Path) -> Path:
    """Unpack the archive, and write the one request that everybody gets: its first golden input."""
    unpack(target.archive, folder / "archive")
    body = folder / "request.json"
    first = golden_set(target.archive).instances[:1]
    body.write_text(json.dumps({"instances": first}, separators=(",", ":")), encoding="utf-8")
    return body


def measure(
    given: argparse.Namespace, target: Deployed, urls: dict[str, str], folder: Path, body: Path
) -> tuple[list[Round], list[dict[int, float]]]:
    """All rounds; in each the servers take turns, in another order every time."""
    for url in urls.values():
        shoot(url, body, max(CONCURRENCY), 2)
    rounds: list[Round] = []
    forward: list[dict[int, float]] = []
    for number in range(given.rounds):
        report.say(f"round {number + 1} of {given.rounds}, load {report.load():.2f}")
        found: Round = {name: {} for name in urls}
        for name, concurrency in turns(list(urls), number):
            shot = shoot(urls[name], body, concurrency, given.seconds)
            found[name][concurrency] = shot
            report.say(f"  {name:<8}{concurrency:>3}: {shot.rate:8.1f}/s  {shot.p50_ms:.2f}/{shot.p99_ms:.2f} ms")
        rounds.append(found)
        forward.append(raw(target, folder / "archive", min(given.seconds, 3)))
    return rounds, forward


def turns(names: list[str], number: int) -> Iterator[tuple[str, int]]:
    """Every server at every concurrency; the one that begins moves on with each round."""
    shift = number % len(names)
    for concurrency in CONCURRENCY:
        for name in names[shift:] + names[:shift]:
            yield name, concurrency


def raw(target: Deployed, folder: Path, seconds: float) -> dict[int, float]:
    """Images/s of the bare predictor, by batch size."""
    command = [environment(target.component).python, str(_FORWARD), str(folder), str(seconds)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(size): float(rate) for size, rate in json.loads(said).items()}


def plain(found: Round) -> dict[str, Any]:
    """A round as JSON takes it."""
    return {name: {str(at): asdict(shot) for at, shot in shots.items()} for name, shots in found.items()}


def text(target: Deployed, machine: dict[str, Any], rounds: list[Round], forward: list[dict[int, float]]) -> str:
    """The result for people."""
    errors = sum(shot.errors for one in rounds for shots in one.values() for shot in shots.values())
    requests = sum(shot.requests for one in rounds for shots in one.values() for shot in shots.values())
    parts = [
        f"{target.component} version {target.version}, {target.workers} worker(s); {len(rounds)} rounds, medians; "
        f"{requests:,} requests, {errors} errors. {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_before']} before and {machine['load_after']} after.",
        rates(rounds),
        bars(rounds),
        raw_table(rounds, forward),
    ]
    return "\n\n".join(parts)


def median(rounds: list[Round], name: str, at: int, field: str) -> float:
    """The median over the rounds of one figure."""
    return float(statistics.median(getattr(one[name][at], field) for one in rounds))


def rates(rounds: list[Round]) -> str:
    """Rates and latencies, one line a server."""
    head = ["requests/s (p50/p99 ms)", *(f"{at} client{'s' if at > 1 else ''}" for at in CONCURRENCY)]
    rows = []
    for name in rounds[0]:
        cells = [
            f"{median(rounds, name, at, 'rate'):,.0f} "
            f"({median(rounds, name, at, 'p50_ms'):.1f}/{median(rounds, name, at, 'p99_ms'):.1f})"
            for at in CONCURRENCY
        ]
        rows.append([name, *cells])
    return report.table(head, rows)


def bars(rounds: list[Round]) -> str:
    """Each ratio beside what the issue asks for."""
    rows: list[list[object]] = []
    if "mlflow" in rounds[0]:
        for at, bar in BAR_MLFLOW.items():
            ratio = statistics.median(one["gateway"][at].rate / one["mlflow"][at].rate for one in rounds)
            name = f"rate at {at}, ours / mlflow models serve"
            rows.append([name, f"{ratio:.2f}", f"at least {bar:.1f}", report.verdict(ratio >= bar)])
    cost = statistics.median(one["gateway"][1].p50_ms - one["engine"][1].p50_ms for one in rounds)
    met = report.verdict(cost <= BAR_GATEWAY_MS)
    rows.append(["gateway's share of p50 at 1, ms", f"{cost:.2f}", f"at most {BAR_GATEWAY_MS}", met])
    share = statistics.median(one["gateway"][32].rate / one["engine"][32].rate for one in rounds)
    met = report.verdict(share >= BAR_GATEWAY_SHARE)
    rows.append(["rate at 32, gateway / engine alone", f"{share:.2f}", f"at least {BAR_GATEWAY_SHARE}", met])
    return report.table(["ratio within a round", "median", "bar", ""], rows)


def raw_table(rounds: list[Round], forward: list[dict[int, float]]) -> str:
    """The bare predictor, and how much of it is left behind the gateway."""
    rows = []
    for size in forward[0]:
        images = statistics.median(one[size] for one in forward)
        both = zip(rounds, forward, strict=True)
        share = statistics.median(one["gateway"][size].rate / bare[size] for one, bare in both)
        rows.append([size, f"{images:,.0f}", f"{share:.2f}"])
    return report.table(["batch", "forward pass, one thread, images/s", "gateway's rate at as many clients / it"], rows)

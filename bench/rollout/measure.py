"""Promotions and rollbacks in production while clients loop: not one request may fail.

    make environment && .venv/bin/python bench/rollout/run

Works on a copy of this checkout with ports, keys and a registry of its own, so nothing that serves is touched. It
trains two versions (on few samples: how good they are does not matter here), brings both into production, and then
promotes and rolls back in turn: one stage of a second at 25 %, then all requests. Half of the clients keep their
connection.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from checkout import Checkout, copy_checkout
from redeploy.clients import Clients, Seen
from torchrelay.config import site
from torchrelay.console import show_error
from torchrelay.errors import TorchrelayError
from torchrelay.handover import ArchiveRecord
from torchrelay.serving import gateway
from torchrelay.serving.apply import node_config

BAR_REQUESTS = 100_000
BAR_ROLLBACK_S = 5.0
PERIMETER = "production"
STAGES = [{"weight": 25, "bake_s": 1, "min_requests": 0}]
_SAMPLES = 1500


def main() -> None:
    """Lay the copy out, train, promote and roll back under load, write the result, and stop all of it."""
    given = arguments()
    results = report.results("rollout")
    folder = Path(tempfile.mkdtemp(prefix="rollout-", dir=given.folder))
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
    sys.exit(1 if content["seen"]["failures"] else 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", default="fashion_mnist", help="which component (default: fashion_mnist)")
    parser.add_argument("--rounds", type=int, default=50, help="promotions, each rolled back (default: 50)")
    parser.add_argument("--clients", type=int, default=50, help="looping clients (default: 50)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to lay the copy out (default: /tmp)")
    parser.add_argument("--keep", action="store_true", help="keep the copy")
    return parser.parse_args()


def measure(given: argparse.Namespace, copy: Checkout) -> tuple[dict[str, Any], str]:
    """Train, promote and roll back; the result as JSON and as text."""
    body, newest = train(copy, given.component)
    report.await_quiet(given.quiet, given.patience)
    machine = report.machine()
    perimeter = site().perimeters[PERIMETER]
    place = next(found for node in perimeter.nodes if (found := node_config(node.folder).gateway))
    before = gateway.retries(place)
    clients = Clients(f"{perimeter.gateway}/predictions/{given.component}", body, given.clients, fresh=2)
    try:
        times = [one_round(copy, newest, number) for number in range(1, given.rounds + 1)]
    finally:
        seen = clients.stop()
    machine["load_after"] = round(report.load(), 2)
    content = {
        "machine": machine,
        "clients": given.clients,
        "seen": vars(seen) | {"versions": dict(seen.versions)},
        "retries": gateway.retries(place) - before,
        "promotions_s": [one for one, _ in times],
        "rollbacks_s": [other for _, other in times],
    }
    return content, text_of(content, seen)


def train(copy: Checkout, component: str) -> tuple[bytes, str]:
    """Two versions by `deploy-dev`, both of which have served in production; the request, and the newer version."""
    copy.limit_data(component, _SAMPLES)
    policy = {
        "metric": {"floor": 0.0, "allowed_regression": 1.0, "allowed_slice_regression": None},
        "latency": {"p99_ms": 10_000},
        "serving": {"workers": 1},
        "rollout": {"stages": STAGES, "max_disagreement": 1.0},
    }
    commit(copy)
    for seed in (1, 2):
        report.say(f"training version {seed} of 2")
        copy.override(component, {**policy, "training": {"parameters": {"epochs": 1, "seed": seed}}})
        copy.relay("deploy-dev", "--component", component)
        copy.relay("promote", "--component", component)
    copy.relay("rollback", "--component", component)
    results = copy.folder / "results" / component
    golden = json.loads((results / "train" / "golden.json").read_bytes())
    record = ArchiveRecord.model_validate_json((results / "archive.json").read_bytes())
    return json.dumps({"instances": golden["instances"][:1]}, separators=(",", ":")).encode(), record.version


def commit(copy: Checkout) -> None:
    """Production admits committed code alone."""
    who = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    for words in (["add", "-A"], [*who, "commit", "--quiet", "-m", "the copy"]):
        subprocess.run(["git", *words], cwd=copy.folder, check=True)


def one_round(copy: Checkout, newest: str, number: int) -> tuple[float, float]:
    """Seconds that a promotion and a rollback took, from the command to its end."""
    promoted = timed(copy, "promote", "--version", newest)
    back = timed(copy, "rollback")
    report.say(f"round {number:>2}: promoted in {promoted:.1f} s, back in {back:.1f} s")
    return promoted, back


def timed(copy: Checkout, *words: str) -> float:
    """Seconds that a verb took."""
    began = time.perf_counter()
    copy.relay(*words, quiet=True)
    return time.perf_counter() - began


def text_of(content: dict[str, Any], seen: Seen) -> str:
    """The result for people."""
    machine = content["machine"]
    versions = ", ".join(f"{name}: {count:,}" for name, count in sorted(seen.versions.items()))
    worst = max(content["rollbacks_s"])
    rows: list[list[object]] = [
        ["promotions and rollbacks", len(content["promotions_s"]), "50"],
        [
            "requests",
            f"{seen.requests:,}",
            f"at least {BAR_REQUESTS:,}, {report.verdict(seen.requests >= BAR_REQUESTS)}",
        ],
        ["failed requests", seen.failures, f"0, {report.verdict(not seen.failures)}"],
        ["retries by the gateway", content["retries"], ""],
        ["slowest answer, ms", f"{seen.worst_s * 1000:.0f}", ""],
        ["answers by version", versions, ""],
        ["promotion, from command to done, s", spread(content["promotions_s"]), ""],
        [
            "rollback, from command to done, s",
            spread(content["rollbacks_s"]),
            f"at most {BAR_ROLLBACK_S:.0f}, {report.verdict(worst <= BAR_ROLLBACK_S)}",
        ],
    ]
    head = (
        f"{content['clients']} looping clients, half of them with a fresh connection each time. {machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load_before']} before and {machine['load_after']} after."
    )
    table = report.table(["promotions and rollbacks under load, median (worst)", "", "bar"], rows)
    return "\n\n".join([head, table, *(f"- {reason}" for reason in seen.reasons)])


def spread(seconds: list[float]) -> str:
    """Median and worst."""
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"

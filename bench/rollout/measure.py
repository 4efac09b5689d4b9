"""Promotions and rollbacks in production while clients loop: not one request may fail.

    make environment && .venv/bin/python bench/rollout/run

Works on a copy of this checkout with ports, keys and a registry of its own, so nothing that serves is touched. It
trains once (on few samples: how good it is does not matter here), makes as many versions of it as it promotes, since
one that has served before would skip the stages, and then promotes and rolls back in turn: gate, proof, one stage of a
second at 25 %, then all requests. Half of the clients keep their connection.

Then the latency of an open load, a quarter of what production can answer: new versions roll out one after the other (a
quarter of the requests mirrored, 5 %, 25 %, all), and the 99th percentile while they do is set against that of the
stretches between. Beside it stands what each phase of a roll-out adds; the orchestrator's log tells when it began.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import report
from checkout import Checkout
from copied import add_options, measure_in_copy
from redeploy.clients import Clients
from rollout.openload import Answered, OpenLoad, p99_ms
from torchrelay import lineage
from torchrelay.config import read_json, site, write_json
from torchrelay.errors import TrackingError
from torchrelay.handover import ArchiveRecord, Registration, TrainedRun
from torchrelay.serving import gateway
from torchrelay.serving.apply import node_config
from torchrelay.tracking import ModelVersion, Tracking

BAR_REQUESTS = 100_000
BAR_ROLLBACK_S = 5.0
BAR_P99 = 1.5
PERIMETER = "production"
STAGES = [{"weight": 25, "bake_s": 1, "min_requests": 0}]
OPEN_STAGES = [{"weight": weight, "bake_s": 5, "min_requests": 20, "copies": 25} for weight in (0, 5, 25)]
_SAMPLES = 1500
# What a version does not share with another one of its run.
_OF_ITS_OWN = {lineage.TAG_ARCHIVE_URL, lineage.TAG_DIGEST, lineage.TAG_PROOF}
_STEADY_S = 20
_LOG = Path(".torchrelay/logs/production-orchestrator.log")
# How each phase begins in the orchestrator's log.
_PHASES = {
    "the gate looks": r"looking at",
    "it loads on the nodes": r"\S+: Begin",
    "mirrored": r"\S+: Advance\(stage=0",
    "5 %": r"\S+: Advance\(stage=1",
    "25 %": r"\S+: Advance\(stage=2",
    "all": r"\S+: Advance\(stage=3",
    "": r"\S+: Commit",
}
_CAPACITY_S = 8
_POLICY = {
    "metric": {"floor": 0.0, "allowed_regression": 1.0, "allowed_slice_regression": None},
    "latency": {"p99_ms": 10_000},
    "serving": {"workers": 1},
}


def main() -> None:
    """Promote and roll back under load, then roll out under an open load."""
    content = measure_in_copy("rollout", arguments(), measure)
    sys.exit(1 if content["looping"]["seen"]["failures"] else 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="promotions, each rolled back (default: 50)")
    parser.add_argument("--clients", type=int, default=50, help="looping clients (default: 50)")
    parser.add_argument("--open", type=int, default=5, help="roll-outs under an open load (default: 5)")
    add_options(parser)
    return parser.parse_args()


def measure(given: argparse.Namespace, copy: Checkout) -> tuple[dict[str, Any], str]:
    """Train, promote and roll back; the result as JSON and as text."""
    first = train(copy, given.component)
    copy.relay("promote", "--component", given.component)
    versions, later = more(copy, first, given.rounds), more(copy, first, given.open)
    url = f"{site().perimeters[PERIMETER].gateway}/predictions/{given.component}"
    body = request(copy, given.component)
    report.await_quiet(given.quiet, given.patience)
    machine = report.machine()
    looping = under_clients(copy, url, body, versions, given.clients)
    stages(copy, given.component, OPEN_STAGES)
    opened = under_open_load(copy, url, body, later) if later else None
    machine["load_after"] = round(report.load(), 2)
    content = {"machine": machine, "clients": given.clients, "looping": looping, "open": opened}
    return content, text_of(content)


def under_clients(copy: Checkout, url: str, body: bytes, versions: list[str], count: int) -> dict[str, Any]:
    """Promotions and rollbacks in turn, while clients loop."""
    perimeter = site().perimeters[PERIMETER]
    place = next(found for node in perimeter.nodes if (found := node_config(node.folder).gateway))
    before = gateway.retries(place)
    clients = Clients(url, body, count, fresh=2)
    try:
        times = [one_round(copy, version) for version in versions]
    finally:
        seen = clients.stop()
    return {
        "seen": vars(seen) | {"versions": dict(seen.versions)},
        "retries": gateway.retries(place) - before,
        "promotions_s": [one for one, _ in times],
        "rollbacks_s": [other for _, other in times],
    }


def under_open_load(copy: Checkout, url: str, body: bytes, versions: list[str]) -> dict[str, Any]:
    """Roll-outs of new versions under a quarter of what production can answer; the latencies, and of what rate."""
    began, clients = time.monotonic(), Clients(url, body, 32)
    time.sleep(_CAPACITY_S)
    capacity = clients.stop().requests / (time.monotonic() - began)
    time.sleep(_STEADY_S / 4)
    load, stretches = OpenLoad(url, body, capacity / 4), []
    try:
        for version in versions:
            begin = time.monotonic()
            time.sleep(_STEADY_S)
            middle = time.monotonic()
            copy.relay("promote", "--version", version, quiet=True)
            stretches.append((begin, middle, time.monotonic()))
            report.say(f"version {version} rolled out in {time.monotonic() - middle:.1f} s")
    finally:
        answers = load.stop()
    return {
        "capacity": capacity,
        "rate": capacity / 4,
        "requests": len(answers),
        "reasons": [one.reason for one in answers if one.reason],
        "steady_p99_ms": [p99_ms([one for one in answers if a <= one.due < b]) for a, b, _ in stretches],
        "rollout_p99_ms": [p99_ms([one for one in answers if b <= one.due < c]) for _, b, c in stretches],
        "rollout_s": [c - b for _, b, c in stretches],
        "phases": by_phase(answers, list(phases(copy.folder / _LOG))),
    }


def phases(log: Path) -> Iterator[tuple[float, str]]:
    """When each phase of each roll-out began, by the monotonic clock, and its name."""
    offset = time.time() - time.monotonic()
    for line in log.read_text().splitlines():
        found = re.match(r"(\S+ \S+) INFO (.*)", line)
        name = next((name for name, begins in _PHASES.items() if found and re.match(begins, found[2])), None)
        if found and name is not None:
            yield datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() - offset, name


def by_phase(answers: list[Answered], begins: list[tuple[float, str]]) -> dict[str, dict[str, float]]:
    """How long each phase lasted over all roll-outs, in seconds, and the 99th percentile in it."""
    lasted: dict[str, float] = defaultdict(float)
    fell: dict[str, list[Answered]] = defaultdict(list)
    for (begin, name), (end, _) in pairwise(begins):
        found = [one for one in answers if name and begin <= one.due < end]
        if found:
            lasted[name] += end - begin
            fell[name] += found
    return {name: {"s": lasted[name], "p99_ms": p99_ms(found)} for name, found in fell.items()}


def train(copy: Checkout, component: str) -> ArchiveRecord:
    """A version by the whole chain."""
    copy.limit_data(component, _SAMPLES)
    commit(copy)
    stages(copy, component, STAGES)
    report.say("training")
    copy.relay("deploy-dev", "--component", component)
    record = (copy.folder / "results" / component / "archive.json").read_bytes()
    return ArchiveRecord.model_validate_json(record)


def stages(copy: Checkout, component: str, declared: list[dict[str, int]]) -> None:
    """From now on versions come in by these stages."""
    rollout = {"stages": declared, "max_disagreement": 1.0}
    copy.override(component, {**_POLICY, "rollout": rollout, "training": {"parameters": {"epochs": 1}}})


def more(copy: Checkout, first: ArchiveRecord, count: int) -> list[str]:
    """So many versions of the same model that production has never seen, packed, signed and proven like any other."""
    report.say(f"packing and proving {count} versions")
    tracking = Tracking(site().tracking.url)
    known = tracking.version(first.component, first.version)
    if known is None:
        raise TrackingError(f"version {first.version} is gone", "the version that was trained", "run the bench again")
    kept = {name: value for name, value in known.tags.items() if name not in _OF_ITS_OWN}
    experiment = tracking.ensure_experiment(known.name)
    found = []
    for _ in range(count):  # a run has one version
        run = tracking.create_run(experiment, "another version of the same model", uuid.uuid4().hex)
        tracking.finish_run(run.run_id)
        made = tracking.create_version(known.name, run.run_id, known.source, kept)
        found.append(packed(copy, made, trained_by(copy, made)))
    return found


def trained_by(copy: Checkout, version: ModelVersion) -> Path:
    """What the training left, as if the version's own run had left it."""
    train = copy.folder / "results" / f"{version.name}-{version.version}" / "train"
    shutil.copytree(copy.folder / "results" / version.name / "train", train)
    run = read_json(TrainedRun, train / "run.json", "run the bench again")
    write_json(train / "run.json", run.model_copy(update={"run_id": version.run_id}))
    return train


def packed(copy: Checkout, version: ModelVersion, train: Path) -> str:
    """The version's own signed and proven archive."""
    folder = copy.folder / "results" / f"{version.name}-{version.version}"
    registration = Registration(component=version.name, version=version.version, run_id=version.run_id)
    write_json(folder / "registration.json", registration)
    given = ["--component", version.name, "--log", "logs/more.log"]
    archive, record = ["--archive", str(folder / "archive")], ["--record", str(folder / "archive.json")]
    told = ["--registration", str(folder / "registration.json"), "--train", str(train)]
    copy.relay("package-archive", *given, *told, "--output", str(folder / "archive"), *record, quiet=True)
    copy.relay("prove-archive", *given, *archive, *record, "--output", str(folder / "proof.json"), quiet=True)
    return version.version


def request(copy: Checkout, component: str) -> bytes:
    """What every client sends."""
    golden = json.loads((copy.folder / "results" / component / "train" / "golden.json").read_bytes())
    return json.dumps({"instances": golden["instances"][:1]}, separators=(",", ":")).encode()


def commit(copy: Checkout) -> None:
    """Production admits committed code alone."""
    who = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
    for words in (["add", "-A"], [*who, "commit", "--quiet", "-m", "the copy"]):
        subprocess.run(["git", *words], cwd=copy.folder, check=True)


def one_round(copy: Checkout, version: str) -> tuple[float, float]:
    """Seconds that a promotion and a rollback took, from the command to its end."""
    promoted = timed(copy, "promote", "--version", version)
    back = timed(copy, "rollback")
    report.say(f"version {version}: promoted in {promoted:.1f} s, back in {back:.1f} s")
    return promoted, back


def timed(copy: Checkout, *words: str) -> float:
    """Seconds that a verb took."""
    began = time.perf_counter()
    copy.relay(*words, quiet=True)
    return time.perf_counter() - began


def text_of(content: dict[str, Any]) -> str:
    """The result for people."""
    machine = content["machine"]
    head = (
        f"{content['clients']} looping clients, half of them with a fresh connection each time. {machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load_before']} before and {machine['load_after']} after."
    )
    reasons = [*content["looping"]["seen"]["reasons"], *(content["open"] or {}).get("reasons", ())[:5]]
    parts = [head, looping_table(content["looping"]), *(f"- {reason}" for reason in reasons)]
    return "\n\n".join([*parts, *([open_table(content["open"])] if content["open"] else [])])


def looping_table(looping: dict[str, Any]) -> str:
    """What the looping clients saw."""
    seen = looping["seen"]
    many = report.verdict(seen["requests"] >= BAR_REQUESTS)
    fast = report.verdict(max(looping["rollbacks_s"], default=0.0) <= BAR_ROLLBACK_S)
    rows: list[list[object]] = [
        ["promotions and rollbacks", len(looping["promotions_s"]), "50"],
        ["requests", f"{seen['requests']:,}", f"at least {BAR_REQUESTS:,}, {many}"],
        ["failed requests", seen["failures"], f"0, {report.verdict(not seen['failures'])}"],
        ["retries by the gateway", looping["retries"], ""],
        ["slowest answer, ms", f"{seen['worst_s'] * 1000:.0f}", ""],
        ["versions that answered", len(seen["versions"]), ""],
        ["promotion, from command to done, s", spread(looping["promotions_s"]), ""],
        ["rollback, from command to done, s", spread(looping["rollbacks_s"]), f"at most {BAR_ROLLBACK_S:.0f}, {fast}"],
    ]
    return report.table(["promotions and rollbacks under load, median (worst)", "", "bar"], rows)


def open_table(opened: dict[str, Any]) -> str:
    """Latency while versions roll out, and between."""
    steady, rolling = opened["steady_p99_ms"], opened["rollout_p99_ms"]
    ratio = statistics.median(b / a for a, b in zip(steady, rolling, strict=True))
    rows: list[list[object]] = [
        ["requests/s (of what production can answer)", f"{opened['rate']:.0f} ({opened['capacity']:.0f})", "a quarter"],
        ["requests, of them failed", f"{opened['requests']:,}, {len(opened['reasons'])}", "none"],
        ["roll-outs, and their length, s", f"{len(rolling)}, {spread(opened['rollout_s'])}", ""],
        ["p99 between, ms", ", ".join(f"{one:.1f}" for one in steady), ""],
        ["p99 in roll-outs, ms", ", ".join(f"{one:.1f}" for one in rolling), ""],
        ["the one ÷ the other, median", f"{ratio:.2f}", f"at most {BAR_P99}, {report.verdict(ratio <= BAR_P99)}"],
    ]
    told = [[name, f"{one['s']:.0f}", f"{one['p99_ms']:.1f}"] for name, one in opened["phases"].items()]
    by = report.table(["phase of the roll-outs", "s in all", "p99, ms"], told)
    return f"{report.table(['open load', '', 'bar'], rows)}\n\n{by}"


def spread(seconds: list[float]) -> str:
    """Median and worst."""
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"

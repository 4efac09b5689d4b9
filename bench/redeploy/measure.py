"""Redeploys while clients loop: not one request may fail. And how long a registered version takes to serve.

    make environment && .venv/bin/python bench/redeploy/run

Works on a copy of this checkout with ports, keys and a registry of its own, so nothing that serves is touched. It
trains three versions (on few samples: how good they are does not matter here), the third in an environment of another
name, so that every change to and from it starts a new engine. Then the dev alias goes round them while clients loop.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import report
from checkout import Checkout
from copied import add_options, measure_in_copy
from redeploy.clients import Clients, Seen
from redeploy.versions import PERIMETER, Version, Watch, forget, move_alias, node, one_instance, train, url
from torchrelay.serving import gateway

BAR_REQUESTS = 20_000
BAR_SERVED_S = 6.0
_LOG = "logs/registered_to_served.log"


@dataclass(frozen=True)
class Redeploy:
    """One move of the alias under load: until the new version answered, and until converge was done."""

    version: str
    new_engine: bool
    answered_s: float
    done_s: float


@dataclass(frozen=True)
class Served:
    """From a registered version to its first answer on a quiet gateway; the verbs that it took, one after another."""

    what: str
    seconds: float


def main() -> None:
    """Train the versions, redeploy under load, and time a registered version on a quiet gateway."""
    content = measure_in_copy("redeploy", arguments(), measure)
    sys.exit(1 if content["seen"]["failures"] else 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redeploys", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--clients", type=int, default=16, help="looping clients (default: 16)")
    parser.add_argument("--repeat", type=int, default=3, help="how often to time registered-to-served (default: 3)")
    add_options(parser)
    return parser.parse_args()


def measure(given: argparse.Namespace, copy: Checkout) -> tuple[dict[str, Any], str]:
    """Train, redeploy, time; the result as JSON and as text."""
    versions = train(copy, given.component)
    report.await_quiet(given.quiet, given.patience)
    machine = report.machine()
    before = gateway.retries(node().gateway)
    seen, redeploys = under_load(given, copy, versions)
    retries = gateway.retries(node().gateway) - before
    served = [found for _ in range(given.repeat) for found in registered_to_served(copy, versions)]
    machine["load_after"] = round(report.load(), 2)
    content = {
        "machine": machine,
        "clients": given.clients,
        "seen": vars(seen) | {"versions": dict(seen.versions)},  # asdict would break a Counter
        "retries": retries,
        "redeploys": [asdict(one) for one in redeploys],
        "served": [asdict(one) for one in served],
    }
    return content, text_of(content, seen, redeploys, served)


def under_load(given: argparse.Namespace, copy: Checkout, versions: list[Version]) -> tuple[Seen, list[Redeploy]]:
    """All redeploys, one after another, while the clients loop."""
    body = request(versions[0])
    clients = Clients(url(given.component), body, given.clients)
    began = time.monotonic()
    found = []
    try:
        for number in range(given.redeploys):
            # Version 3 was trained last, so it serves now.
            found.append(redeploy(copy, versions[(number - 1) % 3], versions[number % 3], body))
            one = found[-1]
            report.say(
                f"redeploy {number + 1:>2}: version {one.version} answered after {one.answered_s:.1f} s, "
                f"done after {one.done_s:.1f} s{', by a new engine' if one.new_engine else ''}"
            )
    finally:
        seen = clients.stop()
    report.say(f"{seen.requests} requests in {time.monotonic() - began:.0f} s")
    return seen, found


def request(version: Version) -> bytes:
    """What every client sends."""
    return json.dumps({"instances": one_instance(version)}, separators=(",", ":")).encode()


def redeploy(copy: Checkout, old: Version, new: Version, body: bytes) -> Redeploy:
    """Move the alias and converge."""
    watch, began = Watch(new, body), time.perf_counter()
    move_alias(new)
    copy.relay("converge", "--perimeter", PERIMETER, quiet=True)
    done = time.perf_counter() - began
    return Redeploy(
        version=new.record.version,
        new_engine=old.record.environment != new.record.environment,
        answered_s=watch.seconds(),
        done_s=done,
    )


def registered_to_served(copy: Checkout, versions: list[Version]) -> list[Served]:
    """Nobody else asks. The node has never seen the archive; once into a running engine, once into a new one."""
    first, second, other = versions
    body = request(first)
    deploy(copy, first)
    forget(second)
    watch = Watch(second, body)
    deploy(copy, second)
    running = Served("deploy-model, into the running engine", watch.seconds())
    forget(other)
    watch = Watch(other, body)
    deploy(copy, other)
    return [running, Served("deploy-model, into a new engine", watch.seconds()), packed(copy, first, other, body)]


def packed(copy: Checkout, first: Version, other: Version, body: bytes) -> Served:
    """The same from the bare registered version: packed, signed, uploaded and proven as well."""
    deploy(copy, first)
    forget(other)
    watch = Watch(other, body)
    name, results = other.record.component, other.results
    given = ["--component", name, "--log", _LOG]
    archive = ["--archive", str(results / "archive")]
    record = ["--record", str(results / "archive.json")]
    registration = ["--registration", str(results / "registration.json"), "--train", str(results / "train")]
    copy.relay("package-archive", *given, *registration, "--output", str(results / "archive"), *record, quiet=True)
    copy.relay("prove-archive", *given, *archive, *record, "--output", str(results / "proof.json"), quiet=True)
    deploy(copy, other)
    return Served("package-archive, prove-archive and deploy-model, into a new engine", watch.seconds())


def deploy(copy: Checkout, version: Version) -> None:
    """The chain's last leg."""
    record = str(version.results / "archive.json")
    words = ["--component", version.record.component, "--log", _LOG, "--record", record]
    output = ["--perimeter", PERIMETER, "--output", str(version.results / "deployed.json")]
    copy.relay("deploy-model", *words, *output, quiet=True)


def text_of(content: dict[str, Any], seen: Seen, redeploys: list[Redeploy], served: list[Served]) -> str:
    """The result for people."""
    machine = content["machine"]
    parts = [
        f"{content['clients']} looping clients. {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load_before']} before and {machine['load_after']} after.",
        load_table(seen, content["retries"], redeploys),
        *(f"- {reason}" for reason in seen.reasons),
        served_table(served),
    ]
    return "\n\n".join(parts)


def load_table(seen: Seen, retries: int, redeploys: list[Redeploy]) -> str:
    """What the clients saw."""
    new = [one for one in redeploys if one.new_engine]
    same = [one for one in redeploys if not one.new_engine]
    versions = ", ".join(f"{name}: {count:,}" for name, count in sorted(seen.versions.items()))
    rows: list[list[object]] = [
        ["redeploys", len(redeploys), "20"],
        ["of them with a new engine", len(new), "at least 1"],
        [
            "requests",
            f"{seen.requests:,}",
            f"at least {BAR_REQUESTS:,}, {report.verdict(seen.requests >= BAR_REQUESTS)}",
        ],
        ["failed requests", seen.failures, f"0, {report.verdict(not seen.failures)}"],
        ["retries by the gateway", retries, ""],
        ["slowest answer, ms", f"{seen.worst_s * 1000:.0f}", ""],
        ["answers by version", versions, ""],
        ["alias moved → new version answers, same engine, s", spread([one.answered_s for one in same]), ""],
        ["alias moved → new version answers, new engine, s", spread([one.answered_s for one in new]), ""],
        ["alias moved → old version unloaded, s", spread([one.done_s for one in redeploys]), ""],
    ]
    return report.table(["redeploys under load, median (worst)", "", "bar"], rows)


def served_table(served: list[Served]) -> str:
    """Registered to served, by the verbs that it took."""
    rows = []
    for what in dict.fromkeys(one.what for one in served):
        seconds = [one.seconds for one in served if one.what == what]
        met = report.verdict(statistics.median(seconds) <= BAR_SERVED_S)
        rows.append([what, spread(seconds), f"at most {BAR_SERVED_S:.0f}, {met}"])
    return report.table(["registered version → served prediction, median (worst)", "s", "bar"], rows)


def spread(seconds: list[float]) -> str:
    """Median and worst."""
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"

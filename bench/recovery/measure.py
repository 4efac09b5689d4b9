"""How fast production mends itself after single faults, how early bad models are stopped, and whether good ones pass.

    make environment && .venv/bin/python bench/recovery/run

Works on the production of the tests (tests/production_rig.py): tracking server, orchestrator, gateway and two nodes, in
a temporary folder, with the tests' minimal engine, so that an engine's own start is no part of the times. Three parts:

recovery  thirty faults, one after the other, once with webhooks and once without, at a poll of 30 s
bad       every model of the corpus is promoted while clients loop
good      fifty good versions, each a little different, are promoted while clients loop
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import report
from corpus import ADMISSION, CANARY, STOPPED_AT, WEIGHTS, Watch, made, noisy
from production_rig import NAME, Clients, Rig, production, scaled
from recovery.faults import MOVING, STEADY, Case, Fault
from torchrelay.components import environment
from torchrelay.console import show_error
from torchrelay.errors import TorchrelayError

PARTS = ("recovery", "bad", "good")
POLL_S = 30
BARS_S = {"webhooks": 10.0, "polls": 35.0}
BAR_STOPPED, BAR_WRONG = 18, 0.01
_PATIENCE_S = 120


def main() -> None:
    """Measure, and write the result."""
    given = arguments()
    try:
        python = environment("fashion_mnist").python
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    report.await_quiet(given.quiet, given.patience)
    content: dict[str, Any] = {"machine": report.machine()}
    if "recovery" in given.parts:
        content["recovery"] = {mode: recovery(python, given.faults, mode == "webhooks") for mode in BARS_S}
    if "bad" in given.parts:
        content["bad"] = with_rig(python, bad_models)
    if "good" in given.parts:
        content["good"] = with_rig(python, lambda rig: good_models(rig, given.good))
    content["machine"]["load_after"] = round(report.load(), 2)
    report.save(report.results("recovery"), content, text_of(content))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default: all")
    names = [fault.__name__ for fault in (*STEADY, *MOVING)]
    parser.add_argument(
        "--faults", nargs="*", choices=names, default=names, metavar="FAULT", help="default: all thirty"
    )
    parser.add_argument("--good", type=int, default=50, help="how many good versions (default: 50)")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    return parser.parse_args()


@contextmanager
def a_production(python: str, **others: Any) -> Iterator[Rig]:
    """A production in a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="f-") as folder, production(Path(folder), python, **others) as rig:
        yield rig


def with_rig(python: str, part: Any) -> Any:
    """A part on a production of its own, which serves a good version."""
    with a_production(python) as rig:
        first = rig.version(scaled(1.0))
        rig.promote(first)
        rig.await_live(first)
        return part(rig)


def recovery(python: str, faults: list[str], webhooks: bool) -> dict[str, float]:
    """Seconds until production serves one version everywhere again, by fault."""
    with a_production(python, poll_s=POLL_S, webhooks=webhooks) as rig:
        for factor in (1.0, 1.1):
            version = rig.version(scaled(factor))
            rig.promote(version)
            rig.await_live(version, _PATIENCE_S)
        chosen = (fault for fault in (*STEADY, *MOVING) if fault.__name__ in faults)
        return {fault.__name__: seconds_of(rig, fault) for fault in chosen}


def seconds_of(rig: Rig, fault: Fault) -> float:
    """One fault, and until it is mended; afterwards everything is as before."""
    state = rig.state
    assert state.live is not None
    live = state.live.version
    other = next(one.wanted.version for one in reversed(state.served) if one.wanted.version != live)
    case = Case(rig, live, other)
    fault(case)
    wanted, began = case.wanted, time.monotonic()
    end = began + _PATIENCE_S
    while (found := amiss(rig, wanted)) and time.monotonic() < end:
        time.sleep(0.1)
    took = time.monotonic() - began
    report.say(f"{fault.__name__:>36}: {took:5.1f} s{f', and still {found}' if found else ''}")
    restore(rig, wanted)
    return took


def amiss(rig: Rig, version: str) -> str:
    """What is not yet as it should be, the registry's own alias included while there is a registry."""
    found = rig.amiss(version)
    if found or not rig.tracking_runs:
        return found
    live = rig.tracking.aliases(NAME).get("production-live")
    return "" if live == version else f"@production-live is on {live}"


def restore(rig: Rig, version: str) -> None:
    """Everything runs, both versions have served, and nothing is asked for but what is live."""
    for node in rig.perimeter.nodes:
        if (node.folder / "predictions").is_file():
            (node.folder / "predictions").unlink()
    rig.up()
    rig.promote(version)
    rig.await_live(version, _PATIENCE_S)
    if len({one.wanted.version for one in rig.state.served}) < 2:  # its memory was lost
        for factor in (1.2, 1.3):
            version = rig.version(scaled(factor))
            rig.promote(version)
            rig.await_live(version, _PATIENCE_S)


def bad_models(rig: Rig) -> list[dict[str, Any]]:
    """Each model of the corpus: how far it came, and what callers saw from roll-out start to revert."""
    live = rig.state.live
    assert live is not None
    found = []
    for name in (*STOPPED_AT, *WEIGHTS):
        version = made(rig, name)
        watch = Watch(rig, version)
        with rig.clients().looping() as clients, ExitStack() as turned:
            began = time.monotonic()
            rig.promote(version)
            if name.startswith("later"):
                rig.await_stage(version, 1)
                turned.enter_context(rig.turned())
            watch.await_refusal()
            rig.await_live(live.version)
            took = time.monotonic() - began
        found.append({"name": name, "reached": watch.reached, "seconds": took, **counted(clients, version)})
        report.say(f"{name:>24}: {found[-1]}")
        rig.promote(live.version)
    return found


def counted(clients: Clients, version: str) -> dict[str, int]:
    """What callers saw; a mirrored request is nobody's."""
    return {
        "requests": len(clients.seen),
        "candidate": clients.by_version[version],
        "failed": len(clients.failures),
        "wrong": len(clients.wrong),
    }


def good_models(rig: Rig, count: int) -> dict[str, Any]:
    """Good versions, one after the other, each against the one before."""
    refused, seconds = [], []
    with rig.clients().looping() as clients:
        for number in range(count):
            version = rig.version(noisy(0.001 * number, seed=number, factor=0.5 + 0.05 * number))
            began = time.monotonic()
            rig.promote(version)
            try:
                rig.await_live(version, _PATIENCE_S)
            except AssertionError:
                refused.append(rig.await_refused(version, 1))
                report.say(f"version {version} was refused: {refused[-1]}")
            seconds.append(time.monotonic() - began)
    return {"versions": count, "refused": refused, "seconds": seconds, **counted(clients, "")}


def text_of(content: dict[str, Any]) -> str:
    """The result for people."""
    machine = content["machine"]
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']} before and "
        f"{machine['load_after']} after."
    ]
    if "recovery" in content:
        parts.append(recovery_table(content["recovery"]))
    if "bad" in content:
        parts.append(bad_table(content["bad"]))
    if "good" in content:
        parts.append(good_table(content["good"]))
    return "\n\n".join(parts)


def recovery_table(recovery: dict[str, dict[str, float]]) -> str:
    """Seconds by fault, the slowest first."""
    modes = [*recovery]
    names = sorted(recovery[modes[0]], key=lambda name: -max(recovery[mode][name] for mode in modes))
    rows = [[name.replace("_", " "), *(f"{recovery[mode][name]:.1f}" for mode in modes)] for name in names]
    worst = [max(recovery[mode].values()) for mode in modes]
    bars = [
        f"{value:.1f}, at most {BARS_S[mode]:.0f}: {report.verdict(value <= BARS_S[mode])}"
        for mode, value in zip(modes, worst, strict=True)
    ]
    medians = [f"{statistics.median(recovery[mode].values()):.1f}" for mode in modes]
    head = [f"{len(names)} faults, seconds until mended", *(f"with {mode}" for mode in modes)]
    return report.table(head, [["the worst", *bars], ["median", *medians], *rows])


def bad_table(bad: list[dict[str, Any]]) -> str:
    """The corpus as a whole."""
    before = [one for one in bad if one["reached"] != CANARY]
    at_once = [one for one in bad if one["reached"] == ADMISSION]
    requests, wrong = sum(one["requests"] for one in bad), sum(one["wrong"] for one in bad)
    share = max(one["wrong"] / one["requests"] for one in bad)
    all_of_it = report.verdict(len(before) >= BAR_STOPPED)
    rows: list[list[object]] = [
        ["models, all reverted", len(bad), "at least 20"],
        ["stopped before any traffic (of them, at admission)", f"{len(before)} ({len(at_once)})", f"18, {all_of_it}"],
        ["requests from promotion to revert, of them failed", f"{requests:,}, {sum(one['failed'] for one in bad)}", ""],
        [
            "wrong answers; the worst model's share",
            f"{wrong}, {share:.2%}",
            f"1 %, {report.verdict(share <= BAR_WRONG)}",
        ],
        ["seconds from promotion to revert, median (worst)", spread([one["seconds"] for one in bad]), ""],
    ]
    return report.table(["bad models", "", "bar"], rows)


def good_table(good: dict[str, Any]) -> str:
    """The good ones."""
    rows: list[list[object]] = [
        ["good versions, of them refused", f"{good['versions']}, {len(good['refused'])}", "50, none"],
        ["requests, failed, wrong", f"{good['requests']:,}, {good['failed']}, {good['wrong']}", "none"],
        ["seconds from promotion to live, median (worst)", spread(good["seconds"]), ""],
    ]
    return report.table(["good versions", "", "bar"], rows)


def spread(seconds: list[float]) -> str:
    """Median and worst."""
    return f"{statistics.median(seconds):.1f} ({max(seconds):.1f})"

"""Torchrelay's pipeline against plain bash and against other tools, all in one run, as ratios.

    make environment && .venv/bin/python bench/pipeline/run

Three parts: `chain` (the same real work, ours and as five plain scripts), `tools` (five empty steps in every tool)
and `scale` (nothing changed, with many stages or components). In every round each case runs once, in another order.
The peers' environments are installed on the first run and kept in the state folder.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
from pipeline.ours import Ours, running
from pipeline.plain import Plain
from pipeline.scale import Stages
from pipeline.tables import table
from pipeline.tools import TOOLS, Bench
from timing import BenchError, Case, Sample, environment, rounds

PARTS = ("chain", "tools", "scale")


def main() -> None:
    """Run the parts that were asked for, and write the result."""
    given = arguments()
    given.cache.mkdir(parents=True, exist_ok=True)
    report.await_quiet(given.quiet, given.patience)
    machine, began = report.machine(), time.time()
    try:
        with tempfile.TemporaryDirectory(prefix="torchrelay-bench-") as folder:
            measured = measure(given, Path(folder))
    except BenchError as error:
        sys.exit(str(error))
    machine["load_after"] = round(report.load(), 2)
    found = {"machine": machine, "rounds": given.rounds, "minutes": round((time.time() - began) / 60, 1), **measured}
    report.save(report.results("pipeline"), found, table(found))


def arguments() -> argparse.Namespace:
    """What to measure, how often, and when the machine counts as quiet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each case runs (default 3)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--tools", nargs="*", default=None, metavar="NAME", help="only tools with this in their name")
    parser.add_argument("--stages", type=int, nargs="*", default=[50, 500], help="DVC's stages in the part scale")
    parser.add_argument("--components", type=int, nargs="*", default=[100], help="ours in the part scale")
    parser.add_argument("--quiet", type=float, default=0.6, help="load to wait for before measuring (default: 0.6)")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for it at most (default: 0)")
    parser.add_argument("--cache", type=Path, default=report.results("pipeline-peers"), help="the peers' environments")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the cases")
    return parser.parse_args()


def measure(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Samples by part and case, what was skipped and why, and the seconds of each step of the real work."""
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {"skipped": skipped}
    if "tools" in given.parts:
        found["tools"] = measure_tools(given, work, skipped)
    if {"chain", "scale"} & set(given.parts):
        with running(work / "ours", environment(), work / "ours.log") as ours:
            if "chain" in given.parts:
                plain = Plain(work / "plain", given.cache, environment())
                found["chain"] = measure_chain(given, ours, plain)
                found["steps"] = {"ours": ours.leg_seconds(), "plain bash": plain.step_seconds()}
            if "scale" in given.parts:
                found["scale"] = measure_scale(given, work, ours, skipped)
    return found


def measure_tools(given: argparse.Namespace, work: Path, skipped: dict[str, str]) -> dict[str, Any]:
    """Five empty steps; then, for tools that know what is done, nothing changed."""
    cases: dict[str, Case] = {}
    again: dict[str, Case] = {}
    for tool in TOOLS:
        if given.tools is not None and not any(word.lower() in tool.name.lower() for word in given.tools):
            continue
        try:
            made = Bench(tool, work, given.cache, environment())
            made.cold()
        except (BenchError, OSError) as error:
            skipped[tool.name] = str(error)
            report.say(f"skipped {tool.name}: {error}")
            continue
        cases[tool.name] = made.cold
        if tool.again:
            again[tool.name] = made.again
    return {"empty": rounds(given, cases), "nothing changed": rounds(given, again)}


def measure_chain(given: argparse.Namespace, ours: Ours, plain: Plain) -> dict[str, Any]:
    """The real work: all of it, nothing changed, only the last step."""
    servers: list[float] = []

    def ours_full() -> Sample:
        ours.forget_all()
        used = ours.servers_cpu()
        sample = ours.chain()
        servers.append(ours.servers_cpu() - used)
        return sample

    def ours_last() -> Sample:
        ours.forget_last()
        return ours.chain()

    full = rounds(given, {"plain bash": plain.chain, "ours": ours_full})
    ours.deploy()
    rest = {
        "nothing changed": rounds(given, {"ours, make deploy-dev": ours.deploy, "ours, chain": ours.chain}),
        "only the last step": rounds(given, {"plain bash": plain.last, "ours": ours_last}),
    }
    return {"full": full, "servers of ours, CPU": servers, **rest}


def measure_scale(given: argparse.Namespace, work: Path, ours: Ours, skipped: dict[str, str]) -> dict[str, Any]:
    """Nothing changed, with many stages (DVC) and many components (ours; three data stages and six legs each)."""
    cases: dict[str, Case] = {}
    for count in given.stages:
        try:
            cases[f"DVC, {count} stages"] = Stages(count, work, given.cache, environment()).again
        except BenchError as error:
            skipped[f"DVC, {count} stages"] = str(error)
            report.say(f"skipped DVC with {count} stages: {error}")
    found = rounds(given, cases)
    for count in given.components:
        ours.set_components(count)
        ours.deploy()
        found |= rounds(given, {f"ours, {count} components, make deploy-dev": ours.deploy})
    ours.set_components(0)
    return {"nothing changed": found}

"""`deploy-dev`: the main job from the terminal's point of view."""

import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from torchrelay.config import component as component_settings
from torchrelay.config import read_json, root, settings, site
from torchrelay.console import coloured, leg, legs_done, paint, result, run_logged, say
from torchrelay.errors import BusyError, ServingError
from torchrelay.handover import ArchiveRecord, NodeReport, Verdict
from torchrelay.legs.places import results


@click.command()
@click.option("--component", help="Name of a folder under components/; default: the setting `component`.")
def deploy_dev(component: str | None) -> None:
    """From the dataset to a served prediction in the dev perimeter; runs only what has to run."""
    name = component or settings().component
    component_settings(name)
    with _chain_lock() as lock:
        _deploy_dev(name, lock)


def _deploy_dev(name: str, lock: int) -> None:
    from torchrelay import nodes

    began = time.time()
    log = settings().state / "logs" / "configure.log"
    nodes.configure(log)
    nodes.start(wait=False)

    def prepare() -> None:
        _environment_and_data(name)
        nodes.start()
        _forget_lost(name)

    ran = _run_chain(name, lock, prepare)
    _summary(name, began, ran, _check_perimeter(name))


def _environment_and_data(name: str) -> None:
    """What has to be there before the DAG is read: the environment that data stages run in, and the data."""
    from torchrelay import components, data

    if not components.environment_file(components.environment_name(name)).is_file():
        log = Path("logs/build_environment") / f"{components.environment_name(name)}.log"
        with leg("build_environment", components.environment_name(name)):
            components.build_environment(name, root() / log)
    if not data.up_to_date(name):
        log = root() / "logs" / "prepare_data" / f"{name}.log"
        with leg("prepare_data", f"{name} (extract, validate, prepare; log: {log.relative_to(root())})"):
            data.reproduce(name, log)


def _forget_lost(name: str) -> None:
    """What was deleted from the registry is made again by the legs whose outputs are gone."""
    from torchrelay.legs.register import lost

    files = lost(name)
    if files:
        say(f"  the registry has no more what {files[0].relative_to(root())} tells of: that leg and the next run again")
    for file in reversed(files):  # the last one first: killed in between, the first is still found lost
        file.unlink()


def snakemake_command(name: str, *words: str) -> list[str]:
    """How the chain of a component is run, or asked about, once a line on standard input says so.

    Snakemake imports itself for a second, in which its caller can prepare what it will read.
    """
    profile = "ci" if os.environ.get("CI") else "default"
    told = "import sys; from snakemake.cli import main; sys.stdin.readline() and main()"
    command = [sys.executable, "-c", told, *words, "--profile", f"profiles/{profile}"]
    return [*command, "--config", f"component={name}"]


def _run_chain(name: str, lock: int, prepare: Callable[[], None]) -> bool:
    """Run Snakemake, which imports itself while we `prepare`; whether it had anything to do.

    What failed has named itself and its log by then.
    """
    stamp = results(name) / "deploy" / "dev.json"
    before = stamp.stat().st_mtime_ns if stamp.exists() else 0
    log = root() / "logs" / "deploy_dev" / f"{name}.log"
    log.unlink(missing_ok=True)
    status = run_logged(
        snakemake_command(name, "deploy_dev", "--quiet", "progress", "rules", "host", "reason"),
        log,
        show=_of_the_legs,
        environment=snakemake_environment(),
        folder=root(),
        keep_open=(lock,),
        meanwhile=prepare,
    )
    if status:
        text = log.read_text(encoding="utf-8")
        if "\n✗ " not in text:  # no leg failed: Snakemake itself did, and only its own words tell why
            say("\n".join(text.splitlines()[-20:]))
            say(f"  log:      {log}")
        say(f"{paint('✗', 'red')} the chain stopped; what ran before is kept, and the same command resumes:")
        say(f"  next:     make deploy-dev COMPONENT={name}")
        sys.exit(status)
    return stamp.stat().st_mtime_ns != before


@contextmanager
def _chain_lock() -> Iterator[int]:
    """One chain at a time in a checkout, whichever state folder it works with: all share results/, data/ and logs/.

    Snakemake inherits the descriptor, so the lock is held as long as either lives, and a kill gives it back, which
    Snakemake's own lock does not do.
    """
    path = root() / "results" / ".chain.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    """Take the lock; a chain that was just killed gets a few seconds to be gone."""
    for _ in range(50):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return
    raise BusyError(f"another deploy-dev runs in this checkout ({path})", "one at a time", "wait for it, then rerun")


def _of_the_legs(line: str) -> bool:
    """What the legs say of themselves; what Snakemake says is in the log."""
    return re.match(r"(\x1b\[\d+m)?[▶✓✗]|  \S", line) is not None


def snakemake_environment() -> dict[str, str]:
    """The environment of that command."""
    colour = {"FORCE_COLOR": "1"} if coloured() else {}
    return {**os.environ, **colour, "XDG_CACHE_HOME": str(settings().state / "cache"), "PYTHONUNBUFFERED": "1"}


def _check_perimeter(name: str) -> list[NodeReport]:
    """Ask for what this checkout built, and see that it is what the perimeter serves; mend it where it is not."""
    from torchrelay.delivery.converge import converge
    from torchrelay.delivery.request import tell_of_others
    from torchrelay.legs.deploy import request

    here = site()
    record = read_json(ArchiveRecord, results(name) / "archive.json", f"make deploy-dev COMPONENT={name}")
    with leg("converge", "dev"):
        request(here, name, record.version, "dev")
        outcome = converge(here, "dev", why="make deploy-dev", component=name)
        tell_of_others(outcome)
        if error := outcome.refusal(name):
            raise error
        for changed in outcome.changed:
            say(f"  {changed} was mended")
    return outcome.reports


def _summary(name: str, began: float, ran: bool, reports: list[NodeReport]) -> None:
    """A real prediction through the gateway, what runs where, the figures and the next commands."""
    from torchrelay.serving.client import first_golden, send

    here = site()
    gateway = here.perimeters["dev"].gateway
    answer = send(gateway, name, first_golden(name))
    if answer.status != 200:
        raise ServingError(f"{gateway} answered {answer.status}: {answer.body}", "200", "make status")
    verdict = read_json(Verdict, results(name) / "gate" / "verdict.json", "make deploy-dev")
    say("")
    if ran:
        _times(name, began)
    result(f"{paint('dev', 'bold')} serves {name} version {answer.headers.get('x-model-version')}")
    for report in reports:
        for one in report.held:
            health = paint("healthy", "green") if one.healthy else paint("NOT HEALTHY", "red")
            result(f"  node {report.node:<7} runs {one.component} version {one.version}, {health}")
    result(f"  {verdict.metric:<12} {verdict.candidate or 0:.4f} (floor {verdict.floor})")
    result(f"  prediction   {_short(answer.body)}")
    result(f"  request id   {answer.headers.get('x-request-id')}")
    result(f"  gateway      {gateway}/predictions/{name}")
    if public := here.perimeters["dev"].public:
        result(f"  public       {public}/predictions/{name}")
    result(f"  MLflow UI    {here.tracking.url}")
    result(f"  gate report  results/{name}/gate/report.html")
    result(f"  took         {time.time() - began:.1f} s" + ("" if ran else " (nothing had changed)"))
    result("next: make promote · make status · make plan · make down")


def _times(name: str, began: float) -> None:
    """The seconds of the legs of this run: those of the chain are in Snakemake's benchmarks."""
    files = sorted((root() / "benchmarks").glob(f"*/{name}.tsv"), key=lambda path: path.stat().st_mtime)
    chain = [
        (file.parent.name, float(file.read_text().splitlines()[1].split("\t")[0]))
        for file in files
        if file.stat().st_mtime >= began
    ]
    *before, last = legs_done()
    for title, seconds in (*before, *chain, last):
        say(f"  {title:<18} {seconds:7.1f} s")


def _short(body: Any) -> str:
    prediction = body["predictions"][0]
    if isinstance(prediction, dict):
        return ", ".join(f"{key} {value}" for key, value in prediction.items() if not isinstance(value, list))
    return str(prediction)

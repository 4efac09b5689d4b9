"""`deploy-dev` and `plan`: the main job from the terminal's point of view."""

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from torchrelay.config import component as component_settings
from torchrelay.config import component_names, read_json, root, settings, site
from torchrelay.console import coloured, leg, paint, result, run_logged, say
from torchrelay.errors import BusyError, ServingError, TorchrelayError
from torchrelay.handover import ArchiveRecord, Verdict
from torchrelay.legs.places import results

_component = click.option("--component", help="Name of a folder under components/; default: the first one.")


@click.command()
@_component
def deploy_dev(component: str | None) -> None:
    """From the dataset to a served prediction in the dev perimeter; runs only what has to run."""
    name = _name(component)
    component_settings(name)
    with _chain_lock() as lock:
        _deploy_dev(name, lock)


def _deploy_dev(name: str, lock: int) -> None:
    from torchrelay import nodes

    began = time.time()
    log = settings().state / "logs" / "configure.log"
    nodes.configure(log)
    nodes.start(wait=False)
    _environment_and_data(name)
    nodes.start()
    _forget_lost(name)
    ran = _run_chain(name, lock)
    _check_perimeter(name)
    _summary(name, began, ran)


@click.command()
@_component
def plan(component: str | None) -> None:
    """Show what a deploy-dev would run and change; touches nothing."""
    from torchrelay import components, data

    name = _name(component)
    component_settings(name)
    built = components.environment_file(components.environment_name(name)).is_file()
    current = built and data.up_to_date(name)
    result(f"environment  {'in place' if built else 'would be built'}")
    result(f"data         {'in place' if current else 'extract, validate, prepare would run where they changed'}")
    result(f"chain        {_planned_rules(name) if current else 'every leg that depends on the data'}")
    result(f"serving      {_planned_serving(name)}")


def _name(component: str | None) -> str:
    if component:
        return component
    return "fashion_mnist" if "fashion_mnist" in component_names() else component_names()[0]


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

    for file in lost(name):
        say(f"  {file.relative_to(root())} speaks of what the registry has no more: that leg runs again")
        file.unlink(missing_ok=True)


def _snakemake(name: str, *words: str) -> list[str]:
    profile = "ci" if os.environ.get("CI") else "default"
    command = [sys.executable, "-m", "snakemake", "deploy_dev", "--profile", f"profiles/{profile}", *words]
    return [*command, "--config", f"component={name}"]


def _run_chain(name: str, lock: int) -> bool:
    """Run Snakemake; whether it had anything to do. What failed has named itself and its log by then."""
    stamp = results(name) / "deploy" / "dev.json"
    before = stamp.stat().st_mtime_ns if stamp.exists() else 0
    log = root() / "logs" / "deploy_dev" / f"{name}.log"
    log.unlink(missing_ok=True)
    command = _snakemake(name, "--quiet", "progress", "rules", "host", "reason")
    status = run_logged(
        command, log, show=_of_the_legs, environment=_snakemake_environment(), folder=root(), keep_open=(lock,)
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
    """One chain at a time in a checkout.

    Snakemake inherits the descriptor, so the lock is held as long as either lives, and a kill gives it back, which
    Snakemake's own lock does not do.
    """
    path = settings().state / "chain.lock"
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


def _snakemake_environment() -> dict[str, str]:
    colour = {"FORCE_COLOR": "1"} if coloured() else {}
    return {**os.environ, **colour, "XDG_CACHE_HOME": str(settings().state / "cache"), "PYTHONUNBUFFERED": "1"}


def _check_perimeter(name: str) -> None:
    """Ask for what this checkout built, and see that it is what the perimeter serves; mend it where it is not."""
    from torchrelay.delivery.converge import converge, refused
    from torchrelay.legs.deploy import request
    from torchrelay.tracking import Tracking

    here = site()
    record = read_json(ArchiveRecord, results(name) / "archive.json", f"make deploy-dev COMPONENT={name}")
    with leg("converge", "dev"):
        request(Tracking(here.tracking.url), name, record.version, "dev")
        outcome = converge(here, "dev", why="make deploy-dev")
        if error := refused(outcome, name):
            raise error
        for changed in outcome.changed:
            say(f"  {changed} was mended")


def _summary(name: str, began: float, ran: bool) -> None:
    """A real prediction through the gateway, what runs where, the figures and the next commands."""
    from torchrelay.serving.client import first_golden, send

    here = site()
    gateway = here.perimeters["dev"].gateway
    answer = send(gateway, name, first_golden(name))
    if answer.status != 200:
        raise ServingError(f"{gateway} answered {answer.status}: {answer.body}", "200", "make status")
    verdict = read_json(Verdict, results(name) / "gate" / "verdict.json", "make deploy-dev")
    say("")
    _times(name, ran)
    result(f"{paint('dev', 'bold')} serves {name} version {answer.headers.get('x-model-version')}")
    result(f"  {verdict.metric:<12} {verdict.candidate or 0:.4f} (floor {verdict.floor})")
    result(f"  prediction   {_short(answer.body)}")
    result(f"  request id   {answer.headers.get('x-request-id')}")
    result(f"  gateway      {gateway}/predictions/{name}")
    result(f"  MLflow UI    {here.tracking.url}")
    result(f"  gate report  results/{name}/gate/report.html")
    result(f"  took         {time.time() - began:.1f} s" + ("" if ran else " (nothing had changed)"))
    result("next: make status · make plan · make down")


def _times(name: str, ran: bool) -> None:
    """The seconds that each leg took, from Snakemake's own benchmarks."""
    if not ran:
        return
    for file in sorted((root() / "benchmarks").glob(f"*/{name}.tsv"), key=lambda path: path.stat().st_mtime):
        seconds = float(file.read_text().splitlines()[1].split("\t")[0])
        say(f"  {file.parent.name:<18} {seconds:7.1f} s")


def _short(body: Any) -> str:
    prediction = body["predictions"][0]
    if isinstance(prediction, dict):
        return ", ".join(f"{key} {value}" for key, value in prediction.items() if not isinstance(value, list))
    return str(prediction)


def _planned_rules(name: str) -> str:
    """The rules that a dry run of Snakemake names."""
    done = subprocess.run(
        _snakemake(name, "--dry-run", "--quiet", "host"),
        cwd=root(),
        env=_snakemake_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise TorchrelayError(done.stderr.strip()[-2000:], "a DAG that Snakemake can read", "edit what is named above")
    rules = [
        line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith(("rule ", "localrule "))
    ]
    rules = [rule for rule in dict.fromkeys(rules) if rule != "deploy_dev"]
    return ", ".join(rules) if rules else "nothing to do"


def _planned_serving(name: str) -> str:
    from torchrelay.cli.status import survey

    if not (settings().state / "site.json").is_file():
        return "the site would be configured and started"
    state = survey(site())
    if not state["tracking"]["healthy"]:
        return "the site would be started"
    found = state["perimeters"]["dev"]["components"].get(name)
    if found is None:
        return "a first version would be deployed"
    running = ", ".join(f"{node['name']} runs version {node['version']}" for node in found["nodes"])
    return f"version {found['wanted']} is wanted; {running}" + ("" if found["converged"] else "; would be mended")

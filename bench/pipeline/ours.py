"""A temporary checkout with the digits component, its site running, and the runs of it that are timed."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from checkout import copy_checkout
from pipeline.venvs import HERE, ROOT
from report import say
from timing import BenchError, Sample, timed, tree_cpu

COMPONENT = "digits"
# Of the caller's environment: what would make ours another run than a user's.
DROPPED = ("CI", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
EXPORT = """
import sys
import numpy as np
from sklearn.datasets import load_digits
digits = load_digits()
np.savez(sys.argv[1], instances=digits.images.astype("uint8"), labels=digits.target.astype("uint8"))
"""


class Ours:
    """A copy of this checkout with the digits component, and what of it is timed."""

    def __init__(self, folder: Path, environment: Mapping[str, str], log: Path) -> None:
        """Copy the tree, export the digits and drop the component in; nothing runs yet."""
        self.folder, self.log = folder, log
        self.python = str(folder / ".venv/bin/python")
        self.environment = {**environment, **copy_checkout(folder).environment}
        for name in DROPPED:
            self.environment.pop(name, None)
        self._add_digits()
        self._commit()

    def _add_digits(self) -> None:
        """The locks are those of fashion_mnist, byte for byte, so that its environment is used."""
        target = self.folder / "components" / COMPONENT
        shutil.copytree(HERE / COMPONENT, target, ignore=shutil.ignore_patterns("__pycache__"))
        for lock in (ROOT / "components/fashion_mnist").glob("requirements.*"):
            shutil.copyfile(lock, target / lock.name)
        export = self.folder.parent / "digits"
        export.mkdir(exist_ok=True)
        subprocess.run([self.python, "-c", EXPORT, str(export / "digits.npz")], check=True)
        params = target / "params.yaml"
        params.write_text(params.read_text().replace("source: digits-export", f"source: {export}"))

    def _commit(self) -> None:
        """A clean tree, as a user has it."""
        author = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
        for words in (("add", "-A"), (*author, "commit", "-q", "-m", "bench")):
            subprocess.run(["git", *words], cwd=self.folder, check=True, capture_output=True)

    def verb(self, *words: str) -> Sample:
        """One call of torchrelay's command line."""
        return timed([self.python, "-m", "torchrelay", *words], self.folder, self.environment, self.log)

    def chain(self) -> Sample:
        """Data stages and legs up to signed archive and proof; what is up to date is left alone."""
        return timed([self.python, str(HERE / "chain.py"), COMPONENT], self.folder, self.environment, self.log)

    def deploy(self) -> Sample:
        """`make deploy-dev` as a user types it. The borrowed .venv is taken as it is."""
        command = ["make", "-o", ".venv/run.stamp", "-o", ".venv/bin/python", "deploy-dev", f"COMPONENT={COMPONENT}"]
        return timed(command, self.folder, self.environment, self.log)

    def forget_all(self) -> None:
        """As after a fresh clone: no data, no results. Registry and environment stay, as the peer's database does."""
        state = self.folder / ".torchrelay"
        for path in (self.folder / "results", self.folder / "data", state / "dvc", self.folder / ".snakemake"):
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / "dvc.lock").unlink(missing_ok=True)

    def forget_last(self) -> None:
        """Only the last step is to be run again."""
        (self.folder / "results" / COMPONENT / "proof.json").unlink()

    def leg_seconds(self) -> dict[str, float]:
        """Seconds of each leg's last run, from Snakemake's benchmarks."""
        files = sorted((self.folder / "benchmarks").glob(f"*/{COMPONENT}.tsv"))
        return {file.parent.name: float(file.read_text().splitlines()[1].split("\t")[0]) for file in files}

    def servers_cpu(self) -> float:
        """Processor seconds that everything under supervisord has used so far."""
        return tree_cpu(int((self.folder / ".torchrelay/supervisor/supervisord.pid").read_text()))

    def set_components(self, count: int) -> None:
        """So many components in all: copies of digits beside it, which nobody deployed."""
        for copy in (self.folder / "components").glob("copy_*"):
            shutil.rmtree(copy)
        present = len(list((self.folder / "components").glob("*/component.yaml")))
        for number in range(count - present):
            self._add_copy(f"copy_{number}")

    def _add_copy(self, name: str) -> None:
        target = self.folder / "components" / name
        shutil.copytree(self.folder / "components" / COMPONENT, target, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("component.yaml", "MLproject"):
            text = (target / file).read_text().replace(f"name: {COMPONENT}\n", f"name: {name}\n")
            (target / file).write_text(text)


@contextmanager
def running(folder: Path, environment: Mapping[str, str], log: Path) -> Iterator[Ours]:
    """A checkout whose servers run and serve digits; they are stopped in the end."""
    if not list(ROOT.glob(".torchrelay/environments/*/environment.json")):
        raise BenchError("no component environment is built: make environment")
    made = Ours(folder, environment, log)
    try:
        say(f"deploying {COMPONENT} once, in {folder}")
        made.deploy()
        yield made
    finally:
        made.verb("down")

"""The same real work as five plain scripts that bash runs one after the other, on MLflow's SQLite file."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.venvs import HERE, environment_for
from timing import Sample, timed


class Plain:
    """The scripts of peers/bash in a folder of their own. The database is migrated once, as ours is."""

    def __init__(self, folder: Path, cache: Path, environment: Mapping[str, str]) -> None:
        """Build the interpreter and run the scripts once, which makes the database."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.log = folder, folder.parent / "plain.log"
        programs = environment_for("bash", HERE / "requirements.txt", cache, torch=True)
        self.environment = {
            **environment,
            "PYTHON": str(programs / "python"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.chain()

    def chain(self) -> Sample:
        """All five scripts."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        return self._timed("bash", str(HERE / "peers/bash/chain.sh"))

    def last(self) -> Sample:
        """The fifth script alone; its user has to know that it is enough."""
        return self._timed(self.environment["PYTHON"], str(HERE / "peers/bash/package.py"))

    def step_seconds(self) -> dict[str, float]:
        """Seconds of each script's last run."""
        found = re.findall(r"^(data|train|gate|register|package) ([\d.]+)$", self.log.read_text(), re.M)
        return {name: float(seconds) for name, seconds in found}

    def _timed(self, *command: str) -> Sample:
        return timed(command, self.folder, self.environment, self.log)

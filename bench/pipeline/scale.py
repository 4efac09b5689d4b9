"""DVC with many stages of which nothing changed: its cost per stage, beside ours per component (three stages each)."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.tools import QUIET
from pipeline.venvs import HERE, environment_for
from timing import Sample, timed


class Stages:
    """A chain of `count` stages, all up to date. `dvc commit` says so: running 500 would take minutes."""

    def __init__(self, count: int, work: Path, cache: Path, environment: Mapping[str, str]) -> None:
        """Write the stages, their outputs and DVC's lock."""
        self.folder, self.log = work / f"dvc-{count}", work / "dvc-scale.log"
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "work").mkdir(parents=True)
        programs = environment_for("dvc", HERE / "peers/dvc/requirements.txt", cache)
        self.environment = {**environment, **QUIET, "PATH": f"{programs}:{environment['PATH']}"}
        text = "stages:\n"
        for number in range(count):
            (self.folder / f"work/{number}").write_text(str(number))
            text += f"  s{number}:\n    cmd: touch work/{number}\n    outs: [work/{number}]\n"
            text += f"    deps: [work/{number - 1}]\n" if number else ""
        (self.folder / "dvc.yaml").write_text(text)
        for words in (("init", "--no-scm", "--quiet"), ("commit", "--force", "--quiet")):
            timed([str(programs / "dvc"), *words], self.folder, self.environment, self.log)
        self._dvc = str(programs / "dvc")

    def again(self) -> Sample:
        """`dvc repro` with nothing to do."""
        return timed([self._dvc, "repro", "--quiet"], self.folder, self.environment, self.log)

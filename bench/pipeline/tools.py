"""The same five empty steps in every tool: how each is run, and how it is made to run from the start again."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.venvs import HERE, ROOT, environment_for
from timing import Sample, timed

QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",
    "KEDRO_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ZENML_ANALYTICS_OPT_IN": "false",
    "ZENML_LOGGING_VERBOSITY": "ERROR",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "USERNAME": "bench",
}
SNAKEMAKE = (
    str(ROOT / ".venv/bin/snakemake"),
    *("--profile", str(ROOT / "profiles/default"), "--quiet", "all"),
    *("--config", f"quick={ROOT}/rules/quick.smk"),
)


@dataclass(frozen=True)
class Tool:
    """One way to run the five steps; in words, `{bin}` is its environment's folder of programs, `{work}` its own."""

    name: str
    peer: str
    command: tuple[str, ...]
    again: tuple[str, ...] = ()
    requirements: str = ""
    before: tuple[tuple[str, ...], ...] = ()
    forget: tuple[str, ...] = ("work",)
    environment: Mapping[str, str] = field(default_factory=dict)


TOOLS = (
    Tool("plain bash", "plain", ("bash", "chain.sh")),
    Tool("GNU make", "make", ("make", "--silent"), again=("make", "--silent")),
    Tool("Kedro", "kedro", ("{bin}/kedro", "run"), requirements="peers/kedro/requirements.txt"),
    Tool(
        "DVC repro",
        "dvc",
        ("{bin}/dvc", "repro", "--quiet"),
        again=("{bin}/dvc", "repro", "--quiet"),
        requirements="peers/dvc/requirements.txt",
        before=(("{bin}/dvc", "init", "--no-scm", "--force", "--quiet"),),
        # Outputs, lock, run cache: DVC would take the steps' results from its cache otherwise.
        forget=("work", "dvc.lock", ".dvc/cache"),
    ),
    Tool(
        "Snakemake as we run it",
        "snakemake",
        SNAKEMAKE,
        again=SNAKEMAKE,
        forget=("work", ".snakemake"),
    ),
    Tool(
        "Metaflow",
        "metaflow",
        ("{bin}/python", "flow.py", "--quiet", "run"),
        requirements="peers/metaflow/requirements.txt",
    ),
    Tool(
        "ZenML",
        "zenml",
        ("{bin}/python", "flow.py", "fresh"),
        again=("{bin}/python", "flow.py"),
        requirements="peers/zenml/requirements.txt",
        before=(("{bin}/python", "flow.py"),),
        environment={"ZENML_CONFIG_PATH": "{work}/config", "ZENML_LOCAL_STORES_PATH": "{work}/stores"},
        forget=(),
    ),
    Tool(
        "mlflow run, one driver and five steps",
        "mlflow_run",
        ("{bin}/mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "empty"),
        requirements="requirements.txt",
        before=(("{bin}/mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "empty"),),
        environment={"MLFLOW_TRACKING_URI": "sqlite:///{work}/mlflow.db"},
        forget=(),
    ),
    Tool(
        "Prefect 3",
        "prefect",
        ("{bin}/python", "flow.py"),
        requirements="peers/prefect/requirements.txt",
        before=(("{bin}/python", "flow.py"),),
        environment={"PREFECT_HOME": "{work}/home"},
        forget=(),
    ),
)


class Bench:
    """A tool, installed and laid out in a folder of its own."""

    def __init__(self, tool: Tool, work: Path, cache: Path, environment: Mapping[str, str]) -> None:
        """Install and prepare; BenchError where that does not work."""
        self.tool = tool
        self.folder = work / tool.peer
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(HERE / "peers" / tool.peer, self.folder)
        self.log = work / f"{tool.peer}.log"
        self._bin = ""
        if tool.requirements:
            # `mlflow run` shares the environment of the plain scripts.
            name, torch = (tool.peer, False) if tool.requirements.startswith("peers/") else ("bash", True)
            self._bin = str(environment_for(name, HERE / tool.requirements, cache, torch))
        own = {key: self._filled(value) for key, value in tool.environment.items()}
        path = f"{self._bin}:{environment['PATH']}" if self._bin else environment["PATH"]
        self.environment = {**environment, **QUIET, **own, "PATH": path}
        for command in tool.before:
            self._timed(command)

    def cold(self) -> Sample:
        """All five steps."""
        for name in self.tool.forget:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).unlink(missing_ok=True)
        return self._timed(self.tool.command)

    def again(self) -> Sample:
        """The same once more: nothing changed. Only for tools that have a command for it."""
        return self._timed(self.tool.again)

    def _timed(self, command: tuple[str, ...]) -> Sample:
        return timed([self._filled(word) for word in command], self.folder, self.environment, self.log)

    def _filled(self, word: str) -> str:
        return word.replace("{bin}", self._bin).replace("{work}", str(self.folder))

"""A checkout whose Google is the fake of tests/fake_google, and its verbs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from fake_google.cloud import Cloud
from fake_google.proxy import Proxy

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "my-project-dev"
FOREIGN = ("TORCHRELAY_", "GCP_", "ANSIBLE_")
SHARED = ("Snakefile", "components", "roles", "playbooks", "ansible.cfg", "config")
NODES = [
    {"name": "training-1", "role": "training", "machine_type": "g2-standard-4", "gpu_type": "nvidia-l4"},
    {"name": "serving-1", "role": "serving", "machine_type": "e2-standard-4", "gateway": True, "external": False},
]
INSIDE = [{"name": "metrics", "from": ["serving"], "to": ["node"], "ports": [9100]}]


class Site:
    """A copy of inventory/dev with two machines, a state folder of its own, and a fake Google."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cloud = Cloud(PROJECT)
        self.proxy = Proxy(folder, self.cloud)
        self.state = folder / "state"
        for name in SHARED:
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "inventory", folder / "inventory")
        self._variables = folder / "inventory" / "dev" / "group_vars" / "all" / "gcp.yml"
        self.want(gcp_nodes=NODES, gcp_inside=INSIDE, gcp_callers=["198.51.100.0/24"], gcp_patience=0)
        self._running: subprocess.Popen[str] | None = None

    def want(self, **variables: Any) -> None:
        """Lay these over the inventory's variables."""
        self._variables.write_text(yaml.safe_dump(yaml.safe_load(self._variables.read_text()) | variables))

    def environment(self) -> dict[str, str]:
        """What leads a program to this site, and to its Google."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
            **self.proxy.environment,
            "GCP_AUTH_KIND": "accesstoken",
            "TORCHRELAY_ROOT": str(self.folder),
            "TORCHRELAY_STATE": str(self.state),
            "PYTHONPATH": str(ROOT / "src"),
        }

    def listed(self) -> dict[str, Any]:
        """What Google's inventory plugin makes of the machines."""
        command = [Path(sys.executable).with_name("ansible-inventory"), "-i", "inventory/dev", "--list"]
        home = {f"ANSIBLE_{name}": str(self.state / "ansible") for name in ("HOME", "LOCAL_TEMP", "REMOTE_TEMP")}
        environment = self.environment() | home
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def run(self, verb: str, *flags: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "torchrelay", verb, "--perimeter", "dev", *flags]
        self._running = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        out, error = self._running.communicate(timeout=300)
        return subprocess.CompletedProcess(command, self._running.returncode, out, error)

    def ok(self, verb: str, *flags: str) -> str:
        done = self.run(verb, *flags)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.log()[-4000:]}\n{self.cloud.violations}"
        return done.stdout

    def refused(self, verb: str, *flags: str, status: int = 1) -> str:
        done = self.run(verb, *flags)
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
        return done.stderr

    def kill(self) -> None:
        """As a closed lid does: the verb and Ansible are gone between one call to Google and the next."""
        if self._running:
            os.killpg(self._running.pid, signal.SIGKILL)

    def log(self) -> str:
        return "".join(path.read_text() for path in self.state.glob("logs/provision-*.log"))

    def machine(self, name: str) -> dict[str, Any]:
        return self.cloud.compute[f"projects/{PROJECT}/zones/europe-west4-a/instances/torchrelay-dev-{name}"]

    def names(self) -> set[str]:
        """All that stands, by its last name."""
        compute = {path.rpartition("projects/")[2].partition("/")[2] for path in self.cloud.compute}
        return compute | self.cloud.accounts.keys() | self.cloud.buckets.keys()

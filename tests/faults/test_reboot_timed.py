"""`make up` after a reboot brings back what was live, in every perimeter, while the tracking server stays away."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from engines.supervised import until
from production_rig import NAME, Clients, Rig, scaled
from torchrelay.config import GatewayPlace, Node, Perimeter, Site, write_json
from torchrelay.serving.engine import Program
from torchrelay.serving.supervisor import shutdown

pytestmark = pytest.mark.real

DEV = "dev-1"


class Machine(Rig):
    """The rig's production with a dev perimeter beside it, as `torchrelay up` expects a configured machine to be."""

    def _write_site(self) -> Site:
        site = super()._write_site()
        folder = self.state_folder / "perimeters" / "dev"
        node = Node(name=DEV, folder=folder / "nodes" / DEV)
        place = GatewayPlace(folder=folder / "gateway", port=self.base + 10, admin_port=self.base + 11)
        config = self._node_config(node, 1).model_copy(
            update={
                "perimeter": "dev",
                "engine_ports": (self.base + 12, self.base + 41),
                "trust": self.signers["dev"].public,
                "gateway": place,
            }
        )
        write_json(node.folder / "node.json", config)
        dev = Perimeter(alias="dev", gateway=f"http://127.0.0.1:{place.port}", nodes=(node,), gateway_node=DEV)
        both = site.model_copy(update={"perimeters": {"dev": dev, **site.perimeters}})
        write_json(self.state_folder / "site.json", both)
        return both

    def configure(self, tracking: tuple[str, ...]) -> None:
        """Leave what the roles leave; `tracking` is the tracking server's command."""
        for program in self.programs():
            if program.name.endswith("-keeper"):
                write_json(program.directory / "keeper.json", program)
            else:
                write_json(self.state_folder / "perimeters/production/orchestrator.json", program)
        dev = self.site.perimeters["dev"].nodes[0].folder
        command = (sys.executable, "-m", "torchrelay", "apply", "--node", str(dev), "--every", "2")
        keeper = Program(
            name=f"{DEV}-keeper",
            command=command,
            environment=self.variables,
            directory=dev,
            log=self.log(f"{DEV}-keeper"),
        )
        write_json(dev / "keeper.json", keeper)
        folder = self.state_folder / "tracking"
        folder.mkdir(exist_ok=True)
        (folder / "mlflow.db").touch()
        server = Program(name="tracking", command=tracking, directory=folder, log=self.log("tracking"))
        write_json(folder / "program.json", server)
        self._stamp()

    def _stamp(self) -> None:
        """Say that nothing that the roles read has changed since."""
        (self.checkout / "ansible.cfg").touch()
        (self.keys / "tracking").mkdir()
        (self.keys / "tracking" / "webhook.key").touch()
        asked = "from torchrelay import nodes; print(nodes.fingerprint())"
        environment = {**os.environ, **self.variables}
        done = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=self.checkout,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        stamp = {"read": done.stdout.strip(), "wrote": {}}
        (self.state_folder / "configured.json").write_text(json.dumps(stamp))

    def crash(self) -> None:
        """As when the power goes: every process is gone at once, and its files are as they were."""
        self.stop_tracking()
        url = f"unix://{self.supervisor.socket}"
        doomed = [psutil.Process(int((self.conf.parent / "supervisord.pid").read_text()))]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SUPERVISOR_SERVER_URL") == url:
                    doomed.append(process)
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # or the supervisor would bring back whom we kill first
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, left = psutil.wait_procs(doomed, timeout=10)
        assert not left

    def answers(self, port: int) -> str:
        """The version that answers a caller there, empty if none does."""
        asking = Clients(port)
        connection = asking._connection()
        found = asking._ask(connection, [3.0, 0.0, 0.0, 0.0])
        connection.close()
        return found.version if found.right else ""


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory, component_python: str) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("r"), component_python)
    try:
        made.up()
        yield made
    finally:
        shutdown(made.conf)
        made.stop_tracking()


def test_what_was_live_is_back_without_the_tracking_server(machine: Machine, tmp_path: Path) -> None:
    """Its program starts and never listens. Once it does, the same `make up` ends well."""
    import time; T=time.time(); P=lambda *w: open("/tmp/w/gc/phases","a").write(f"{time.time()-T:.1f} {w}\n")
    old, new = machine.version(scaled(1.0)), machine.version(scaled(1.2))
    P('machine.tracking.set_alias(NAME, "dev", ')
    machine.tracking.set_alias(NAME, "dev", new)
    done = machine.run("converge", "--perimeter", "dev")
    assert done.returncode == 0, done.stderr
    P('machine.promote(old)')
    machine.promote(old)
    machine.await_live(old)
    P('machine.configure(tracking')
    machine.configure(tracking=("/bin/sleep", "1000"))
    # Asked for when the power goes, and not admitted yet: what comes back is what was live.
    machine.tracking.set_alias(NAME, "production", new)
    P('machine.crash()')
    machine.crash()
    assert not machine.answers(machine.gateway_port)
    environment = {**os.environ, **machine.variables}
    P('with (tmp_path / "up.log")')
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "torchrelay", "up"], cwd=machine.checkout, env=environment, stdout=log, stderr=log
        )
    try:
        until(lambda: machine.answers(machine.gateway_port) == old, 30)
        P('until(lambda: machine.answers(machine.ba')
        until(lambda: machine.answers(machine.base + 10) == new, 30)
        P('assert not machine.tracking.healthy()')
        assert not machine.tracking.healthy()
        assert up.poll() is None, (tmp_path / "up.log").read_text()
        # Every node holds it again, not only the first.
        P('until(lambda: not machine.amiss(old), 30')
        until(lambda: not machine.amiss(old), 30)
        P('machine.start_tracking()')
        machine.start_tracking()
        P('assert up.wait(30)')
        assert up.wait(30) == 0, (tmp_path / "up.log").read_text()
    finally:
        up.kill()
        up.wait()

"""Production whose nodes are reached by SSH: the same roll-outs, and what can go wrong between two machines.

About a minute: a production of its own, whose orchestrator speaks with three OpenSSH servers on loopback.
"""

import math
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines.supervised import until
from production_rig import GATEWAY, NODES, Rig, production, scaled
from torchrelay.config import Node
from torchrelay.delivery import reach
from torchrelay.errors import ConfigError, ServingError, UntrustedError
from torchrelay.handover import Desired
from torchrelay.serving.apply import FencedError
from torchrelay.serving.calls import Calls

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, component_python: str) -> Iterator[Rig]:
    """A production that is reached by SSH alone."""
    with production(tmp_path_factory.mktemp("s"), component_python, by_ssh=True) as made:
        yield made
        reach.hang_up()


def node(rig: Rig, name: str = NODES[0]) -> Node:
    return next(one for one in rig.perimeter.nodes if one.name == name)


def local(rig: Rig, name: str = NODES[0]) -> Calls:
    return Calls(node(rig, name).folder)


def test_a_version_rolls_out_by_its_stages_and_back(rig: Rig, live: str) -> None:
    version = rig.version(scaled(1.5))
    with rig.clients().looping() as clients:
        rig.promote(version)
        rig.await_live(version)
        rig.promote(live)
        rig.await_live(live)
    assert (clients.wrong, clients.failures) == ([], [])
    assert set(clients.by_version) == {live, version}
    rig.await_told(version, "rollout")


def test_what_a_node_says_is_the_same_by_either_way(rig: Rig, live: str) -> None:
    with rig.clients().looping():
        time.sleep(0.5)
    there, here = reach.calls(node(rig)), local(rig)
    assert there.observe() == here.observe()
    assert live in {one.version for one in there.observe().held}
    newest = here.tail("points").predictions[-1]
    assert there.find(newest.id) == here.find(newest.id)
    assert there.find("nobody") is None
    assert there.requests("points", 3) == here.requests("points", 3)
    assert there.tail("points", None, time.time() - 600).predictions[0].shadow is False
    assert reach.calls(node(rig, GATEWAY)).counted().reading.versions.keys() == {("points", live)}


def test_a_request_reaches_an_engine_and_comes_back_byte_for_byte(rig: Rig, live: str) -> None:
    there = reach.calls(node(rig))
    (held,) = [one for one in there.observe().held if one.version == live]
    headers = {"content-type": "application/json", "x-torchrelay-shadow": "1"}
    body = b'{"instances": [[1, 0, 0, 0]]}'
    assert there.ask(held, body, headers, 5).body == local(rig).ask(held, body, headers, 5).body
    assert there.ask(held, b"\xff\x00", headers, 5).status == 400


def test_errors_of_the_node_are_the_same_errors_here(rig: Rig, live: str) -> None:
    assert live
    stale = Desired(perimeter="production", components=(), token=0)
    with pytest.raises(FencedError, match="fencing token 0"):
        reach.apply_on(node(rig), stale)
    with pytest.raises(ServingError, match="has no gateway") as caught:
        reach.calls(node(rig)).counted()
    assert caught.value.next_command == "make up"


def test_calls_are_answered_side_by_side(rig: Rig, live: str) -> None:
    """One that takes a second keeps nobody from looking."""
    there = reach.calls(node(rig))
    (held,) = [one for one in there.observe().held if one.version == live]
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as pool:
        port = {"host": "127.0.0.1", "port": silent.getsockname()[1]}
        hangs = held.model_copy(update={"endpoint": held.endpoint.model_copy(update=port)})
        slow = pool.submit(there.ask, hangs, b"", {}, 8)
        assert there.observe().node == NODES[0]
        assert not slow.done()
        assert slow.result().status == 504


def test_another_host_key_stops_everything_until_it_is_known(rig: Rig, live: str) -> None:
    """Not the one node alone: whoever answers in its stead must get nothing, and nobody knows what else is wrong."""
    version = rig.version(scaled(2.0))
    server = rig.ssh[NODES[0]]
    with rig.clients().looping() as clients:
        server.change_host_key()
        rig.promote(version)
        until(lambda: "host key" in rig.state.trouble, 30)
        assert rig.state.live and rig.state.live.version == live
        assert rig.state.rollout is None
        with pytest.raises(UntrustedError, match="host key that is not the known one"):
            reach.observe_on(node(rig).model_copy(update={"name": "again"}))
        server.trust_host()
        rig.await_live(version)
    assert (clients.wrong, clients.failures) == ([], [])


def test_a_node_that_cannot_be_reached_serves_on_and_converges_when_it_returns(rig: Rig, live: str) -> None:
    version = rig.version(scaled(2.5))
    server = rig.ssh[NODES[1]]
    with rig.clients().looping() as clients:
        server.stop()
        rig.promote(version)
        until(lambda: "out of reach" in str(rig.log("production-orchestrator").read_text()), 30)
        server.start()
        rig.await_live(version)
    assert (clients.wrong, clients.failures) == ([], [])
    assert live in {one.version for one in local(rig, NODES[1]).observe().held}


def test_who_runs_another_release_is_not_spoken_to(rig: Rig) -> None:
    one = node(rig)
    assert one.ssh
    other = ("printf", "'{\\x22torchrelay\\x22:\\x220.0\\x22}\\n\\n'", "#")
    older = one.model_copy(update={"ssh": one.ssh.model_copy(update={"command": other})})
    with pytest.raises(ConfigError, match=r"runs torchrelay 0\.0"):
        reach.observe_on(older)


def test_a_shell_that_talks_is_named(rig: Rig) -> None:
    one = node(rig)
    assert one.ssh
    talking = one.model_copy(update={"ssh": one.ssh.model_copy(update={"command": ("echo", "Welcome!", "#")})})
    with pytest.raises(ServingError, match="says 'Welcome!' before its agent does"):
        reach.observe_on(talking)


def test_a_figure_that_is_no_number_crosses_over(rig: Rig, live: str) -> None:
    folder = local(rig)._config.predictions / "odd"
    folder.mkdir()
    (newest,) = local(rig).tail("points").predictions[-1:]
    line = newest.model_copy(update={"output": {"predictions": [math.nan, math.inf]}})
    (folder / f"{live}-1-1-0.jsonl").write_text(line.model_dump_json() + "\n")
    (found,) = reach.calls(node(rig)).tail("odd").predictions
    assert math.isnan(found.output["predictions"][0])
    assert found.output["predictions"][1] == math.inf

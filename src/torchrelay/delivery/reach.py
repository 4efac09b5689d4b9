"""How the control node reaches its serving nodes: the one command that a node runs, in this process or over there.

On a laptop the nodes are folders of this machine, so `apply` is called as the function that it is.
"""

from torchrelay.config import GatewayPlace, Node, NodeConfig
from torchrelay.errors import ServingError, TorchrelayError
from torchrelay.handover import Desired, NodeReport
from torchrelay.serving import apply as node_apply


def apply_on(node: Node, desired: Desired) -> tuple[NodeReport, TorchrelayError | None]:
    """Bring the node to the desired state: what it says of itself then, and what went wrong on the way.

    Raises ServingError when it cannot be reached, FencedError when it listens to somebody newer.
    """
    try:
        return node_apply.apply(config_of(node), desired), None
    except node_apply.ApplyError as error:
        return error.report, error


def observe_on(node: Node) -> NodeReport:
    """What the node says of itself. Raises TorchrelayError when it cannot be reached."""
    return node_apply.observe(config_of(node))


def config_of(node: Node) -> NodeConfig:
    """The node's own settings."""
    return node_apply.node_config(node.folder)


def gateway_of(node: Node) -> GatewayPlace:
    """The gateway on this node. Raises ServingError when there is none."""
    place = config_of(node).gateway
    if place is None:
        raise ServingError(f"node {node.name} has no gateway", "the perimeter's gateway node", "make up")
    return place

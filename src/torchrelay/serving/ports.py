"""Ports on loopback: whether one is taken, and by whom, so that a clash is reported by name, without a stack trace."""

import errno
import socket

from torchrelay.errors import BusyError, ConfigError

HOST = "127.0.0.1"


def port_taken(port: int) -> bool:
    """Whether somebody listens on this port of loopback (a connection that lingers in TIME_WAIT does not count)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


def holder(port: int) -> str:
    """Who listens on this port, as `name (pid 123)`; says so where this user may not know."""
    import psutil

    for connection in psutil.net_connections(kind="tcp"):
        address = connection.laddr
        if connection.status == psutil.CONN_LISTEN and address and address.port == port and connection.pid:
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.NoSuchProcess:
                return f"pid {connection.pid}, which has just ended"
    return "a process of another user"


def check_port(port: int, what: str) -> None:
    """Raise BusyError when `port` is taken. `what` says for what it is needed, for example "the dev gateway".

    Ask only before starting something: the port of a server of ours that is up is taken, too.
    """
    if port_taken(port):
        raise BusyError(
            f"port {port}, needed for {what}, is taken by {holder(port)}",
            f"port {port} of {HOST} free",
            "stop that process, or set `port_base` in config/local.yaml (TORCHRELAY_PORT_BASE) to a free range",
        )


def check_address(address: str) -> None:
    """Raise ConfigError when no server can listen on this IP address: it is not one of this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(
                f"listen.address is {address}, where this machine cannot listen: {error.strerror}",
                "an IP address of this machine, or 0.0.0.0 for all of them",
                "set listen.address in config/local.yaml (TORCHRELAY_LISTEN_ADDRESS)",
            ) from error

"""The command line: one verb per rule, per Makefile target and per job of a node.

Verbs are imported when they are called, so that `--help` stays instant.
"""

import errno
import importlib
import sys

import click

from torchrelay.console import log_to, show_error
from torchrelay.errors import ConfigError, TorchrelayError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# verb → module of this package that holds it; the function is the verb with underscores.
_VERBS = {
    "agent": "serve",
    "apply": "serve",
    "back-up": "backup",
    "backup-status": "backup",
    "build-environment": "legs",
    "clean": "site",
    "converge": "serve",
    "deploy-dev": "deploy",
    "deploy-model": "legs",
    "describe-config": "site",
    "describe-data": "legs",
    "doctor": "site",
    "down": "site",
    "export-conda": "site",
    "gate-model": "legs",
    "gc": "gc",
    "history": "history",
    "new-component": "site",
    "orchestrate": "promote",
    "package-archive": "legs",
    "plan": "plan",
    "plan-provision": "provision",
    "predict": "serve",
    "promote": "promote",
    "prove-archive": "legs",
    "provision": "provision",
    "recovery-key": "backup",
    "register-model": "legs",
    "restore": "backup",
    "rollback": "promote",
    "rotate-keys": "keys",
    "run-stage": "legs",
    "status": "status",
    "tear-down": "provision",
    "train-model": "legs",
    "up": "site",
    "verify-gcp": "provision",
    "why": "history",
}


class _Verbs(click.Group):
    """A group that imports a verb's module only when the verb is asked for."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        module = importlib.import_module(f"torchrelay.cli.{_VERBS[name]}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="torchrelay")
def verbs() -> None:
    """Carry a PyTorch model from a dataset change to a served prediction.

    The Makefile's targets are the usual way in (`make help`); these verbs are what they and the rules call.
    """


def main() -> None:
    """Run a verb; a Torchrelay error is printed in its three parts and becomes the exit status."""
    try:
        verbs()
    except TorchrelayError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f": {error.filename}" if error.filename else ""
        full = ConfigError(
            f"{error.strerror}{where}; what was there before is unharmed",
            "room under the state folder and the checkout",
            "make doctor (it says where how much is free), make room, then the same command again",
        )
        _show_somehow(full)
        sys.exit(full.exit_code)


def _show_somehow(error: TorchrelayError) -> None:
    """On the terminal at least, when the log has no room either."""
    try:
        show_error(error)
    except OSError:
        log_to(None)
        show_error(error)

"""The command line: one verb per rule, per Makefile target and per job of a node.

Verbs are imported when they are called, so that `--help` stays instant.
"""

import importlib
import sys

import click

from torchrelay.console import show_error
from torchrelay.errors import TorchrelayError

# verb → module of this package that holds it; the function is the verb with underscores.
_VERBS = {
    "apply": "serve",
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
    "new-component": "site",
    "package-archive": "legs",
    "plan": "plan",
    "predict": "serve",
    "prove-archive": "legs",
    "register-model": "legs",
    "run-stage": "legs",
    "status": "status",
    "train-model": "legs",
    "up": "site",
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

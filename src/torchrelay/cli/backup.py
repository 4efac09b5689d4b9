"""The verbs of the backups: what makes them, what says how they stand, and what brings everything back."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchrelay.config import BackupPlan, Settings, TrackingStore, read_json, settings, write_json
from torchrelay.console import leg, paint, result, say, show_error
from torchrelay.errors import ConfigError, TorchrelayError

if TYPE_CHECKING:
    from torchrelay.registry import Replica


@click.command()
@click.option("--plan", "file", required=True, type=click.Path(path_type=Path), help="plan.json of the role control.")
@click.option("--every", type=float, help="Seconds between two rounds, for ever; default: one round.")
def back_up(file: Path, every: float | None) -> None:
    """Copy to the backup what it lacks of artifacts and keys. The registry is replicated by Litestream."""
    from torchrelay import backup

    plan = read_json(BackupPlan, file, "make up")
    failing = ""
    while True:
        try:
            copied = backup.back_up(plan, file.parent)
        except TorchrelayError as error:
            if every is None:
                raise
            if str(error) != failing:  # once, and not at every round
                show_error(error)
            failing = str(error)
        else:
            failing = ""
            if copied.artifacts or copied.keys:
                say(f"{time.strftime('%F %T')} {copied.artifacts} artifacts, keys: {copied.keys or 'as before'}")
        if every is None:
            return
        time.sleep(every)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def backup_status(as_json: bool) -> None:
    """Say what of registry, artifacts and keys is in the backup, and how old that is."""
    from torchrelay import backup, nodes

    rows = backup.status(settings(), nodes.database(), *nodes.registry_backup_runs())
    if as_json:
        result(json.dumps([row.model_dump() for row in rows], indent=2))
    else:
        for row in rows:
            result(f"{paint('✓', 'green') if row.ok else paint('✗', 'red')} {row.name:<10} {row.found}")
            if row.next_command and not row.ok:
                result(f"    next: {row.next_command}")
    sys.exit(0 if all(row.ok for row in rows) else 1)


@click.command()
@click.option("--file", required=True, type=click.Path(path_type=Path), help="A new file for the private half.")
def recovery_key(file: Path) -> None:
    """Make the age key that backups of private keys are encrypted for. Keep the file somewhere else."""
    from torchrelay.backup import make_identity

    recipient = make_identity(file)
    say(f"  {file}: move it off this machine; without it nobody reads the backup of the keys")
    say("  next: set this in config/local.yaml, then make up")
    result(f"backup: {{recipient: {recipient}}}")


@click.command()
@click.option("--confirm", default="", help="Must be yes where there is a registry already.")
@click.option("--at", help="The state of this time, as 2026-01-31T12:00:00Z; default: the last one.")
@click.option("--registry", help="Name of the registry, or NAME/GENERATION; default: the only one that there is.")
@click.option("--identity", type=click.Path(path_type=Path), help="The age key of make recovery-key: brings keys back.")
def restore(confirm: str, at: str | None, registry: str | None, identity: Path | None) -> None:
    """Bring registry, artifacts and (with --identity) keys back from the backup, and start everything.

    The registry that is there now is kept beside the restored one. What serves goes on serving.
    """
    from torchrelay import nodes
    from torchrelay.backup import restore_keys
    from torchrelay.registry import fetch

    here = settings()
    place = _place(here)
    replica = _replica(place, registry)
    _insist(confirm, place, replica)
    with leg("restore", f"registry {replica.name} from {place}/{replica.path}"):
        if identity:
            _say_keys(restore_keys(place, identity, here.keys))
        restored = fetch(nodes.database(), place, replica, at)
        _put_in_place(here, place, restored)
    nodes.configure(here.state / "logs" / "configure.log")
    nodes.start()
    say("  next: make status, make backup-status")


def _put_in_place(here: Settings, place: str, restored: Path) -> None:
    from torchrelay import nodes
    from torchrelay.backup import restore_artifacts
    from torchrelay.registry import replace
    from torchrelay.storage import is_bucket

    with nodes.tracking_paused():
        kept = replace(nodes.database(), restored)
        # A registry from a bucket's backup has its artifacts in that bucket, one from a folder's has them here.
        store = TrackingStore(database=nodes.database(), artifacts=here.artifacts, backup=place)
        write_json(nodes.database().with_name("store.json"), store)
        if not is_bucket(here.artifacts):
            say(f"  {restore_artifacts(place, Path(here.artifacts))} artifacts copied back")
    say(f"  the registry that was there: {kept}" if kept else "  there was no registry")


def _place(here: Settings) -> str:
    if here.backups is None:
        raise ConfigError(
            "neither `bucket` nor `backup.folder` is set",
            "the place that the backups went to",
            "set it in config/local.yaml (TORCHRELAY_BUCKET, TORCHRELAY_BACKUP_FOLDER), then make restore",
        )
    return here.backups


def _replica(place: str, registry: str | None) -> "Replica":
    """What was asked for; else the last generation of the registry that is here, or of the only one that is there."""
    from torchrelay import nodes
    from torchrelay.registry import identity, latest

    if registry is None and (ours := identity(nodes.database())):
        registry = ours.name
    name, _, generation = (registry or "").partition("/")
    return latest(place, name or None, int(generation) if generation.isdecimal() else None)


def _insist(confirm: str, place: str, replica: "Replica") -> None:
    """Nobody replaces a registry by mistake."""
    from torchrelay import nodes
    from torchrelay.registry import transactions

    held = transactions(nodes.database(), place, replica)
    state = f"transaction {held.last} of {held.at:%F %T} UTC" if held else "nothing"
    say(f"  {place}/{replica.path} holds {state}")
    if nodes.database().is_file() and confirm != "yes":
        raise ConfigError(
            f"{nodes.database()} is there, and would be put aside for the backup's last state ({state})",
            "CONFIRM=yes",
            "make restore CONFIRM=yes",
        )


def _say_keys(names: list[str]) -> None:
    say(f"  keys: {', '.join(names) or 'none were missing'}")

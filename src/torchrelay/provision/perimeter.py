"""Provision, take away and verify one perimeter: the roles run, and the live state has the last word."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from torchrelay.config import Json, root, settings, write_file
from torchrelay.console import say
from torchrelay.errors import ConfigError, ProvisionError, RefusedError
from torchrelay.playbook import run_playbook
from torchrelay.provision import google, plan
from torchrelay.provision.survey import Live, holds_objects, look

T = TypeVar("T")
_SOURCE = "nodes.gcp.yml"
_PAUSES = (0.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Perimeter:
    """A perimeter by the name of its inventory, `dev` or `prod`."""

    name: str

    @property
    def inventory(self) -> Path:
        """Its inventory; ConfigError where there is none that Google stands behind."""
        inventories = root() / "inventory"
        if not (inventories / self.name / _SOURCE).is_file():
            there = ", ".join(sorted(path.parent.name for path in inventories.glob(f"*/{_SOURCE}")))
            raise ConfigError(
                f"there is no inventory/{self.name}/{_SOURCE}", f"one of: {there}", "make plan-provision PERIMETER=dev"
            )
        return inventories / self.name

    @property
    def log(self) -> Path:
        """Where Ansible's output goes."""
        return settings().state / "logs" / f"provision-{self.name}.log"

    @cached_property
    def wanted(self) -> Json:
        """All that it should have, as the role `gcp` describes it."""
        file = self._folder / "wanted.json"
        self._run("provision-gcp", {"gcp_state": "described", "gcp_file": str(file)})
        found: Json = json.loads(file.read_bytes())
        return found

    @property
    def _folder(self) -> Path:
        folder = settings().state / "gcp" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def _token(self) -> str:
        return google.token()

    @cached_property
    def google(self) -> google.Google:
        """Google, as whoever asks."""
        return google.Google(self._token)

    def look(self) -> Live:
        """What stands now."""
        return look(self.google, self.wanted)

    def provision(self, live: Live) -> None:
        """Make what is wanted. ProvisionError unless the live state is that afterwards, whatever Ansible said."""
        gone = [step for step in plan.compare(self.wanted, live) if step.action in ("destroy", "replace")]
        doomed = [{"kind": step.kind, "name": step.name, "zone": step.zone} for step in gone]
        self._run("provision-gcp", {"gcp_state": "present", "gcp_doomed": doomed})
        if calls := plan.calls(self.wanted, self.look()):
            self._run("provision-gcp", {"gcp_state": "amended", "gcp_calls": calls})
        if left := settled(lambda: plan.compare(self.wanted, self.look())):
            told = [f"{step.kind} {step.name}: {step.why if step.action == 'change' else step.action}" for step in left]
            raise ProvisionError(
                f"Google was asked for everything, and this is not so: {'; '.join(told)}",
                "nothing left to do",
                f"read {self.log}, mend what keeps it so, then make provision PERIMETER={self.name} again",
            )

    def tear_down(self, live: Live) -> str | None:
        """Take everything away; returns the bucket's name if it stays since something is in it."""
        bucket = self.wanted["bucket"]["name"]
        keep = live.bucket is not None and holds_objects(self.google, bucket)
        doomed = [{"kind": step.kind, "name": step.name, "zone": step.zone} for step in plan.doomed(self.wanted, live)]
        calls = plan.farewell(self.wanted, live)
        self._run(
            "provision-gcp",
            {"gcp_state": "absent", "gcp_keep_bucket": keep, "gcp_doomed": doomed, "gcp_calls": calls},
        )
        if left := settled(lambda: standing(self.wanted, self.look(), keep_bucket=keep)):
            raise ProvisionError(
                f"Google still has {', '.join(left)}",
                "nothing of the perimeter",
                f"make tear-down PERIMETER={self.name} again: it goes on from here",
            )
        return bucket if keep else None

    def verify(self) -> None:
        """Have Ansible ask Google, machine by machine, by way of the dynamic inventory too."""
        self._run("verify-gcp", {}, self.inventory)

    def _run(self, playbook: str, variables: Json, inventory: Path | None = None) -> None:
        file = self._folder / "ansible-vars.json"
        write_file(file, json.dumps(variables, indent=2).encode())
        access = {"GCP_AUTH_KIND": "accesstoken", "GCP_ACCESS_TOKEN": self._token}
        try:
            run_playbook(playbook, file, self.log, inventory or self.inventory / "provisioner.yml", access)
        except ConfigError as error:
            raise ProvisionError(
                error.found, error.expected, f"read {self.log}, then the same command: it goes on where it ended"
            ) from error


def settled(left: Callable[[], list[T]], pauses: Sequence[float] = _PAUSES) -> list[T]:
    """What is left once Google has had time: it says yes before it has done what modules do not wait for."""
    for pause in pauses:
        time.sleep(pause)
        if not (found := left()):
            break
    return found


def standing(wanted: Json, live: Live, *, keep_bucket: bool = False) -> list[str]:
    """The names of all that a tear-down takes away and that stands."""
    found = [f"machine {name}" for name in sorted(live.instances)]
    found += [f"firewall rule {name}" for name in sorted(live.firewalls)]
    found += [f"account {name}" for name in sorted(live.accounts)]
    places = (("subnet", live.subnetwork), ("network", live.network))
    found += [f"{kind} {wanted['name']}" for kind, there in places if there]
    return [*found, f"bucket {wanted['bucket']['name']}"] if live.bucket and not keep_bucket else found


def insist(perimeter: Perimeter, what: list[str], confirm: str, production: str, verb: str) -> None:
    """RefusedError unless whoever asks has named the perimeter, and production a second time."""
    in_production = any(name.startswith("prod") for name in (perimeter.name, perimeter.wanted["perimeter"]))
    if confirm == perimeter.name and (production == "yes" or not in_production):
        return
    told = f"CONFIRM={perimeter.name}{' PRODUCTION=yes' if in_production else ''}"
    raise RefusedError(
        f"this would take from {perimeter.name} what stands: {'; '.join(what)}",
        told,
        f"make {verb} PERIMETER={perimeter.name} {told}",
    )


def remind(bucket: str) -> None:
    """Say how a bucket that stayed is emptied by whoever means it."""
    say(f"  bucket {bucket} stays, since something is in it")
    say(f"  if you mean it: gcloud storage rm --recursive gs://{bucket}")

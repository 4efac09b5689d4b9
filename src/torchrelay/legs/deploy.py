"""Deploy: move the perimeter's alias to an admitted version, then converge."""

from pathlib import Path

from torchrelay.config import Site, site, write_json
from torchrelay.delivery.converge import Outcome, converge
from torchrelay.delivery.request import insist_it_may_go, tell_of_others
from torchrelay.errors import RefusedError, ServingError
from torchrelay.handover import ArchiveRecord
from torchrelay.tracking import Tracking


def deploy_model(name: str, record: ArchiveRecord, perimeter: str, output: Path) -> Outcome:
    """Ask for `record` in `perimeter` and bring the perimeter there. A version that may not go moves no alias."""
    here = site()
    request(here, name, record.version, perimeter)
    outcome = converge(here, perimeter, why=f"make deploy-{perimeter}", component=name)
    tell_of_others(outcome)
    if error := outcome.refusal(name):
        raise error
    if not outcome.serves(here.perimeters[perimeter], name, record.version):
        raise ServingError(
            f"{perimeter} does not serve {name} version {record.version}",
            "every node serving it in good health",
            "make status",
        )
    write_json(output, record)
    return outcome


def request(here: Site, name: str, version: str, perimeter: str) -> None:
    """Move the perimeter's alias to the version, unless it is there already.

    A version that may not be served raises RefusedError, moves nothing, and is in the ledger.
    """
    tracking = Tracking(here.tracking.url)
    place = here.perimeters[perimeter]
    found = tracking.version(name, version)
    if found is None:
        raise RefusedError(
            f"{name} has no version {version} in the registry",
            "a registered version",
            f"make deploy-dev COMPONENT={name}",
        )
    insist_it_may_go(here, perimeter, found)
    present = tracking.alias(name, place.alias)
    if present is None or present.version != version:
        tracking.set_alias(name, place.alias, version)

"""What a perimeter's machines cost an hour, by config/gcp-prices.yaml. A price that is not there is unknown."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from torchrelay.config import Frozen, Json, read_yaml
from torchrelay.errors import ConfigError

_HOURS_A_MONTH = 730
_OLD_DAYS = 180


class RegionPrices(Frozen):
    """List prices of one region, without discounts."""

    machines: dict[str, float] = Field(default_factory=dict, description="An hour of a machine type.")
    gpus: dict[str, float] = Field(default_factory=dict, description="An hour of one GPU.")
    disk_gb_month: float | None = Field(None, description="A month of one GB of a pd-balanced disk.")
    address_hour: float | None = Field(None, description="An hour of an external address in use.")


class Prices(Frozen):
    """The table, with the day on which it was right and where it is from."""

    date: datetime.date
    source: str
    currency: str
    regions: dict[str, RegionPrices]

    def age_note(self, today: datetime.date) -> str:
        """A warning where the table is old; empty where it is not."""
        days = (today - self.date).days
        return f"the prices are {days} days old: put today's into config/gcp-prices.yaml" if days > _OLD_DAYS else ""


@dataclass(frozen=True)
class Cost:
    """What one machine costs an hour. `unknown` names the parts without a price, which `hour` leaves out."""

    name: str
    what: str
    hour: float
    unknown: tuple[str, ...]


def read_prices(file: Path) -> Prices:
    """The table in `file`; ConfigError where it is not one."""
    try:
        return Prices.model_validate(read_yaml(file))
    except ValidationError as error:
        raise ConfigError(f"{file}: {error}", "a price table", f"git checkout -- {file}") from error


def costs(wanted: Json, prices: Prices) -> list[Cost]:
    """What each machine that is wanted costs an hour."""
    region = prices.regions.get(wanted["region"], RegionPrices())
    return [_cost(node, region) for node in wanted["instances"]]


def _cost(node: Json, region: RegionPrices) -> Cost:
    parts = list(_parts(node, region))
    unknown = tuple(what for what, price in parts if price is None)
    return Cost(node["name"], ", ".join(what for what, _ in parts), sum(price or 0.0 for _, price in parts), unknown)


def _parts(node: Json, region: RegionPrices) -> Iterator[tuple[str, float | None]]:
    yield node["machine_type"], region.machines.get(node["machine_type"])
    for gpu in node.get("guest_accelerators", []):
        kind, count = gpu["accelerator_type"].rpartition("/")[2], gpu["accelerator_count"]
        each = region.gpus.get(kind)
        yield f"{count} × {kind}", None if each is None else each * count
    size, month = node["disks"][0]["initialize_params"]["disk_size_gb"], region.disk_gb_month
    yield f"{size} GB of disk", None if month is None else month * size / _HOURS_A_MONTH
    if "access_configs" in node["network_interfaces"][0]:
        yield "an address", region.address_hour

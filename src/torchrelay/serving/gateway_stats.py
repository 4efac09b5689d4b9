"""What the gateway has counted for each version since it started, read from Envoy's admin interface.

Counted are requests to a version's clusters that have their final answer, from the engine or from Envoy in its stead:
a retried attempt, a health check and a refusal that never reached a cluster (429, 413) are none. What is mirrored is
counted apart, for the mirror. A cluster's counters begin at nothing with Envoy, and with itself: `prune` takes them
away, so a total can fall. `read` and `Reading.since` see to that.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

from pydantic import Field

from torchrelay.config import Frozen, GatewayPlace
from torchrelay.serving.gateway_admin import admin
from torchrelay.serving.gateway_config import COPIES

__all__ = ["BackendCounts", "Bucket", "InFlight", "Reading", "counts", "epoch", "in_flight", "read"]

_NAME = rf"[^@]+@.+@[0-9a-f]{{12}}({COPIES})?"
_COUNTED = rf"^cluster\.{_NAME}\.upstream_rq_(completed|5xx|timeout|time)$"
_ACTIVE = rf"^cluster\.{_NAME}\.upstream_rq_active$"

Key = tuple[str, str]
"""A component and its version."""

Figure = TypeVar("Figure", int, "BackendCounts")


class Bucket(Frozen):
    """A bar of the histogram. Envoy's bars hold two significant digits: 0, 1, … 99, then 100-109, … 1000-1099, …."""

    lower_ms: float
    width_ms: float
    requests: int


class BackendCounts(Frozen):
    """What one version has answered. Latency follows the other figures by a second or two."""

    requests: int = Field(0, description="Requests with a final answer.")
    errors: int = Field(0, description="Those answered with 5xx, by the engine or by Envoy in its stead.")
    timeouts: int = Field(0, description="Those of the errors for which the engine took longer than it may: 504.")
    latency: tuple[Bucket, ...] = Field(
        (), description="Those that the engine answered, by whole ms from the request's last byte to the answer's."
    )

    @property
    def timed(self) -> int:
        """Requests whose time is known at least from below: what `slower_than` and `quantile` are about."""
        return self.timeouts + sum(bucket.requests for bucket in self.latency)

    def slower_than(self, ms: float) -> int:
        """Requests that took at least `ms`, those that timed out included.

        Exact for a whole `ms` of two significant digits (85, 250, 1200); any other is rounded up to the next of these.
        """
        return self.timeouts + sum(bucket.requests for bucket in self.latency if bucket.lower_ms >= ms)

    def quantile(self, q: float) -> float:
        """The q-quantile in ms, interpolated within a bucket, so known to within 10 % or 1 ms.

        nan where no time is known; inf where it falls among the requests that timed out.
        """
        rank, below = q * self.timed, 0
        if not self.timed:
            return math.nan
        for bucket in self.latency:
            if below + bucket.requests >= rank:
                return bucket.lower_ms + bucket.width_ms * max(0.0, rank - below) / bucket.requests
            below += bucket.requests
        return math.inf

    def since(self, before: Self) -> Self:
        """What came after `before`; all of it where a figure has fallen, since counting began anew then."""
        difference = self._combined(before, -1)
        fell = min(difference.requests, difference.errors, difference.timeouts, *_sizes(difference)) < 0
        return self if fell else difference

    def __add__(self, other: Self) -> Self:
        return self._combined(other, 1)

    def _combined(self, other: Self, sign: int) -> Self:
        bars: Counter[tuple[float, float]] = Counter()
        for found, factor in ((self, 1), (other, sign)):
            for bucket in found.latency:
                bars[bucket.lower_ms, bucket.width_ms] += factor * bucket.requests
        return self.model_copy(
            update={
                "requests": self.requests + sign * other.requests,
                "errors": self.errors + sign * other.errors,
                "timeouts": self.timeouts + sign * other.timeouts,
                "latency": tuple(
                    Bucket(lower_ms=lower, width_ms=width, requests=size)
                    for (lower, width), size in sorted(bars.items())
                    if size
                ),
            }
        )


def _sizes(found: BackendCounts) -> list[int]:
    return [bucket.requests for bucket in found.latency]


class Reading(Frozen):
    """One look at all counters, which a later one can be compared with whatever became of Envoy in between."""

    epoch: str = Field(description="When this Envoy started; another one counts from nothing.")
    clusters: dict[str, BackendCounts]

    @property
    def versions(self) -> dict[Key, BackendCounts]:
        """What each (component, version) answered callers, over all of its clusters."""
        return _by_version(self.clusters, BackendCounts(), copies=False)

    @property
    def copies(self) -> dict[Key, BackendCounts]:
        """What each (component, version) answered nobody, to copies of requests that another version answered."""
        return _by_version(self.clusters, BackendCounts(), copies=True)

    def since(self, before: "Reading") -> "Reading":
        """What was counted after `before`. What a cluster counted just before Envoy or the cluster went is lost."""
        if before.epoch != self.epoch:
            return self
        gone = BackendCounts()
        new = {name: found.since(before.clusters.get(name, gone)) for name, found in self.clusters.items()}
        return Reading(epoch=self.epoch, clusters=new)


class InFlight(Frozen):
    """How many requests each cluster is answering."""

    clusters: dict[str, int]

    @property
    def versions(self) -> dict[Key, int]:
        """Callers' requests, by (component, version)."""
        return _by_version(self.clusters, 0, copies=False)

    @property
    def copies(self) -> dict[Key, int]:
        """Copies of requests that another version answers."""
        return _by_version(self.clusters, 0, copies=True)


def counts(place: GatewayPlace) -> dict[Key, BackendCounts]:
    """What the gateway has counted for each (component, version) that has a cluster; one request, about 1 ms.

    ServingError where no gateway answers.
    """
    return Reading(epoch="", clusters=_counted(place)).versions


def read(place: GatewayPlace) -> Reading:
    """The counters with the epoch that they belong to; ServingError where no gateway answers."""
    return Reading(epoch=epoch(place), clusters=_counted(place))


def epoch(place: GatewayPlace) -> str:
    """When the running Envoy started, to the millisecond; ServingError where no gateway answers.

    Envoy keeps it as the time at which it read its bootstrap, which it does only once.
    """
    (found,) = json.loads(admin(place, "/config_dump?mask=last_updated"))["configs"]
    return str(found["last_updated"])


def in_flight(place: GatewayPlace) -> InFlight:
    """What is being answered now; ServingError where no gateway answers."""
    query = urlencode({"filter": _ACTIVE, "format": "json"})
    found = {one["name"]: int(one["value"]) for one in json.loads(admin(place, f"/stats?{query}"))["stats"]}
    names = {name: name.removeprefix("cluster.").removesuffix(".upstream_rq_active") for name in found}
    return InFlight(clusters={names[name]: number for name, number in found.items()})


def _by_version(clusters: Mapping[str, Figure], nothing: Figure, *, copies: bool) -> dict[Key, Figure]:
    """Over all clusters of each version; those of copies, or the others."""
    found: dict[Key, Figure] = {}
    for name, one in clusters.items():
        if name.endswith(COPIES) == copies:
            component, version = name.rpartition("@")[0].split("@", 1)
            found[component, version] = found.get((component, version), nothing) + one
    return found


def _counted(place: GatewayPlace) -> dict[str, BackendCounts]:
    """The counters of each cluster, by its name."""
    query = urlencode({"filter": _COUNTED, "format": "json", "histogram_buckets": "detailed"})
    fields: dict[str, dict[str, Any]] = {}
    for found in json.loads(admin(place, f"/stats?{query}"))["stats"]:
        for histogram in found.get("histograms", {}).get("details", []):
            _cluster_of(histogram["name"], fields)["latency"] = tuple(map(_bucket, histogram["totals"]))
        if "name" in found:
            _cluster_of(found["name"], fields)[_FIELDS[found["name"].rpartition("_")[2]]] = found["value"]
    return {name: BackendCounts(**content) for name, content in fields.items()}


_FIELDS = {"completed": "requests", "5xx": "errors", "timeout": "timeouts"}


def _cluster_of(statistic: str, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    name = statistic.removeprefix("cluster.").rpartition(".upstream_rq_")[0]
    return fields.setdefault(name, {})


def _bucket(found: dict[str, float]) -> Bucket:
    return Bucket(lower_ms=found["lower_bound"], width_ms=found["width"], requests=int(found["count"]))

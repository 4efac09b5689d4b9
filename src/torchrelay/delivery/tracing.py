"""From the id of a request back to what answered it: archive, run, parameters, data, commit."""

import json
from typing import Any

from torchrelay.config import Site
from torchrelay.delivery import reach
from torchrelay.errors import DataError, TorchrelayError
from torchrelay.lineage import (
    TAG_COMMIT,
    TAG_DATA,
    TAG_DIGEST,
    TAG_DIRTY,
    TAG_ENVIRONMENT,
    TAG_PARAMETERS,
    TAG_PARENT_VERSION,
    TAG_SCORE,
    TAG_VERDICT,
)
from torchrelay.serving.predictions import Prediction
from torchrelay.tracking import Tracking

_TAGS = {
    "environment": TAG_ENVIRONMENT,
    "data hash": TAG_DATA,
    "commit": TAG_COMMIT,
    "tree dirty": TAG_DIRTY,
    "parent": TAG_PARENT_VERSION,
    "gate": TAG_VERDICT,
    "score": TAG_SCORE,
}


def trace(site: Site, request_id: str) -> dict[str, Any]:
    """All that is known of the answer with this id, in the order in which one asks.

    DataError when no node's prediction log has it: it was never answered by a model, or the log has been rotated away.
    """
    perimeter, node, component, line = _find(site, request_id)
    tracking = Tracking(site.tracking.url)
    version = tracking.version(component, line.version)
    found: dict[str, Any] = {
        "request": request_id,
        "answered by": f"node {node} in {perimeter}, status {line.status}, {line.milliseconds:.1f} ms in the model",
        "answer": json.dumps(line.output)[:200],
        "version": f"{component} version {line.version}",
        "archive": f"sha256 {line.digest}",
    }
    if version is None:
        return {**found, "registry": "the version was deleted since: only the archive's digest is left"}
    if version.tags.get(TAG_DIGEST) != line.digest:
        found["registry"] = f"names another archive for this version now: sha256 {version.tags.get(TAG_DIGEST)}"
    run = tracking.get_run(version.run_id) if tracking.has_run(version.run_id) else None
    found["run"] = tracking.run_url(run.experiment_id, run.run_id) if run else f"{version.run_id}, deleted since"
    found["parameters"] = json.loads(version.tags.get(TAG_PARAMETERS, "{}"))
    return {**found, **{name: version.tags[tag] for name, tag in _TAGS.items() if tag in version.tags}}


def _find(site: Site, request_id: str) -> tuple[str, str, str, Prediction]:
    """Perimeter, node, component and line of the newest answer to callers with this id."""
    away = []
    for perimeter, place in site.perimeters.items():
        for node in (one for one in place.nodes if one.holds):
            try:
                found = reach.calls(node).find(request_id)
            except TorchrelayError as error:
                away.append(f"{node.name}: {error.found}")
                continue
            if found:
                return perimeter, node.name, found.component, found.prediction
    unread = f" that could be read ({'; '.join(away)})" if away else ""
    raise DataError(
        f"no prediction log{unread} has a request {request_id!r}",
        "the x-request-id of an answer that a model gave, and that has not been rotated away",
        "make history, or send the request again",
    )

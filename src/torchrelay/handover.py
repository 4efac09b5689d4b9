"""The files that the legs hand to each other under `results/<component>/`, one model each.

Every leg reads what the one before it left and writes its own; nothing else passes between them.
"""

from typing import Any, Literal

from pydantic import Field

from torchrelay.config import Frozen


class DataVersion(Frozen):
    """`data.json`: which version of the component's dataset DVC has in place."""

    component: str
    hash: str = Field(description="DVC's md5 of data/<component>/prepared.")


class Environment(Frozen):
    """`environment.json` in an environment's folder: present only when it is complete."""

    name: str = Field(description="py<version>-<variant>-<hash of lock and platform>.")
    variant: Literal["cpu", "cuda"]
    python: str = Field(description="Absolute path of its interpreter.")
    lock_sha256: str


class TrainedRun(Frozen):
    """`train/run.json`: written by the component's train.py when everything else is in place."""

    run_id: str
    experiment_id: str
    model_uri: str = Field(description="What to register: models:/m-… or runs:/….")
    metrics: dict[str, float]
    parameters: dict[str, Any]
    device: str


class Evaluation(Frozen):
    """`train/evaluation.json`: one score per sample of the frozen test set, in the set's order."""

    test_set: str = Field(description="sha256 of data/<component>/prepared/test.npz.")
    scores: list[float] = Field(description="Per sample: 1 or 0 for classification, minus the loss otherwise.")
    slices: dict[str, list[str]] = Field(
        default_factory=dict, description="Name of a slicing to each sample's slice, for example its class."
    )


class GoldenSet(Frozen):
    """`train/golden.json`: inputs, and the outputs that the predictor gave for them at training time."""

    instances: list[Any]
    predictions: list[Any]
    tolerance: float


class Verdict(Frozen):
    """`gate/verdict.json`: may this run be deployed?"""

    component: str
    run_id: str
    verdict: Literal["pass", "refuse"]
    reasons: list[str] = Field(description="Why it was refused; empty when it passed.")
    metric: str
    candidate: float | None = Field(description="Mean score; None if the scores have none (none, or not finite).")
    floor: float
    allowed_regression: float | None = Field(
        0.0, description="How far below the live version it may fall; None: they are not compared."
    )
    live_version: str | None = None
    live: float | None = None
    difference: float | None = Field(None, description="Candidate minus live, on the same test set.")
    interval: tuple[float, float] | None = Field(None, description="95 % interval of the difference, paired.")
    test_set: str


class Registration(Frozen):
    """`registration.json`: the model version that this run became."""

    component: str
    version: str
    run_id: str


class Manifest(Frozen):
    """`manifest.json` beside the archive, signed together with it."""

    component: str
    version: str
    digest: str = Field(description="sha256 of model.mar.")
    environment: str = Field(description="Name of the environment it must run in.")
    golden: str = Field(description="sha256 of golden.json inside the archive.")
    run_id: str


class ArchiveRecord(Frozen):
    """`archive.json`: where the signed archive lies."""

    component: str
    version: str
    digest: str
    environment: str
    url: str = Field(description="Folder of model.mar, manifest.json and model.sig on the tracking server.")


class Proof(Frozen):
    """`proof.json`: the exact archive reproduced its golden outputs in its environment."""

    component: str
    version: str
    digest: str
    samples: int
    largest_difference: float


class WantedVersion(Frozen):
    """One version that a node must answer for."""

    component: str
    version: str
    digest: str
    environment: str
    url: str = Field(description="Folder of model.mar, manifest.json and model.sig.")
    workers: int
    batch_size: int
    max_batch_delay_ms: int
    response_timeout_s: int
    max_body_bytes: int


class Desired(Frozen):
    """`desired.json` on a node: all that it must serve. What is not named here is taken away."""

    perimeter: str
    components: tuple[WantedVersion, ...]


class ServedVersion(Frozen):
    """What one node answers for one component."""

    component: str
    version: str
    digest: str
    healthy: bool
    changed: bool = Field(False, description="Whether this apply had to do anything for it.")


class NodeReport(Frozen):
    """What `apply` prints: what the node really serves."""

    node: str
    served: tuple[ServedVersion, ...]

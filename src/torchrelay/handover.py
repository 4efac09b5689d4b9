"""The files that the legs hand to each other under `results/<component>/`, one model each.

Every leg reads what the one before it left and writes its own; nothing else passes between them.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from torchrelay.config import Frozen, Name

# Whoever can write to the registry chooses these, and files are named after them.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]


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
    """One version that a node must hold."""

    component: Name
    version: FileName
    digest: FileName
    environment: FileName
    url: str = Field(description="Folder of model.mar, manifest.json and model.sig.")
    workers: int
    batch_size: int
    max_batch_delay_ms: int
    response_timeout_s: int
    max_body_bytes: int
    max_requests_per_s: int | None = None
    max_memory_mb: int = 4096
    keep_inputs: bool = False


class Endpoint(Frozen):
    """Where one engine instance answers for one version, and where it says whether that version is healthy."""

    host: str
    port: int = Field(ge=1, le=65535)
    health_port: int | None = Field(None, ge=1, le=65535, description="None: the same port.")
    health_path: str = "/ping"
    health_text: str = Field("", description="What a healthy answer must contain, beside status 200.")


class RoutedVersion(Frozen):
    """One version that a gateway must send requests to."""

    version: WantedVersion
    weight: int = Field(100, ge=0, le=100, description="Percent of the component's requests.")
    mirror: bool = Field(
        False,
        description="It gets copies of what the other versions answer, and nobody gets its answers to them.",
    )
    copies: int = Field(100, ge=1, le=100, description="Percent of those that a mirror gets copies of.")
    endpoints: tuple[Endpoint, ...] = Field((), description="On the nodes that hold it; none: on this very node.")
    path: str = Field("", description="What their engine calls it; empty: as this node's own engine does.")


class Desired(Frozen):
    """`desired.json` on a node: all that it must hold, and route if it has a gateway. The rest is taken away."""

    perimeter: str
    components: tuple[WantedVersion, ...] = Field(description="Several versions of one component may be held.")
    routes: tuple[RoutedVersion, ...] = ()
    token: int = Field(0, description="The converger's fencing token: a node refuses one below what it has seen.")


class HeldVersion(Frozen):
    """A version that an engine on a node holds."""

    component: str
    version: str
    digest: str
    healthy: bool
    changed: bool = Field(False, description="Whether this apply had to do anything for it.")
    endpoint: Endpoint
    path: str


class RouteShare(Frozen):
    """What a gateway really does with one version."""

    component: str
    version: str
    digest: str
    weight: int
    mirror: bool = False
    endpoints: tuple[Endpoint, ...] = ()


class Fault(Frozen):
    """Why a version could not be brought up."""

    component: str
    version: str
    found: str
    expected: str
    next_command: str
    final: bool = Field(description="Whether the version itself is to blame, so that trying again is no use.")


class NodeReport(Frozen):
    """What `apply` and `observe` print: what the node really holds and routes."""

    node: str
    held: tuple[HeldVersion, ...] = ()
    routed: tuple[RouteShare, ...] | None = Field(None, description="None: the node has no gateway.")
    gateway_healthy: bool | None = None
    draining: tuple[str, ...] = Field((), description="component@version that still have requests in flight.")
    faults: tuple[Fault, ...] = ()
    changed: tuple[str, ...] = Field((), description="Components whose routes were changed by this apply.")
    told: Desired | None = Field(None, description="What it goes back to by itself: what it last reached.")

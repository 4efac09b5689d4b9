"""What stands in a perimeter, asked of Google."""

from dataclasses import dataclass, field

from torchrelay.config import Json
from torchrelay.provision.google import ACCOUNTS, COMPUTE, PROJECTS, STORAGE, Google

# What the role `gcp` lets a node be; there is an account for each.
_ROLES = ("control", "tracking", "training", "serving", "monitor")


@dataclass(frozen=True)
class Live:
    """The perimeter as it stands. What bears its name or label and nobody wants is in here too."""

    network: Json | None
    subnetwork: Json | None
    firewalls: dict[str, Json]
    accounts: set[str]
    bucket: Json | None
    instances: dict[str, Json]
    project_policy: Json
    bucket_policy: Json = field(default_factory=dict)


def is_ours(email: str, wanted: Json) -> bool:
    """Whether an account is one of this perimeter's: not of another whose name only begins like it."""
    role = email.removeprefix(f"{wanted['name']}-").removesuffix(f"@{wanted['project']}.iam.gserviceaccount.com")
    return role in _ROLES


def look(google: Google, wanted: Json) -> Live:
    """Ask for everything that the perimeter wants or that bears its name."""
    compute = f"{COMPUTE}{wanted['project']}"
    name = wanted["name"]
    network = f"/global/networks/{name}"
    bucket_url = f"{STORAGE}{wanted['bucket']['name']}"
    bucket = google.get(bucket_url)
    rules = google.every(f"{compute}/global/firewalls")
    accounts = google.every(f"{ACCOUNTS}{wanted['project']}/serviceAccounts", "accounts")
    instances = google.every(
        f"{compute}/aggregated/instances", filter=f"labels.torchrelay_perimeter = {wanted['perimeter']}"
    )
    return Live(
        network=google.get(f"{compute}/global/networks/{name}"),
        subnetwork=google.get(f"{compute}/regions/{wanted['region']}/subnetworks/{name}"),
        firewalls={rule["name"]: rule for rule in rules if rule["network"].endswith(network)},
        accounts={one["email"] for one in accounts if is_ours(one["email"], wanted)},
        bucket=bucket,
        instances={one["name"]: one for one in instances if one["networkInterfaces"][0]["network"].endswith(network)},
        project_policy=google.policy(f"{PROJECTS}{wanted['project']}:getIamPolicy"),
        bucket_policy=(google.get(f"{bucket_url}/iam", optionsRequestedPolicyVersion="3") or {}) if bucket else {},
    )


def holds_objects(google: Google, bucket: str) -> bool:
    """Whether anything is in the bucket, older versions included."""
    found = google.get(f"{STORAGE}{bucket}/o", maxResults="1", versions="true")
    return bool(found and found.get("items"))

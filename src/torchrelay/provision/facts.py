"""What matters of a resource, told the same way whether it is wanted (the modules' form) or stands (Google's form)."""

from collections.abc import Iterable, Mapping
from typing import Any

from torchrelay.config import Json

Facts = dict[str, Any]


def wanted_network(one: Json) -> Facts:
    """Of a network that is wanted."""
    return {"routing": one["routing_config"]["routing_mode"]}


def live_network(one: Json) -> Facts:
    """Of a network that stands."""
    return {"routing": one.get("routingConfig", {}).get("routingMode")}


def wanted_subnetwork(one: Json) -> Facts:
    """Of a subnet that is wanted."""
    return {"range": one["ip_cidr_range"], "private access to Google": one["private_ip_google_access"]}


def live_subnetwork(one: Json) -> Facts:
    """Of a subnet that stands."""
    return {"range": one["ipCidrRange"], "private access to Google": one.get("privateIpGoogleAccess", False)}


def wanted_firewall(one: Json) -> Facts:
    """Of a firewall rule that is wanted."""
    return {
        "sources": sorted(one["source_ranges"]),
        "source tags": sorted(one["source_tags"]),
        "targets": sorted(one["target_tags"]),
        "ports": _ports((rule["ip_protocol"], rule["ports"]) for rule in one["allowed"]),
        "denied": [],
        "disabled": False,
    }


def live_firewall(one: Json) -> Facts:
    """Of a firewall rule that stands."""
    return {
        "sources": sorted(one.get("sourceRanges", [])),
        "source tags": sorted(one.get("sourceTags", [])),
        "targets": sorted(one.get("targetTags", [])),
        "ports": _ports((rule["IPProtocol"], rule.get("ports", ["all"])) for rule in one.get("allowed", [])),
        "denied": one.get("denied", []),
        "disabled": one.get("disabled", False),
    }


def _ports(rules: Iterable[tuple[str, list[str]]]) -> list[str]:
    return sorted(f"{protocol}:{port}" for protocol, ports in rules for port in ports)


def wanted_bucket(one: Json, retention_s: int) -> Facts:
    """Of a bucket that is wanted."""
    access = one["iam_configuration"]
    return {
        "location": one["location"],
        "labels": _ours(one["labels"]),
        "versions": one["versioning"]["enabled"],
        "public access": access["public_access_prevention"],
        "uniform access": access["uniform_bucket_level_access"]["enabled"],
        "retention": retention_s,
        "old versions": [rule["condition"]["days_since_noncurrent_time"] for rule in one["lifecycle"]["rule"]],
    }


def live_bucket(one: Json) -> Facts:
    """Of a bucket that stands."""
    access = one.get("iamConfiguration", {})
    rules = one.get("lifecycle", {}).get("rule", [])
    return {
        "location": one["location"],
        "labels": _ours(one.get("labels", {})),
        "versions": one.get("versioning", {}).get("enabled", False),
        "public access": access.get("publicAccessPrevention", "inherited"),
        "uniform access": access.get("uniformBucketLevelAccess", {}).get("enabled", False),
        "retention": int(one.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0)),
        "old versions": [rule["condition"].get("daysSinceNoncurrentTime") for rule in rules],
    }


def wanted_instance(one: Json) -> Facts:
    """Of a machine that is wanted."""
    return {
        "machine type": one["machine_type"],
        "GPUs": {_last(gpu["accelerator_type"]): gpu["accelerator_count"] for gpu in one.get("guest_accelerators", [])},
        "external address": any("access_configs" in card for card in one["network_interfaces"]),
        "labels": _ours(one["labels"]),
        "tags": sorted(one["tags"]["items"]),
        "metadata": one["metadata"],
        "accounts": {account["email"]: sorted(account["scopes"]) for account in one["service_accounts"]},
        "secure boot": one["shielded_instance_config"]["enable_secure_boot"],
        "running": True,
    }


def live_instance(one: Json) -> Facts:
    """Of a machine that stands."""
    gpus = one.get("guestAccelerators", [])
    metadata = one.get("metadata", {}).get("items", [])
    return {
        "machine type": _last(one["machineType"]),
        "GPUs": {_last(gpu["acceleratorType"]): gpu["acceleratorCount"] for gpu in gpus},
        "external address": any(card.get("accessConfigs") for card in one["networkInterfaces"]),
        "labels": _ours(one.get("labels", {})),
        "tags": sorted(one.get("tags", {}).get("items", [])),
        "metadata": {item["key"]: item["value"] for item in metadata},
        "accounts": {account["email"]: sorted(account["scopes"]) for account in one.get("serviceAccounts", [])},
        "secure boot": one.get("shieldedInstanceConfig", {}).get("enableSecureBoot", False),
        "running": one["status"] in ("RUNNING", "PROVISIONING", "STAGING"),
    }


def _ours(labels: Mapping[str, str]) -> dict[str, str]:
    """Google and its tools put labels of their own on things, and no module takes any away."""
    return {name: value for name, value in labels.items() if name.startswith("torchrelay_")}


def _last(link: str) -> str:
    return link.rpartition("/")[2]


def differences(wanted: Mapping[str, Any], live: Mapping[str, Any]) -> Facts:
    """The facts that are not as they are wanted: name → (what stands, what is wanted)."""
    return {name: (live.get(name), value) for name, value in wanted.items() if live.get(name) != value}


def grants(bindings: Iterable[Json]) -> set[tuple[str, str]]:
    """Every (role, member) that holds without a condition."""
    return {(one["role"], member) for one in bindings if "condition" not in one for member in one.get("members", [])}

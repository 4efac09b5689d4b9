"""What would have to happen for a perimeter to be as it is wanted. Pure: two descriptions in, steps and calls out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torchrelay.config import Json
from torchrelay.provision import facts
from torchrelay.provision.google import COMPUTE, PROJECTS, STORAGE
from torchrelay.provision.survey import Live, is_ours

Action = Literal["create", "change", "restart", "replace", "destroy"]
# What Google changes on a machine that stands still only, and what on none at all.
_STANDING_STILL = ("machine type", "accounts")
_NEVER = ("GPUs", "external address", "secure boot")


@dataclass(frozen=True)
class Step:
    """One thing that is not as it is wanted, and what becomes of it."""

    action: Action
    kind: str
    name: str
    why: str = ""
    zone: str = ""

    @property
    def interrupts(self) -> bool:
        """Whether something that stands goes away, for a while at least."""
        return self.action in ("restart", "replace", "destroy")


def compare(wanted: Json, live: Live) -> list[Step]:
    """Everything that is to be created, changed, stopped for a change, made anew or destroyed."""
    pairs = (
        ("network", wanted["network"], live.network, facts.wanted_network, facts.live_network),
        ("subnet", wanted["subnetwork"], live.subnetwork, facts.wanted_subnetwork, facts.live_subnetwork),
    )
    steps: list[Step] = []
    for kind, one, there, told, seen in pairs:
        steps += _step(kind, one["name"], told(one), there and seen(there))
    for rule in wanted["firewalls"]:
        there = live.firewalls.get(rule["name"])
        steps += _step("firewall", rule["name"], facts.wanted_firewall(rule), there and facts.live_firewall(there))
    for email in (account["name"] for account in wanted["accounts"]):
        steps += _step("account", email, {}, {} if email in live.accounts else None)
    bucket = facts.wanted_bucket(wanted["bucket"], wanted["retention_seconds"])
    steps += _step("bucket", wanted["bucket"]["name"], bucket, live.bucket and facts.live_bucket(live.bucket))
    steps += _grants("project", wanted["project"], wanted["project_grants"], live.project_policy, wanted)
    steps += _grants("bucket", wanted["bucket"]["name"], wanted["bucket_grants"], live.bucket_policy, wanted)
    for node in wanted["instances"]:
        steps += _instance(node, live.instances.get(node["name"]))
    return [*steps, *doomed(wanted, live)]


def _step(kind: str, name: str, wanted: facts.Facts, there: facts.Facts | None) -> Iterator[Step]:
    if there is None:
        yield Step("create", kind, name)
    elif found := facts.differences(wanted, there):
        yield Step("change", kind, name, _told(found))


def _told(found: facts.Facts) -> str:
    return "; ".join(f"{name}: {_short(before)} → {_short(after)}" for name, (before, after) in found.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _instance(node: Json, there: Json | None) -> Iterator[Step]:
    if there is None:
        yield Step("create", "instance", node["name"], node["machine_type"], node["zone"])
        return
    found = facts.differences(facts.wanted_instance(node), facts.live_instance(there))
    zone = there["zone"].rpartition("/")[2]
    if zone != node["zone"]:
        found["zone"] = (zone, node["zone"])
    if found:
        yield Step(_action(found), "instance", node["name"], _told(found), zone)


def _action(found: facts.Facts) -> Action:
    if {*_NEVER, "zone"} & found.keys():
        return "replace"
    return "restart" if {*_STANDING_STILL} & found.keys() else "change"


def _grants(kind: str, name: str, wanted: dict[str, list[str] | None], policy: Json, site: Json) -> Iterator[Step]:
    missing, surplus = _grant_changes(wanted, policy, site)
    told = [f"+ {role} {_account(member)}" for role, member in sorted(missing)]
    told += [f"- {role} {_account(member)}" for role, member in sorted(surplus)]
    if told:
        yield Step("change", f"{kind} access", name, "; ".join(told))


def _account(member: str) -> str:
    return member.removeprefix("serviceAccount:").partition("@")[0]


Grants = set[tuple[str, str]]


def _grant_changes(wanted: dict[str, list[str] | None], policy: Json, site: Json) -> tuple[Grants, Grants]:
    """What our accounts lack, and what they have beyond what is wanted; nobody else's access is looked at."""
    asked = {(role, member) for role, members in wanted.items() for member in members or ()}
    there = facts.grants(policy.get("bindings", []))
    return asked - there, {
        (role, member) for role, member in there - asked if is_ours(member.removeprefix("serviceAccount:"), site)
    }


def doomed(wanted: Json, live: Live) -> list[Step]:
    """What bears the perimeter's label or name, and nobody wants any more."""
    names = {one["name"] for kind in ("instances", "firewalls", "accounts") for one in wanted[kind]}
    machines = sorted(live.instances.items())
    steps = [
        Step("destroy", "instance", name, "not wanted any more", one["zone"].rpartition("/")[2])
        for name, one in machines
        if name not in names
    ]
    steps += [Step("destroy", "firewall", one, "not wanted any more") for one in sorted(live.firewalls.keys() - names)]
    return steps + [Step("destroy", "account", one, "not wanted any more") for one in sorted(live.accounts - names)]


def calls(wanted: Json, live: Live) -> list[Json]:
    """What no module does to what stands, as requests in their order; the role `gcp` makes them by `uri`."""
    made: list[Json] = []
    for rule in wanted["firewalls"]:
        made += _firewall_call(wanted, rule, live.firewalls.get(rule["name"]))
    made += _bucket_call(wanted, live)
    made += _grant_calls(wanted, live)
    for node in wanted["instances"]:
        if there := live.instances.get(node["name"]):
            made += _instance_calls(wanted, node, there)
    return made


def _call(method: str, url: str, body: Json, name: str) -> Json:
    return {"method": method, "url": url, "body": body, "name": name}


def _firewall_call(wanted: Json, rule: Json, there: Json | None) -> Iterator[Json]:
    """The module takes a rule that lets in more than it should for one that is as it should be."""
    if there is None or not facts.differences(facts.wanted_firewall(rule), facts.live_firewall(there)):
        return
    body = {
        "sourceRanges": rule["source_ranges"],
        "sourceTags": rule["source_tags"],
        "targetTags": rule["target_tags"],
        "allowed": [{"IPProtocol": one["ip_protocol"], "ports": one["ports"]} for one in rule["allowed"]],
        "disabled": False,
    }
    url = f"{COMPUTE}{wanted['project']}/global/firewalls/{rule['name']}"
    yield _call("PATCH", url, body, f"narrow {rule['name']}")


def _bucket_call(wanted: Json, live: Live) -> Iterator[Json]:
    """The module knows no retention, and an update by it sets what it does not know back to Google's default."""
    if live.bucket and facts.live_bucket(live.bucket)["retention"] != wanted["retention_seconds"]:
        body = {"softDeletePolicy": {"retentionDurationSeconds": str(wanted["retention_seconds"])}}
        yield _call("PATCH", f"{STORAGE}{wanted['bucket']['name']}", body, "set the bucket's retention")


def _grant_calls(wanted: Json, live: Live, none: bool = False) -> Iterator[Json]:
    """Access to project and bucket; the etag refuses what somebody else changed meanwhile."""
    asked: dict[str, Any] = {} if none else wanted["project_grants"]
    if policy := _mended(asked, live.project_policy, wanted):
        url = f"{PROJECTS}{wanted['project']}:setIamPolicy"
        yield _call("POST", url, {"policy": policy}, "set access to the project")
    asked = {} if none else wanted["bucket_grants"]
    if live.bucket and (policy := _mended(asked, live.bucket_policy, wanted)):
        yield _call("PUT", f"{STORAGE}{wanted['bucket']['name']}/iam", policy, "set access to the bucket")


def _mended(asked: dict[str, Any], policy: Json, site: Json) -> Json | None:
    """The policy with what our accounts lack and without what they have too much; None if it is right already."""
    missing, surplus = _grant_changes(asked, policy, site)
    if not missing and not surplus:
        return None
    bindings = [one for one in policy.get("bindings", []) if "condition" in one]
    plain = (facts.grants(policy.get("bindings", [])) | missing) - surplus
    for role in sorted({role for role, _ in plain}):
        bindings.append({"role": role, "members": sorted(member for one, member in plain if one == role)})
    return {**policy, "bindings": bindings, "version": max(policy.get("version", 1), 1)}


def farewell(wanted: Json, live: Live) -> list[Json]:
    """What has to be undone before accounts go, or Google keeps the names of the dead in its policies."""
    return list(_grant_calls(wanted, live, none=True))


def _instance_calls(wanted: Json, node: Json, there: Json) -> Iterator[Json]:
    """Tags and metadata at any time, machine type and account between a stop and a start."""
    found = facts.differences(facts.wanted_instance(node), facts.live_instance(there))
    base = f"{COMPUTE}{wanted['project']}/zones/{node['zone']}/instances/{node['name']}"
    name = node["name"]
    if "tags" in found:
        body = {"items": node["tags"]["items"], "fingerprint": there["tags"]["fingerprint"]}
        yield _call("POST", f"{base}/setTags", body, f"set the tags of {name}")
    if "metadata" in found:
        items = [{"key": key, "value": value} for key, value in node["metadata"].items()]
        body = {"items": items, "fingerprint": there["metadata"]["fingerprint"]}
        yield _call("POST", f"{base}/setMetadata", body, f"set the metadata of {name}")
    still = {*_STANDING_STILL} & found.keys()
    if still and "running" not in found:
        yield _call("POST", f"{base}/stop", {}, f"stop {name}")
    if "machine type" in still:
        body = {"machineType": f"zones/{node['zone']}/machineTypes/{node['machine_type']}"}
        yield _call("POST", f"{base}/setMachineType", body, f"set the machine type of {name}")
    if "accounts" in still:
        yield _call("POST", f"{base}/setServiceAccount", node["service_accounts"][0], f"set the account of {name}")
    if still or "running" in found:
        yield _call("POST", f"{base}/start", {}, f"start {name}")

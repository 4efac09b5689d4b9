"""Google's own Ansible modules against a fake Google (tests/fake_google): made, kept, changed, interrupted, removed."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_google.cloud import API, RefusedError
from fake_google.discovery import Request
from provision_rig import PROJECT, Site
from torchrelay.provision.google import Google
from torchrelay.provision.survey import look

NAMES = {
    "global/networks/torchrelay-dev",
    "regions/europe-west4/subnetworks/torchrelay-dev",
    *(f"global/firewalls/torchrelay-dev-{name}" for name in ("ssh-iap", "ssh-control", "gateway", "metrics")),
    *(f"zones/europe-west4-a/instances/torchrelay-dev-{name}" for name in ("training-1", "serving-1")),
    *(f"torchrelay-dev-{role}@{PROJECT}.iam.gserviceaccount.com" for role in ("training", "serving")),
    f"{PROJECT}-torchrelay-dev",
}
# What a provision of all that asks of Google: a call a thing, then retention, access to the project and to the bucket.
CALLS = len(NAMES) + 3


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with made.proxy:
        yield made
    assert made.cloud.violations == []
    assert made.cloud.token not in made.log()


def granted(site: Site, policy: str = "") -> set[tuple[str, str]]:
    """(role, account) of ours in a policy."""
    return {
        (one["role"], member.removeprefix("serviceAccount:").partition("@")[0])
        for one in site.cloud.policies[policy]["bindings"]
        for member in one["members"]
        if member.startswith("serviceAccount:")
    }


def ports(site: Site, rule: str) -> tuple[list[str], list[str]]:
    found = site.cloud.compute[f"projects/{PROJECT}/global/firewalls/torchrelay-dev-{rule}"]
    return found.get("sourceRanges", []) + found.get("sourceTags", []), found["allowed"][0]["ports"]


def test_it_is_made_as_planned_kept_changed_as_planned_and_taken_away(site: Site) -> None:
    planned = site.ok("plan-provision")
    assert len(re.findall(r"^  create ", planned, re.MULTILINE)) == len(NAMES)
    assert "0.1551  e2-standard-4, 50 GB of disk\n" in planned and "prices of 2025-03-06" in planned
    assert site.cloud.changes == [] and site.names() == set()

    assert site.ok("provision").partition("dev stands")[0] == planned
    assert site.names() == NAMES and len(site.cloud.changes) == CALLS
    check_what_stands(site)
    check_that_again_changes_nothing(site)
    assert "is what it should be" in site.ok("verify-gcp")
    check_the_inventory(site)
    check_that_drift_is_planned_and_mended(site)
    check_tear_down(site)


def check_what_stands(site: Site) -> None:
    training, serving = site.machine("training-1"), site.machine("serving-1")
    assert training["guestAccelerators"][0]["acceleratorType"].startswith("https://www.googleapis.com/compute/v1/")
    assert training["scheduling"]["onHostMaintenance"] == "TERMINATE"
    assert "guestAccelerators" not in serving and serving["scheduling"]["onHostMaintenance"] == "MIGRATE"
    assert (
        "accessConfigs" not in serving["networkInterfaces"][0] or not serving["networkInterfaces"][0]["accessConfigs"]
    )
    assert ports(site, "ssh-iap") == (["35.235.240.0/20"], ["22"])
    assert ports(site, "ssh-control") == (["torchrelay-dev-control"], ["22"])
    assert ports(site, "gateway") == (["198.51.100.0/24"], ["8443"])
    bucket = site.cloud.buckets[f"{PROJECT}-torchrelay-dev"]
    assert bucket["iamConfiguration"] == {
        "publicAccessPrevention": "enforced",
        "uniformBucketLevelAccess": {"enabled": True},
    }
    assert bucket["versioning"] == {"enabled": True}
    assert bucket["softDeletePolicy"] == {"retentionDurationSeconds": str(30 * 86400)}
    both = ("torchrelay-dev-training", "torchrelay-dev-serving")
    roles = ("roles/logging.logWriter", "roles/monitoring.metricWriter")
    assert granted(site) == {(role, account) for role in roles for account in both}
    assert granted(site, f"{PROJECT}-torchrelay-dev") == {("roles/storage.objectUser", "torchrelay-dev-training")}
    assert {"role": "roles/owner", "members": ["user:me@example.org"]} in site.cloud.policies[""]["bindings"]


def check_the_inventory(site: Site) -> None:
    found = site.listed()
    both = ["torchrelay-dev-serving-1", "torchrelay-dev-training-1"]
    assert found["training"]["hosts"] == both[1:] and found["serving"]["hosts"] == both[:1]
    assert sorted(found["dev"]["hosts"]) == sorted(found["nodes"]["hosts"]) == both
    # Ansible marks what comes from outside, by an object around the text.
    assert '"10.20.0.' in json.dumps(found["_meta"]["hostvars"][both[0]]["ansible_host"])


def check_that_again_changes_nothing(site: Site) -> None:
    before = len(site.cloud.changes)
    assert "stands as it is wanted" in site.ok("provision")
    assert len(site.cloud.changes) == before
    assert {
        int(count) for count in re.findall(r"changed=(\d+)", site.log().rpartition("TASK [gcp : Configure]")[2])
    } == {0}


def check_that_drift_is_planned_and_mended(site: Site) -> None:
    """What somebody changed at Google by hand, and what changed in the inventory."""
    cloud, machines = site.cloud, f"projects/{PROJECT}/zones/europe-west4-a/instances/torchrelay-dev-"
    kept = copy.deepcopy(cloud.compute)
    cloud.compute[f"projects/{PROJECT}/global/firewalls/torchrelay-dev-ssh-iap"]["sourceRanges"].append("0.0.0.0/0")
    hole = {"name": "hole", "network": kept[f"projects/{PROJECT}/global/firewalls/torchrelay-dev-ssh-iap"]["network"]}
    cloud.compute[f"projects/{PROJECT}/global/firewalls/hole"] = hole | {"allowed": [{"IPProtocol": "all"}]}
    cloud.compute[f"{machines}serving-1"]["tags"] = {"items": ["torchrelay-dev-node"], "fingerprint": "tags-x"}
    cloud.compute[f"{machines}serving-1"]["metadata"]["items"] = [{"key": "ssh-keys", "value": "me:ssh-rsa AAAA"}]
    owner = f"serviceAccount:torchrelay-dev-serving@{PROJECT}.iam.gserviceaccount.com"
    cloud.policies[""]["bindings"].append({"role": "roles/owner", "members": [owner]})
    nodes = [
        {"name": "serving-1", "role": "serving", "machine_type": "e2-standard-2", "gateway": True, "external": False}
    ]
    site.want(gcp_nodes=nodes)

    before = len(cloud.changes)
    said = site.refused("provision", status=3)
    assert "destroy instance torchrelay-dev-training-1" in said and "restart instance torchrelay-dev-serving-1" in said
    assert "make provision PERIMETER=dev CONFIRM=dev" in said
    assert len(cloud.changes) == before

    planned = site.ok("provision", "--confirm", "dev")
    for line in (
        r"change +firewall +torchrelay-dev-ssh-iap +sources: 0.0.0.0/0, 35.235.240.0/20 → 35.235.240.0/20",
        r"change +project access .*- roles/owner torchrelay-dev-serving",
        r"restart +instance +torchrelay-dev-serving-1 +machine type: e2-standard-4 → e2-standard-2; tags: .*",
        r"destroy +firewall +hole",
        r"destroy +account +torchrelay-dev-training@",
    ):
        assert re.search(line, planned), planned
    serving = site.machine("serving-1")
    assert serving["machineType"].endswith("/e2-standard-2") and serving["status"] == "RUNNING"
    assert sorted(serving["tags"]["items"])[0] == "torchrelay-dev-gateway"
    assert {item["key"] for item in serving["metadata"]["items"]} == {"enable-oslogin", "block-project-ssh-keys"}
    assert ports(site, "ssh-iap") == (["35.235.240.0/20"], ["22"])
    assert site.names() == {name for name in NAMES if "training" not in name}
    assert ("roles/owner", "torchrelay-dev-serving") not in granted(site)


def check_tear_down(site: Site) -> None:
    bucket = f"{PROJECT}-torchrelay-dev"
    before = len(site.cloud.changes)
    assert "CONFIRM=dev" in site.refused("tear-down", "--confirm", "prod", status=3)
    assert len(site.cloud.changes) == before
    site.cloud.objects.add(bucket)
    assert "but its bucket" in site.ok("tear-down", "--confirm", "dev")
    assert site.names() == {bucket}
    assert granted(site) == granted(site, bucket) == set()


def test_a_rerun_finishes_whatever_stopped_it(site: Site) -> None:
    busy = {"compute.networks.insert", "cloudresourcemanager.projects.setIamPolicy"}

    def stumble(_number: int, request: Request) -> None:
        if request.method in busy:
            busy.remove(request.method)
            raise RefusedError(503, "The service is currently unavailable.")

    def die(_number: int, request: Request) -> None:
        if request.method == "compute.instances.insert":
            site.kill()
            site.cloud.after = lambda _number, _request: None

    site.cloud.before, site.cloud.after = stumble, die
    assert site.run("provision").returncode == -9
    assert site.cloud.changes.count("compute.instances.insert") == 1

    site.cloud.fails_late["torchrelay-dev-training-1"] = (
        "Quota 'NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region europe-west4."
    )
    site.cloud.compute.pop(f"projects/{PROJECT}/zones/europe-west4-a/instances/torchrelay-dev-training-1")
    said = site.refused("provision")
    assert "failed at Make the machines" in said and "Quota 'NVIDIA_L4_GPUS' exceeded" in said
    assert "the same command: it goes on where it ended" in said

    site.ok("provision")
    assert site.names() == NAMES and not busy
    check_what_stands(site)


@pytest.mark.whole
@pytest.mark.parametrize("number", range(1, CALLS + 1))
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_call_it_is_finished_by_a_rerun(site: Site, number: int, when: str) -> None:
    def die(count: int, _request: Request) -> None:
        if count == number:
            setattr(site.cloud, when, lambda _count, _request: None)
            site.kill()
            if when == "before":
                raise RefusedError(500, "nobody is there to read this")

    setattr(site.cloud, when, die)
    assert site.run("provision").returncode == -9
    site.ok("provision")
    assert site.names() == NAMES
    check_what_stands(site)


@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_taking_away_killed_at_any_call_is_finished_by_a_rerun(site: Site) -> None:
    site.ok("provision")
    kept = (
        copy.deepcopy(site.cloud.compute),
        dict(site.cloud.accounts),
        dict(site.cloud.buckets),
        dict(site.cloud.policies),
    )
    for number in range(1, len(NAMES) + 3):
        site.cloud.compute, site.cloud.accounts, site.cloud.buckets, site.cloud.policies = copy.deepcopy(kept)
        last = len(site.cloud.changes) + number

        def die(count: int, _request: Request, last: int = last) -> None:
            if count == last:
                site.kill()

        site.cloud.after = die
        assert site.run("tear-down", "--confirm", "dev").returncode == -9
        site.ok("tear-down", "--confirm", "dev")
        assert site.names() == set()
        assert granted(site) == set()


def test_what_only_has_a_similar_name_is_left_to_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in site.proxy.environment.items():
        monkeypatch.setenv(name, value)
    compute = f"projects/{PROJECT}"
    for name, network in (("ours", "torchrelay-dev"), ("theirs", "torchrelay-dev-two")):
        link = f"{API}/{compute}/global/networks/{network}"
        site.cloud.compute[f"{compute}/global/firewalls/{name}"] = {"name": name, "network": link}
        site.cloud.compute[f"{compute}/zones/europe-west4-a/instances/{name}"] = {
            "name": name,
            "zone": f"{API}/{compute}/zones/europe-west4-a",
            "labels": {"torchrelay_perimeter": "dev"},
            "networkInterfaces": [{"network": link}],
        }
        email = f"{network}-control@{PROJECT}.iam.gserviceaccount.com"
        site.cloud.accounts[email] = {"email": email}
    wanted = {"project": PROJECT, "region": "europe-west4", "name": "torchrelay-dev", "perimeter": "dev"}
    live = look(Google(site.cloud.token), wanted | {"bucket": {"name": "a-bucket"}})
    assert [*live.instances] == [*live.firewalls] == ["ours"]
    assert live.accounts == {f"torchrelay-dev-control@{PROJECT}.iam.gserviceaccount.com"}


def test_production_is_told_twice(site: Site) -> None:
    site.want(gcp_perimeter="production")
    site.cloud.buckets[f"{PROJECT}-torchrelay-production"] = {
        "location": "EUROPE-WEST4",
        "name": f"{PROJECT}-torchrelay-production",
    }
    site.cloud.policies[f"{PROJECT}-torchrelay-production"] = copy.deepcopy(site.cloud.policies[""])
    assert "CONFIRM=dev PRODUCTION=yes" in site.refused("tear-down", "--confirm", "dev", status=3)
    assert site.cloud.changes == []


def test_what_google_refuses_is_told(site: Site) -> None:
    site.proxy.environment["GCP_ACCESS_TOKEN"] = "an-old-token"
    assert "Google answered 401" in site.refused("plan-provision")
    site.want(gcp_nodes=[{"name": "serving-1", "role": "serving", "machine_type": "e2-standard-4", "gpu_typ": "a"}])
    assert "gpu_typ" in site.refused("plan-provision")
    site.want(gcp_nodes=[], gcp_inside=[{"name": "all", "to": ["node"], "ports": [1]}])
    assert "lets nobody in" in site.refused("plan-provision")

"""What is planned for a perimeter at Google, from what is wanted and what stands; and what it costs."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from torchrelay.errors import ConfigError, ProvisionError
from torchrelay.provision.google import token
from torchrelay.provision.perimeter import settled
from torchrelay.provision.plan import calls, compare, farewell
from torchrelay.provision.prices import Prices, RegionPrices, costs, read_prices
from torchrelay.provision.survey import Live, is_ours

Json = dict[str, Any]
COMPUTE = "https://www.googleapis.com/compute/v1/projects/a-project"
ZONE = "europe-west4-a"
OURS = "serviceAccount:relay-training@a-project.iam.gserviceaccount.com"
SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
THEIRS = {"role": "roles/owner", "members": ["user:me@example.org"]}
CONDITIONAL = {"role": "roles/viewer", "members": [OURS], "condition": {"expression": "true"}}


@pytest.fixture
def wanted() -> Json:
    """In the form of the google.cloud modules, as the role `gcp` describes it."""
    return {
        "project": "a-project",
        "region": "europe-west4",
        "zone": ZONE,
        "name": "relay",
        "perimeter": "dev",
        "network": {"name": "relay", "routing_config": {"routing_mode": "REGIONAL"}},
        "subnetwork": {"name": "relay", "ip_cidr_range": "10.0.0.0/24", "private_ip_google_access": True},
        "firewalls": [
            {
                "name": "relay-ssh",
                "source_ranges": ["35.235.240.0/20"],
                "source_tags": [],
                "target_tags": ["relay-node"],
                "allowed": [{"ip_protocol": "tcp", "ports": ["22"]}],
            }
        ],
        "accounts": [{"name": OURS.partition(":")[2], "display_name": "relay training"}],
        "bucket": {
            "name": "a-bucket",
            "location": "EUROPE-WEST4",
            "labels": {},
            "versioning": {"enabled": True},
            "iam_configuration": {
                "public_access_prevention": "enforced",
                "uniform_bucket_level_access": {"enabled": True},
            },
            "lifecycle": {"rule": [{"condition": {"days_since_noncurrent_time": 30}}]},
        },
        "retention_seconds": 2592000,
        "project_grants": {"roles/logging.logWriter": [OURS]},
        "bucket_grants": {"roles/storage.objectViewer": None},
        "instances": [
            {
                "name": "relay-training-1",
                "zone": ZONE,
                "machine_type": "g2-standard-4",
                "labels": {},
                "tags": {"items": ["relay-node"]},
                "metadata": {"enable-oslogin": "TRUE"},
                "service_accounts": [{"email": OURS.partition(":")[2], "scopes": SCOPES}],
                "disks": [{"initialize_params": {"disk_size_gb": 73}}],
                "network_interfaces": [{"access_configs": [{}]}],
                "guest_accelerators": [{"accelerator_type": f"{COMPUTE}/x/nvidia-l4", "accelerator_count": 1}],
                "shielded_instance_config": {"enable_secure_boot": False},
            }
        ],
    }


@pytest.fixture
def machine() -> Json:
    """The machine above, in Google's form."""
    return {
        "name": "relay-training-1",
        "zone": f"{COMPUTE}/zones/{ZONE}",
        "status": "RUNNING",
        "machineType": f"{COMPUTE}/zones/{ZONE}/machineTypes/g2-standard-4",
        "tags": {"items": ["relay-node"], "fingerprint": "tags"},
        "metadata": {"items": [{"key": "enable-oslogin", "value": "TRUE"}], "fingerprint": "metadata"},
        "serviceAccounts": [{"email": OURS.partition(":")[2], "scopes": SCOPES}],
        "networkInterfaces": [{"accessConfigs": [{}]}],
        "guestAccelerators": [{"acceleratorType": f"{COMPUTE}/x/nvidia-l4", "acceleratorCount": 1}],
    }


@pytest.fixture
def live(machine: Json) -> Live:
    """All of it, as it is wanted."""
    return Live(
        network={"routingConfig": {"routingMode": "REGIONAL"}},
        subnetwork={"ipCidrRange": "10.0.0.0/24", "privateIpGoogleAccess": True},
        firewalls={
            "relay-ssh": {
                "sourceRanges": ["35.235.240.0/20"],
                "targetTags": ["relay-node"],
                "allowed": [{"IPProtocol": "tcp", "ports": ["22"]}],
            }
        },
        accounts={OURS.partition(":")[2]},
        bucket={
            "location": "EUROPE-WEST4",
            "versioning": {"enabled": True},
            "iamConfiguration": {
                "publicAccessPrevention": "enforced",
                "uniformBucketLevelAccess": {"enabled": True, "lockedTime": "2027-01-01"},
            },
            "softDeletePolicy": {"retentionDurationSeconds": "2592000"},
            "lifecycle": {"rule": [{"condition": {"daysSinceNoncurrentTime": 30}}]},
        },
        instances={"relay-training-1": machine},
        project_policy={
            "bindings": [THEIRS, CONDITIONAL, {"role": "roles/logging.logWriter", "members": [OURS]}],
            "etag": "e",
            "version": 3,
        },
    )


def steps(wanted: Json, live: Live) -> list[tuple[str, str]]:
    return [(step.action, step.name) for step in compare(wanted, live)]


def test_what_stands_as_it_is_wanted_is_left_alone(wanted: Json, live: Live) -> None:
    assert compare(wanted, live) == []
    assert calls(wanted, live) == []


def test_where_nothing_stands_all_is_made(wanted: Json) -> None:
    nothing = Live(None, None, {}, set(), None, {}, {"bindings": [THEIRS], "etag": "e"})
    made = [step.kind for step in compare(wanted, nothing) if step.action == "create"]
    assert made == ["network", "subnet", "firewall", "account", "bucket", "instance"]
    assert [call["name"] for call in calls(wanted, nothing)] == ["set access to the project"]


@pytest.mark.parametrize(
    ("change", "action", "made"),
    [
        ({"tags": {"items": [], "fingerprint": "t"}}, "change", ["setTags"]),
        ({"metadata": {"fingerprint": "m"}}, "change", ["setMetadata"]),
        ({"labels": {"goog-ops": "x"}}, None, []),
        ({"labels": {"torchrelay_role": "x"}}, "change", []),
        ({"status": "TERMINATED"}, "change", ["start"]),
        ({"machineType": "x/e2-medium"}, "restart", ["stop", "setMachineType", "start"]),
        ({"serviceAccounts": []}, "restart", ["stop", "setServiceAccount", "start"]),
        ({"machineType": "x/e2-medium", "status": "TERMINATED"}, "restart", ["setMachineType", "start"]),
        ({"guestAccelerators": []}, "replace", []),
        ({"networkInterfaces": [{}]}, "replace", []),
    ],
)
def test_a_machine_is_changed_as_google_lets_it_be(
    wanted: Json, live: Live, machine: Json, change: Json, action: str | None, made: list[str]
) -> None:
    machine |= change
    assert steps(wanted, live) == ([(action, "relay-training-1")] if action else [])
    found = calls(wanted, live)
    assert [call["url"].rpartition("/")[2] for call in found] == made
    assert all(call["body"].get("fingerprint", "t")[0] in "tm" for call in found)


def test_a_machine_in_another_zone_is_made_anew(wanted: Json, live: Live, machine: Json) -> None:
    machine["zone"] = f"{COMPUTE}/zones/us-central1-a"
    (step,) = compare(wanted, live)
    assert (step.action, step.zone) == ("replace", "us-central1-a")
    assert step.interrupts


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sourceRanges": ["0.0.0.0/0"]}, "sources: 0.0.0.0/0 → 35.235.240.0/20"),
        ({"sourceTags": ["other"]}, "source tags: other → none"),
        ({"allowed": [{"IPProtocol": "tcp"}]}, "ports: tcp:all → tcp:22"),
        ({"disabled": True}, "disabled: True → False"),
    ],
)
def test_a_rule_that_lets_in_more_or_less_is_set_right(wanted: Json, live: Live, change: Json, told: str) -> None:
    live.firewalls["relay-ssh"] |= change
    (step,) = compare(wanted, live)
    assert (step.action, step.why) == ("change", told)
    (call,) = calls(wanted, live)
    assert call["method"] == "PATCH"
    assert call["body"]["sourceRanges"] == ["35.235.240.0/20"] and call["body"]["sourceTags"] == []


def test_what_nobody_wants_any_more_is_destroyed(wanted: Json, live: Live, machine: Json) -> None:
    live.instances["relay-old"] = machine | {"name": "relay-old"}
    live.firewalls["hole"] = {}
    live.accounts.add("relay-serving@a-project.iam.gserviceaccount.com")
    assert steps(wanted, live) == [
        ("destroy", "relay-old"),
        ("destroy", "hole"),
        ("destroy", "relay-serving@a-project.iam.gserviceaccount.com"),
    ]


def test_access_beyond_what_is_wanted_is_taken_and_that_of_others_kept(wanted: Json, live: Live) -> None:
    live.project_policy["bindings"][0] = {"role": "roles/owner", "members": [OURS, "user:me@example.org"]}
    (step,) = compare(wanted, live)
    assert (step.kind, step.why) == ("project access", "- roles/owner relay-training")
    (call,) = calls(wanted, live)
    policy = call["body"]["policy"]
    assert policy["etag"] == "e" and policy["version"] == 3
    assert policy["bindings"] == [
        CONDITIONAL,
        {"role": "roles/logging.logWriter", "members": [OURS]},
        THEIRS,
    ]


def test_before_accounts_go_their_access_does(wanted: Json, live: Live) -> None:
    (call,) = farewell(wanted, live)
    assert call["body"]["policy"]["bindings"] == [CONDITIONAL, THEIRS]


def test_a_bucket_is_given_its_retention_back(wanted: Json, live: Live) -> None:
    assert live.bucket is not None
    live.bucket["softDeletePolicy"] = {"retentionDurationSeconds": "0"}
    (call,) = calls(wanted, live)
    assert call["body"] == {"softDeletePolicy": {"retentionDurationSeconds": "2592000"}}


@pytest.mark.parametrize(("answers", "left"), [([[]], []), ([["a"], []], []), ([["a"], ["b"], ["c"]], ["c"])])
def test_google_is_given_time(answers: list[list[str]], left: list[str]) -> None:
    asked = iter(answers)
    assert settled(lambda: next(asked), (0, 0, 0)) == left
    assert list(asked) == []


@pytest.mark.parametrize(
    ("email", "ours"),
    [
        ("relay-control@a-project.iam.gserviceaccount.com", True),
        ("relay-two-control@a-project.iam.gserviceaccount.com", False),
        ("relay-control@other.iam.gserviceaccount.com", False),
        ("relay-backup@a-project.iam.gserviceaccount.com", False),
    ],
)
def test_accounts_of_others_are_no_business_of_ours(wanted: Json, email: str, ours: bool) -> None:
    assert is_ours(email, wanted) is ours


def prices(**region: Any) -> Prices:
    made = {"europe-west4": RegionPrices(**region)}
    return Prices(date=datetime.date(2026, 1, 1), source="a list", currency="EUR", regions=made)


def test_a_machine_costs_what_its_parts_cost(wanted: Json) -> None:
    known = prices(machines={"g2-standard-4": 1.0}, gpus={"nvidia-l4": 2.0}, disk_gb_month=0.1, address_hour=0.005)
    (cost,) = costs(wanted, known)
    assert cost.hour == pytest.approx(1 + 2 + 0.1 * 73 / 730 + 0.005)
    assert cost.unknown == ()


def test_a_price_that_nobody_told_is_unknown(wanted: Json) -> None:
    (cost,) = costs(wanted, prices(machines={"g2-standard-4": 1.0}, disk_gb_month=0.1))
    assert cost.hour == pytest.approx(1.01)
    assert cost.unknown == ("1 × nvidia-l4", "an address")
    (cost,) = costs(wanted | {"region": "us-central1"}, prices())
    assert cost.hour == 0 and len(cost.unknown) == 4


def test_old_prices_are_called_old() -> None:
    assert prices().age_note(datetime.date(2026, 2, 1)) == ""
    assert "365 days old" in prices().age_note(datetime.date(2027, 1, 1))


def test_the_shipped_table_says_when_and_where_from_and_a_broken_one_is_told(tmp_path: Path) -> None:
    shipped = read_prices(Path(__file__).resolve().parents[2] / "config" / "gcp-prices.yaml")
    assert shipped.source and shipped.date < datetime.date(2030, 1, 1)
    (tmp_path / "prices.yaml").write_text("date: yesterday\n")
    with pytest.raises(ConfigError):
        read_prices(tmp_path / "prices.yaml")


def test_without_credentials_the_next_command_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GCP_ACCESS_TOKEN", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ProvisionError) as caught:
        token()
    assert caught.value.next_command == "gcloud auth application-default login"
    monkeypatch.setenv("GCP_ACCESS_TOKEN", "given")
    assert token() == "given"

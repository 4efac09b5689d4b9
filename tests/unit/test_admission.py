"""Dev's gatekeeper, and what every gatekeeper asks first: a verdict, a signed archive, and its own proof."""

import json
import os
import subprocess
import sys

import pytest

from torchrelay.config import Serving
from torchrelay.delivery.admission import Trusting, decision, refusal, tags_hash, wanted_version
from torchrelay.delivery.gatekeeper import Aside
from torchrelay.delivery.store import Admission
from torchrelay.handover import WantedVersion
from torchrelay.lineage import TAG_ARCHIVE_URL, TAG_DIGEST, TAG_ENVIRONMENT, TAG_PROOF, TAG_SERVING, TAG_VERDICT
from torchrelay.tracking import ModelVersion


def version(**changes: str) -> ModelVersion:
    tags = {
        TAG_VERDICT: "pass",
        TAG_DIGEST: "d" * 64,
        TAG_PROOF: "d" * 64,
        TAG_ARCHIVE_URL: "http://127.0.0.1:1/a",
        TAG_ENVIRONMENT: "py311-cpu-0",
        TAG_SERVING: json.dumps({**Serving(workers=3).model_dump(), "keep_inputs": True}),
        **changes,
    }
    kept = {key: value for key, value in tags.items() if value}
    return ModelVersion(name="tiny", version="1", run_id="r", source="s", status="READY", tags=kept, aliases=())


def test_a_passed_signed_and_proven_version_is_admitted() -> None:
    assert refusal(version()) is None
    found = Trusting().decide(version(), None)
    assert found.admitted
    assert found.wanted == wanted_version(version())


def test_each_missing_proof_refuses_with_its_own_reason() -> None:
    reasons = {
        refusal(version(**{TAG_VERDICT: ""})),
        refusal(version(**{TAG_VERDICT: "refuse"})),
        refusal(version(**{TAG_DIGEST: ""})),
        refusal(version(**{TAG_PROOF: ""})),
    }
    assert None not in reasons
    assert len(reasons) == 4


def test_a_refused_version_is_remembered_with_its_reason_and_nothing_to_serve() -> None:
    found = Trusting().decide(version(**{TAG_VERDICT: "refuse"}), None)
    assert not found.admitted
    assert "the gate refused it" in found.reason
    assert found.wanted is None


@pytest.mark.parametrize(
    "tags",
    [
        *({TAG_DIGEST: bad, TAG_PROOF: bad} for bad in ("..", "../..", "/etc", "a/b", ".hidden", "d\n")),
        *({TAG_ENVIRONMENT: bad} for bad in ("../other", "/", "", "..")),
        *({TAG_SERVING: bad} for bad in ("", "nonsense", "[]", '{"workers": 0}', '{"keep_inputs": "perhaps"}')),
    ],
)
def test_tags_that_no_pipeline_writes_are_a_reason_and_no_path(tags: dict[str, str]) -> None:
    """Anybody who can write to the registry can write them, and folders are named after them."""
    assert "not what the pipeline writes" in (refusal(version(**tags)) or "")


def test_a_proof_of_another_archive_does_not_count() -> None:
    assert "not proven" in (refusal(version(**{TAG_PROOF: "e" * 64})) or "")


def test_what_a_node_is_told_comes_from_the_registry_alone() -> None:
    wanted = wanted_version(version())
    assert (wanted.component, wanted.version, wanted.digest) == ("tiny", "1", "d" * 64)
    assert (wanted.workers, wanted.keep_inputs) == (3, True)


def test_whatever_the_decision_reads_makes_another_key() -> None:
    keys = {
        tags_hash(version(**{name: "x"}))
        for name in (TAG_VERDICT, TAG_DIGEST, TAG_PROOF, TAG_ARCHIVE_URL, TAG_ENVIRONMENT, TAG_SERVING)
    }
    assert len(keys | {tags_hash(version())}) == 7


class Niceness(Trusting):
    """Refuses, and says at which niceness a program ran that it started."""

    def decide(self, version: ModelVersion, live: WantedVersion | None) -> Admission:
        command = [sys.executable, "-c", "import os; print(os.nice(0))"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return decision(version, "p", said, None)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has a niceness for each thread")
def test_a_look_at_a_version_and_all_that_it_starts_yields_to_what_serves() -> None:
    aside, found = Aside(Niceness()), None
    while found is None:
        found = aside.decide(version(), None)
    assert int(found.reason) == max(os.nice(0), 5)

"""Production follows the registry, for real: promotion by stages under load, refusal, rollback, and the way back.

It takes minutes because it starts two perimeters of real servers, trains twice, and sits out the stages of roll-outs.
"""

import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import urllib3
import yaml

from tests.conftest import Checkout

pytestmark = [pytest.mark.real, pytest.mark.slow]

COMPONENT = "fashion_mnist"
HTTP = urllib3.PoolManager(maxsize=16, retries=False)
STAGES = [{"weight": 0, "bake_s": 2, "min_requests": 10}, {"weight": 25, "bake_s": 2, "min_requests": 10}]


@pytest.fixture(scope="module")
def site(checkout: Checkout) -> Checkout:
    """A committed checkout with a slice of the data, in which dev serves version 1 and production nothing yet."""
    params = checkout.folder / "components" / COMPONENT / "params.yaml"
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), "limit": 1500}))
    set_policy(checkout)
    for words in (["add", "-A"], ["commit", "-qm", "the checkout"]):
        subprocess.run(["git", *words], cwd=checkout.folder, env=checkout.environment, check=True)
    checkout.ok("deploy-dev", "--component", COMPONENT)
    return checkout


def set_policy(checkout: Checkout, floor: float = 0.3, seed: int = 1, stages: list[dict[str, Any]] = STAGES) -> None:
    overlay = {
        "metric": {"floor": floor, "allowed_regression": 1.0, "allowed_slice_regression": None},
        "training": {"parameters": {"epochs": 1, "seed": seed}},
        "serving": {"workers": 1},
        "latency": {"p99_ms": 5000},
        "rollout": {"stages": stages, "max_disagreement": 0.9},
    }
    (checkout.folder / "config" / "local.yaml").write_text(yaml.safe_dump({"components": {COMPONENT: overlay}}))


def gateway(checkout: Checkout) -> str:
    return f"http://127.0.0.1:{checkout.port_base + 50}"


def ask(checkout: Checkout, **headers: str) -> urllib3.BaseHTTPResponse:
    golden = json.loads((checkout.folder / "results" / COMPONENT / "train" / "golden.json").read_text())
    body = json.dumps({"instances": golden["instances"][:1]}).encode()
    url = f"{gateway(checkout)}/predictions/{COMPONENT}"
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return HTTP.request("POST", url, body=body, headers={"content-type": "application/json"} | names)


@contextmanager
def clients(checkout: Checkout, count: int = 3) -> Iterator[Counter[tuple[int, str]]]:
    """Clients that ask without a pause; what they saw: status and version."""
    seen: Counter[tuple[int, str]] = Counter()
    done = threading.Event()

    def loop() -> None:
        while not done.is_set():
            answer = ask(checkout)
            seen[answer.status, answer.headers.get("x-model-version", "")] += 1
            time.sleep(0.02)

    threads = [threading.Thread(target=loop) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        done.set()
        for thread in threads:
            thread.join()


def production(checkout: Checkout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(checkout.ok("status", "--json").stdout)["perimeters"]["production"]
    return found


def history(checkout: Checkout) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(checkout.ok("history", "--json").stdout)
    return found


def until(condition: Any, seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture(scope="module")
def story(site: Checkout) -> list[dict[str, Any]]:
    """One story, since each chapter needs the one before, whatever order tests run in; the ledger at its end.

    Every chapter starts with what the operator would type.
    """
    assert production(site)["components"] == {}
    said = site.ok("promote").stderr
    assert "production" in said
    assert ask(site).headers["x-model-version"] == "1"
    state = production(site)["components"][COMPONENT]
    assert (state["wanted"], state["converged"]) == ("1", True)
    assert [(node["name"], node["version"], node["healthy"]) for node in state["nodes"]] == [
        ("production-1", "1", True),
        ("production-2", "1", True),
    ]

    again = site.run("promote")
    assert again.returncode == 3
    assert "live in production already" in again.stderr

    set_policy(site, seed=2)
    site.ok("deploy-dev", "--component", COMPONENT)
    assert ask(site).headers["x-model-version"] == "1"
    with clients(site) as seen:
        said = site.ok("promote").stderr
    assert {status for status, _ in seen} == {200}, seen
    assert {version for _, version in seen} == {"1", "2"}
    assert all(word in said for word in ("shadow", "25 %", "p99")), said
    assert ask(site).headers["x-model-version"] == "2"

    with clients(site) as seen:
        began = time.monotonic()
        site.ok("rollback")
        took = time.monotonic() - began
    assert {status for status, _ in seen} == {200}, seen
    assert ask(site).headers["x-model-version"] == "1"
    assert took < 15, "kept warm, so a matter of seconds even on a busy machine"

    move_alias_as_the_page_does(site, "2")
    until(lambda: in_production(site, "canary", "2"), 10, "the webhook has woken the orchestrator")
    until(lambda: ask(site).headers["x-model-version"] == "2" and not in_production(site, "canary", "2"), 120, "live")
    site.ok("rollback")

    set_policy(site, floor=0.999, seed=2)
    refused = site.run("promote", "--version", "2")
    assert refused.returncode == 3, refused.stderr
    assert "floor" in refused.stderr
    assert ask(site).headers["x-model-version"] == "1"
    state = production(site)["components"][COMPONENT]
    assert state["refused"]["version"] == "2"
    assert "floor" in state["refused"]["reason"]
    assert (state["wanted"], state["converged"]) == ("1", True)

    return history(site)


def test_a_version_is_promoted_by_stages_refused_rolled_back_and_traced(
    site: Checkout, story: list[dict[str, Any]]
) -> None:
    entries = story
    moves = [(one["kind"], one["from_version"], one["to_version"]) for one in reversed(entries)]
    assert moves == [
        ("rollout", None, "1"),
        ("rollout", "1", "2"),
        ("rollback", "2", "1"),
        ("rollout", "1", "2"),
        ("rollback", "2", "1"),
        ("refusal", "1", "2"),
    ]
    assert [one["failed_requests"] for one in entries[1:]] == [0, 0, 0, 0, 0]
    assert all(one["report"] for one in entries if one["kind"] != "rollback")

    served = ask(site, x_request_id="who-was-it").headers["x-model-version"]
    found = until(lambda: traced(site, "who-was-it"), 10, "the answer is in the prediction log")
    assert found["version"] == f"{COMPONENT} version {served}"
    assert found["parameters"]["seed"] == served, "version 1 was trained with seed 1, and 2 with 2"
    assert found["commit"] == commit(site)


def move_alias_as_the_page_does(checkout: Checkout, version: str) -> None:
    """The request that MLflow's page sends; the page itself is in test_an_operator_promotes_in_mlflows_page."""
    url = f"{checkout.tracking}/ajax-api/2.0/mlflow/registered-models/alias"
    answer = HTTP.request("POST", url, json={"name": COMPONENT, "alias": "production", "version": version})
    assert answer.status == 200, answer.data


def in_production(checkout: Checkout, what: str, version: str) -> bool:
    found = production(checkout)["components"][COMPONENT].get(what, {})
    return bool(found.get("version") == version)


@pytest.mark.usefixtures("story")
def test_an_operator_promotes_in_mlflows_page(site: Checkout, browser: Any) -> None:
    """With the mouse: the dialog of the version's page sets the alias, and production answers with that version."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    set_policy(site, stages=[])
    # The refused request is still there; in the dialog the same alias again would take it away.
    move_alias_as_the_page_does(site, "1")
    version = json.loads((site.folder / "results" / COMPONENT / "archive.json").read_text())["version"]
    browser.get(f"{site.tracking}/#/models/{COMPONENT}/versions/{version}")
    button = until(lambda: browser.find_elements(By.CSS_SELECTOR, 'button[title="Edit aliases"]'), 60, "the page")[0]
    button.click()
    [field] = until(lambda: browser.find_elements(By.CSS_SELECTOR, "[role=dialog] input"), 10, "the dialog")
    field.send_keys("production", Keys.ENTER)
    buttons = browser.find_elements(By.CSS_SELECTOR, "[role=dialog] button")
    next(one for one in buttons if one.text.startswith("Save")).click()
    until(lambda: (version, True) == wanted_and_converged(site), 90, f"production serves version {version}")
    assert ask(site).headers["x-model-version"] == version


def wanted_and_converged(checkout: Checkout) -> tuple[str, bool]:
    found = production(checkout)["components"].get(COMPONENT, {})
    return found.get("wanted", ""), bool(found.get("converged"))


def traced(checkout: Checkout, request_id: str) -> dict[str, Any] | None:
    done = checkout.run("why", "--id", request_id, "--json")
    found: dict[str, Any] | None = json.loads(done.stdout) if done.returncode == 0 else None
    return found


def commit(checkout: Checkout) -> str:
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=checkout.folder, check=True, capture_output=True, text=True).stdout.strip()

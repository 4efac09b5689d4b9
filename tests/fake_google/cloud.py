"""The state of a fake Google, and the rules of the real one that bite."""

import re
import threading
from collections.abc import Callable
from typing import Any

from fake_google.discovery import Json, Request, recognise

API = "https://www.googleapis.com/compute/v1"
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
ACCOUNT = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")
ACCELERATOR = re.compile(rf"{API}/projects/[^/]+/zones/([^/]+)/acceleratorTypes/(nvidia-[a-z0-9-]+)")
SOFT_DELETE_S = "604800"  # what Google gives a bucket that asks for nothing else
Answer = tuple[int, Json | None]


class RefusedError(Exception):
    """An error of Google's."""

    def __init__(self, status: int, message: str, reason: str = "invalid") -> None:
        super().__init__(message)
        self.answer: Answer = (
            status,
            {"error": {"code": status, "message": message, "errors": [{"message": message, "reason": reason}]}},
        )


class Cloud:
    """One Google with one project. `before` and `after` are asked at every call that changes something."""

    def __init__(self, project: str) -> None:
        self.project = project
        self.token = "ya29.a-token-that-nobody-reads"
        self.compute: dict[str, Json] = {}  # path below compute/v1 → resource
        self.operations: dict[str, Json] = {}
        self.buckets: dict[str, Json] = {}
        self.objects: set[str] = set()  # buckets with something in them
        self.accounts: dict[str, Json] = {}
        self.policies: dict[str, Json] = {"": _policy([{"role": "roles/owner", "members": ["user:me@example.org"]}])}
        self.changes: list[str] = []
        self.violations: list[str] = []
        self.gpu_quota = 8
        self.fails_late: dict[str, str] = {}  # name of a machine → why its operation fails in the end
        self.before: Callable[[int, Request], None] = lambda _number, _request: None
        self.after: Callable[[int, Request], None] = lambda _number, _request: None
        self._lock = threading.Lock()
        self._count = 0

    def answer(self, request: Request, authorization: str) -> Answer:
        with self._lock:
            recognise(request)
            self.violations += request.faults
            try:
                return self._answer(request, authorization)
            except RefusedError as refusal:
                return refusal.answer
            except Exception as error:  # a fault of the fake, for the test to find
                self.violations.append(f"{request.method}: {error!r}")
                return RefusedError(500, repr(error)).answer

    def _answer(self, request: Request, authorization: str) -> Answer:
        if authorization != f"Bearer {self.token}":
            raise RefusedError(401, "Request had invalid authentication credentials.", "authError")
        if request.faults:
            raise RefusedError(400, f"Invalid request: {request.faults[0]}")
        if request.changes:
            self.before(len(self.changes) + 1, request)
        found = self._dispatch(request)
        if request.changes:
            self.changes.append(request.method)
            self.after(len(self.changes), request)
        return found

    def _dispatch(self, request: Request) -> Answer:
        api, collection, verb = request.method.rpartition(".")[0].partition(".")[0], *request.method.split(".")[-2:]
        if collection.endswith("Operations"):
            return 200, self._operation(request) if verb == "get" else {"items": list(self.operations.values())}
        kind = "projects" if api == "cloudresourcemanager" else collection
        handler: Callable[[Request], Answer] | None = getattr(self, f"_{kind}_{_snake(verb)}", None)
        if handler is None and api == "compute":
            handler = getattr(self, f"_{_snake(verb)}", None)
        if handler is None:
            raise RefusedError(501, f"the fake does not know {request.method}")
        return handler(request)

    # Compute Engine

    def _get(self, request: Request) -> Answer:
        return 200, self._there(_path(request))

    def _there(self, path: str) -> Json:
        if path not in self.compute:
            raise RefusedError(404, f"The resource '{path}' was not found", "notFound")
        found = self.compute[path]
        if found.get("status") == "PROVISIONING":
            self.compute[path] = {**found, "status": "RUNNING"}
        return found

    def _list(self, request: Request) -> Answer:
        below = f"{_path(request)}/"
        found = [one for path, one in self.compute.items() if path.startswith(below)]
        return 200, {"items": _filtered(found, request.query.get("filter", ""))}

    def _aggregated_list(self, request: Request) -> Answer:
        zones: Json = {}
        machines = [one for path, one in self.compute.items() if "/instances/" in path]
        for one in _filtered(machines, request.query.get("filter", "")):
            zones.setdefault(f"zones/{_last(one['zone'])}", {"instances": []})["instances"].append(one)
        return 200, {"items": zones}

    def _insert(self, request: Request) -> Answer:
        body = dict(request.body or {})
        if not NAME.fullmatch(body.get("name", "")):
            raise RefusedError(400, f"Invalid value for field 'resource.name': '{body.get('name')}'")
        path = f"{_path(request)}/{body['name']}"
        if path in self.compute:
            raise RefusedError(409, f"The resource '{path}' already exists", "alreadyExists")
        for reference in _references(body):
            self._there(reference)
        collection = _path(request).rpartition("/")[2]
        made = self._machine(body, path) if collection == "instances" else body
        self._count += 1
        made |= {"id": str(self._count), "selfLink": f"{API}/{path}"}
        made |= {scope: f"{API}/{path.rpartition(f'/{scope}s/')[0]}/{scope}s/{request.parameters[scope]}"
                 for scope in ("zone", "region") if scope in request.parameters}  # fmt: skip
        late = self.fails_late.pop(body["name"], None)
        if not late:
            self.compute[path] = made
        # The network's operation takes a moment, so that somebody waits for one; so does one that fails in the end.
        return 200, self._started(path, slow=collection == "networks" or late is not None, error=late)

    def _machine(self, body: Json, path: str) -> Json:
        for account in body.get("serviceAccounts", []):
            if account["email"] not in self.accounts:
                raise RefusedError(400, f"The resource 'serviceAccounts/{account['email']}' was not found")
        self._check_gpus(body, path)
        cards = [dict(card) for card in body["networkInterfaces"]]
        for card in cards:
            card["networkIP"] = f"10.20.0.{2 + len(self.compute)}"
            card["accessConfigs"] = [{**one, "natIP": "192.0.2.1"} for one in card.get("accessConfigs", [])]
        disks = [
            {**{key: value for key, value in disk.items() if key != "initializeParams"}, "source": f"{API}/{path}-disk"}
            for disk in body["disks"]
        ]
        return body | {
            "status": "PROVISIONING",
            "networkInterfaces": cards,
            "disks": disks,
            "tags": {**body.get("tags", {}), "fingerprint": "tags-0"},
            "metadata": {**body.get("metadata", {}), "fingerprint": "metadata-0"},
            "labelFingerprint": "labels-0",
        }

    def _check_gpus(self, body: Json, path: str) -> None:
        gpus = body.get("guestAccelerators", [])
        if gpus and body.get("scheduling", {}).get("onHostMaintenance") != "TERMINATE":
            raise RefusedError(400, "Instances with guest accelerators do not support live migration.")
        for gpu in gpus:
            match = ACCELERATOR.fullmatch(gpu["acceleratorType"])
            if not match or f"/zones/{match[1]}/" not in path:
                raise RefusedError(400, f"Invalid value for field 'acceleratorType': '{gpu['acceleratorType']}'")
        used = sum(gpu["acceleratorCount"] for one in self.compute.values() for gpu in one.get("guestAccelerators", []))
        if used + sum(gpu["acceleratorCount"] for gpu in gpus) > self.gpu_quota:
            raise RefusedError(
                403, f"Quota 'GPUS_ALL_REGIONS' exceeded.  Limit: {self.gpu_quota}.0 globally.", "quotaExceeded"
            )

    def _delete(self, request: Request) -> Answer:
        path = _path(request)
        self._there(path)
        if users := [other for other, one in self.compute.items() if path in _references(one)]:
            message = f"The resource '{path}' is already being used by '{users[0]}'"
            raise RefusedError(400, message, "resourceInUseByAnotherResource")
        del self.compute[path]
        return 200, self._started(path)

    def _patch(self, request: Request) -> Answer:
        path = _path(request)
        self.compute[path] = self._there(path) | (request.body or {})
        return 200, self._started(path)

    def _instances_set_tags(self, request: Request) -> Answer:
        return self._with_fingerprint(request, "tags", "fingerprint")

    def _instances_set_metadata(self, request: Request) -> Answer:
        return self._with_fingerprint(request, "metadata", "fingerprint")

    def _with_fingerprint(self, request: Request, name: str, key: str) -> Answer:
        path, body = _path(request), request.body or {}
        there = self._there(path)
        if body.get(key) != there[name][key]:
            raise RefusedError(
                412, f"Supplied fingerprint does not match current {name} fingerprint.", "conditionNotMet"
            )
        self._count += 1
        self.compute[path] = there | {name: body | {key: f"{name}-{self._count}"}}
        return 200, self._started(path)

    def _instances_set_labels(self, request: Request) -> Answer:
        path, body = _path(request), request.body or {}
        there = self._there(path)
        if body.get("labelFingerprint") != there["labelFingerprint"]:
            raise RefusedError(
                412, "Labels fingerprint either invalid or resource labels have changed", "conditionNotMet"
            )
        self._count += 1
        self.compute[path] = there | {"labels": body["labels"], "labelFingerprint": f"labels-{self._count}"}
        return 200, self._started(path)

    def _instances_set_machine_type(self, request: Request) -> Answer:
        path, machine = _path(request), (request.body or {})["machineType"]
        zone = request.parameters["zone"]
        link = f"{API}/projects/{self.project}/zones/{zone}/machineTypes/{_last(machine)}"
        return self._standing_still(path, {"machineType": link})

    def _instances_set_service_account(self, request: Request) -> Answer:
        return self._standing_still(_path(request), {"serviceAccounts": [request.body]})

    def _standing_still(self, path: str, change: Json) -> Answer:
        there = self._there(path)
        if there["status"] != "TERMINATED":
            raise RefusedError(400, "The instance must be stopped before this can be changed.")
        self.compute[path] = there | change
        return 200, self._started(path)

    def _instances_stop(self, request: Request) -> Answer:
        path = _path(request)
        self.compute[path] = self._there(path) | {"status": "TERMINATED"}
        return 200, self._started(path)

    def _instances_start(self, request: Request) -> Answer:
        path = _path(request)
        self.compute[path] = self._there(path) | {"status": "RUNNING"}
        return 200, self._started(path)

    def _started(self, path: str, slow: bool = False, error: str | None = None) -> Json:
        self._count += 1
        name, scope = f"operation-{self._count}", path.split("/")[2]
        where = path.rsplit("/", 2)[0]
        made: Json = {
            "kind": "compute#operation",
            "name": name,
            "status": "RUNNING" if slow else "DONE",
            "selfLink": f"{API}/{where}/operations/{name}",
            "targetLink": f"{API}/{path}",
            "insertTime": f"{self._count:06}",
            "operationType": scope,
        }
        self.operations[name] = made | {"status": "DONE"}
        if error:
            self.operations[name]["error"] = {"errors": [{"code": "QUOTA_EXCEEDED", "message": error}]}
        return made

    def _operation(self, request: Request) -> Json:
        return self.operations[request.parameters["operation"]]

    # Cloud Storage

    def _buckets_get(self, request: Request) -> Answer:
        return 200, self._bucket(request)

    def _bucket(self, request: Request) -> Json:
        name = request.parameters["bucket"]
        if name not in self.buckets:
            raise RefusedError(404, "The specified bucket does not exist.", "notFound")
        return self.buckets[name]

    def _buckets_insert(self, request: Request) -> Answer:
        body = request.body or {}
        if body["name"] in self.buckets:
            raise RefusedError(
                409, "Your previous request to create the named bucket succeeded and you already own it."
            )
        self.policies[body["name"]] = _policy(
            [{"role": "roles/storage.legacyBucketOwner", "members": [f"projectOwner:{self.project}"]}]
        )
        return 200, self._keep(body)

    def _keep(self, body: Json) -> Json:
        """A whole bucket; what is not named gets Google's own defaults."""
        if body.get("versioning", {}).get("enabled") and body.get("retentionPolicy"):
            raise RefusedError(412, "Object versioning and a retention policy cannot both be there.", "conditionNotMet")
        made = {"softDeletePolicy": {"retentionDurationSeconds": SOFT_DELETE_S}} | body
        self.buckets[body["name"]] = {key: value for key, value in made.items() if key != "project"}
        return self.buckets[body["name"]]

    def _buckets_update(self, request: Request) -> Answer:
        return 200, self._keep({"location": self._bucket(request)["location"], **(request.body or {})})

    def _buckets_patch(self, request: Request) -> Answer:
        return 200, self._keep(self._bucket(request) | (request.body or {}))

    def _buckets_delete(self, request: Request) -> Answer:
        name = self._bucket(request)["name"]
        if name in self.objects:
            raise RefusedError(409, "The bucket you tried to delete is not empty.", "conflict")
        del self.buckets[name], self.policies[name]
        return 204, None

    def _objects_list(self, request: Request) -> Answer:
        there = self._bucket(request)["name"] in self.objects
        return 200, {"kind": "storage#objects", **({"items": [{"name": "an object"}]} if there else {})}

    def _buckets_get_iam_policy(self, request: Request) -> Answer:
        return 200, self.policies[self._bucket(request)["name"]]

    def _buckets_set_iam_policy(self, request: Request) -> Answer:
        return self._set_policy(self._bucket(request)["name"], request.body or {})

    # Access and accounts

    def _projects_get_iam_policy(self, _request: Request) -> Answer:
        return 200, self.policies[""]

    def _projects_set_iam_policy(self, request: Request) -> Answer:
        return self._set_policy("", (request.body or {})["policy"])

    def _set_policy(self, name: str, policy: Json) -> Answer:
        if policy.get("etag") != self.policies[name]["etag"]:
            raise RefusedError(409, "There were concurrent policy changes.", "aborted")
        for email in re.findall(r"'serviceAccount:([^']+)'", str(policy)):
            if email not in self.accounts:
                raise RefusedError(400, f"Service account {email} does not exist.")
        self._count += 1
        self.policies[name] = policy | {"etag": f"etag-{self._count}"}
        return 200, self.policies[name]

    def _serviceAccounts_list(self, _request: Request) -> Answer:  # noqa: N802 - Google's name
        return 200, {"accounts": list(self.accounts.values())}

    def _serviceAccounts_get(self, request: Request) -> Answer:  # noqa: N802
        email = request.parameters["serviceAccountsId"]
        if email not in self.accounts:
            raise RefusedError(404, f"Unknown service account {email}", "notFound")
        return 200, self.accounts[email]

    def _serviceAccounts_create(self, request: Request) -> Answer:  # noqa: N802
        body = request.body or {}
        if not ACCOUNT.fullmatch(body["accountId"]):
            raise RefusedError(400, f"Invalid account id {body['accountId']}")
        email = f"{body['accountId']}@{self.project}.iam.gserviceaccount.com"
        if email in self.accounts:
            raise RefusedError(409, f"Service account {body['accountId']} already exists", "alreadyExists")
        name = f"projects/{self.project}/serviceAccounts/{email}"
        self.accounts[email] = {"name": name, "email": email, **body.get("serviceAccount", {})}
        return 200, self.accounts[email]

    def _serviceAccounts_delete(self, request: Request) -> Answer:  # noqa: N802
        self._serviceAccounts_get(request)
        del self.accounts[request.parameters["serviceAccountsId"]]
        return 200, {}


def _policy(bindings: list[Json]) -> Json:
    return {"bindings": bindings, "etag": "etag-0", "version": 1}


def _snake(verb: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", verb).lower()


def _path(request: Request) -> str:
    """Path below compute/v1, without the verb at its end."""
    path = request.path.removeprefix("/compute/v1/").replace("/aggregated/", "/")
    verb = request.method.rpartition(".")[2]
    return path.removesuffix(f"/{verb}")


def _last(link: str) -> str:
    return link.rpartition("/")[2]


def _references(body: Json) -> list[str]:
    """What this resource needs: its network, and a machine's subnet."""
    links = [body.get("network"), *(card[key] for card in body.get("networkInterfaces", []) for key in card
             if key in ("network", "subnetwork"))]  # fmt: skip
    return [link.removeprefix(f"{API}/") for link in links if link]


def _filtered(found: list[Json], text: str) -> list[Json]:
    """`labels.x = y`, `(labels.x = y) (status = RUNNING)`."""
    for name, value in re.findall(r"([\w.]+) = ([\w-]+)", text):
        found = [one for one in found if _value(one, name) == value]
    return found


def _value(one: Any, name: str) -> Any:
    for part in name.split("."):
        one = (one or {}).get(part)
    return one

"""Is this a request that Google knows? Asked of Google's own discovery documents."""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import googleapiclient

Json = dict[str, Any]
DOCUMENTS = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
APIS = {
    "compute.googleapis.com": "compute.v1",
    "www.googleapis.com": "compute.v1",  # the older host, by which Google's answers name things to this day
    "storage.googleapis.com": "storage.v1",
    "iam.googleapis.com": "iam.v1",
    "cloudresourcemanager.googleapis.com": "cloudresourcemanager.v1",
}
# Fields and parameters that the google.cloud modules send and no document has. Google passes over them.
TOLERATED = {
    ("storage.buckets.delete", "projection"),
    ("storage.buckets.insert", "project"),
    ("storage.buckets.update", "project"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
WIDE = ("int64", "uint64")  # JSON has no room for these: Google takes them as text as well


@dataclass
class Request:
    """A request, what the document calls it, and what is wrong with it."""

    verb: str
    host: str
    path: str
    query: dict[str, str]
    body: Json | None
    method: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        return self.verb != "GET" and not self.method.endswith(".getIamPolicy")


@cache
def _document(name: str) -> Json:
    return json.loads((DOCUMENTS / f"{name}.json").read_text())


@cache
def _methods(name: str) -> list[tuple[str, re.Pattern[str], Json]]:
    document, found = _document(name), []

    def walk(part: Json) -> None:
        for method in part.get("methods", {}).values():
            path = document["servicePath"] + method.get("flatPath", method["path"])
            pattern = re.sub(r"\{\+?(\w+)\}", r"(?P<\1>[^/:]+)", path)
            found.append((method["httpMethod"], re.compile("/" + pattern), method))
        for inner in part.get("resources", {}).values():
            walk(inner)

    walk(document)
    return found


def recognise(request: Request) -> Request:
    """Name the method and its parameters, and note every fault."""
    name = APIS.get(request.host)
    if name is None:
        request.faults.append(f"no API at {request.host}")
        return request
    for verb, pattern, method in _methods(name):
        if verb == request.verb and (match := pattern.fullmatch(request.path)):
            request.method = method["id"]
            request.parameters = match.groupdict()
            request.faults += _query_faults(request.query, method, _document(name))
            request.faults += _body_faults(request, method, _document(name))
            return request
    request.faults.append(f"no method {request.verb} {request.path}")
    return request


def _query_faults(query: dict[str, str], method: Json, document: Json) -> list[str]:
    known = {**document["parameters"], **method.get("parameters", {})}
    faults = [
        f"{method['id']}: no parameter {name}"
        for name in query
        if name not in known and (method["id"], name) not in TOLERATED
    ]
    for name, value in query.items():
        if "enum" in known.get(name, {}) and value not in known[name]["enum"]:
            faults.append(f"{method['id']}: {name}={value}")
        if known.get(name, {}).get("type") == "integer" and not value.isdigit():
            faults.append(f"{method['id']}: {name}={value} is no number")
    for name, one in method.get("parameters", {}).items():
        if one.get("required") and one["location"] == "query" and name not in query:
            faults.append(f"{method['id']}: lacks {name}")
    return faults


def _body_faults(request: Request, method: Json, document: Json) -> list[str]:
    if "request" not in method:
        return [f"{request.method}: takes no body"] if request.body else []
    body = {name: value for name, value in (request.body or {}).items() if (request.method, name) not in TOLERATED}
    return [
        f"{request.method}: {fault}" for fault in _schema_faults(body, method["request"], document["schemas"], "body")
    ]


def _schema_faults(value: Any, schema: Json, schemas: Json, where: str) -> list[str]:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema.get("type", "any")
    if value is None or kind == "any":
        return []
    if schema.get("format") in WIDE and isinstance(value, int | str) and str(value).isdigit():
        return []
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{where} is {value!r} and no {kind}"]
    if kind == "array":
        return [
            fault
            for index, one in enumerate(value)
            for fault in _schema_faults(one, schema["items"], schemas, f"{where}[{index}]")
        ]
    if kind == "object":
        return [fault for name, one in value.items() for fault in _field_faults(name, one, schema, schemas, where)]
    return [f"{where} is {value!r}"] if "enum" in schema and value not in schema["enum"] else []


def _field_faults(name: str, value: Any, schema: Json, schemas: Json, where: str) -> list[str]:
    inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
    return _schema_faults(value, inner, schemas, f"{where}.{name}") if inner else [f"{where} has no {name}"]

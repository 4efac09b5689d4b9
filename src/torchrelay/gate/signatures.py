"""May callers of one model version be sent to another? Compares the model signatures that MLflow keeps.

What a version takes may widen and what it gives may not shrink. The rules of what a schema lets in are MLflow's own
(`mlflow.models.utils._enforce_schema`, MLflow 3): inputs that a schema does not name are ignored, tensors must have
the very element type, columns may be cast to a wider type.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from torchrelay.config import Json

# What MLflow casts a column to without asking: `_enforce_mlflow_datatype`.
_WIDER = {"integer": {"long", "double"}, "float": {"double"}}


class Finding(NamedTuple):
    """One difference. A fatal one breaks callers."""

    text: str
    fatal: bool = True


class _Tensor(BaseModel):
    dtype: str
    shape: tuple[int, ...]


class _Spec(BaseModel):
    """A tensor, a column, a property of an object, or a parameter."""

    model_config = ConfigDict(frozen=True)

    type: str
    name: str | None = None
    required: bool | None = None
    tensor: _Tensor | None = Field(None, alias="tensor-spec")
    items: "_Spec | None" = None
    properties: "dict[str, _Spec] | None" = None
    values: "_Spec | None" = None
    shape: tuple[int, ...] | None = None
    default: Any = None

    @model_validator(mode="after")
    def _whole(self) -> "_Spec":
        parts = {"tensor": self.tensor, "array": self.items, "object": self.properties, "map": self.values}
        if parts.get(self.type, self) is None:
            raise ValueError(f"{self.type} without its content")
        return self

    @property
    def needed(self) -> bool:
        return self.required is not False


_SPECS = TypeAdapter(list[_Spec])


def differences(candidate: Json, live: Json, version: str) -> list[Finding]:
    """What callers of the live version `version` would notice of the candidate.

    Both signatures are as MLflow stores them: `inputs`, `outputs` and `params`, each a list or its JSON, or null.
    One that cannot be read is a fatal finding.
    """
    try:
        pairs = [(_specs(candidate, part), _specs(live, part)) for part in ("inputs", "outputs", "params")]
    except ValidationError as error:
        first = error.errors()[0]
        return [Finding(f"a signature cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}")]
    checks = (_inputs, _outputs, _parameters)
    return list(chain.from_iterable(check(*pair, version) for check, pair in zip(checks, pairs, strict=True)))


def _specs(signature: Json, part: str) -> list[_Spec] | None:
    content = signature.get(part)
    if content is None:
        return None
    return _SPECS.validate_json(content) if isinstance(content, str | bytes) else _SPECS.validate_python(content)


def _inputs(ours: list[_Spec] | None, theirs: list[_Spec] | None, version: str) -> Iterator[Finding]:
    """Everything that the live version lets in must be let in."""
    form = _unlike_forms("inputs", ours, theirs, version)
    if form or ours is None or theirs is None:
        yield from form
        return
    present, before = _by_key(ours), _by_key(theirs)
    for key, spec in before.items():
        if key not in present:
            yield Finding(f"input {key} is ignored now; callers of version {version} may send it", fatal=False)
        elif why := _refused(present[key], spec):
            yield Finding(f"input {key} {why}")
    for key, spec in present.items():
        if spec.needed and key not in before:
            yield Finding(f"input {key} is new and required; callers of version {version} do not send it")


def _outputs(ours: list[_Spec] | None, theirs: list[_Spec] | None, version: str) -> Iterator[Finding]:
    """Everything that the live version gives must be given, of the same type and shape; more may be given."""
    form = _unlike_forms("outputs", ours, theirs, version)
    if form or ours is None or theirs is None:
        yield from form
        return
    present = _by_key(ours)
    for key, spec in _by_key(theirs).items():
        if key not in present:
            yield Finding(f"output {key} of version {version} is missing")
        elif why := _lost(present[key], spec):
            yield Finding(f"output {key} {why}")


def _parameters(ours: list[_Spec] | None, theirs: list[_Spec] | None, version: str) -> Iterator[Finding]:
    """Parameters always have a default, so a new one harms nobody, and MLflow ignores those that it does not know."""
    present, before = _by_key(ours or []), _by_key(theirs or [])
    for key, spec in before.items():
        now = present.get(key)
        if now is None:
            yield Finding(f"parameter {key} is ignored now; callers of version {version} may send it", fatal=False)
        elif now.shape != spec.shape:
            yield Finding(f"parameter {key} is {_form_of(now)} now and was {_form_of(spec)}")
        elif why := _refused(now, spec):
            yield Finding(f"parameter {key} {why}")
        elif now.default != spec.default:
            yield Finding(f"parameter {key} has the default {now.default!r} now and had {spec.default!r}", fatal=False)


def _unlike_forms(part: str, ours: list[_Spec] | None, theirs: list[_Spec] | None, version: str) -> list[Finding]:
    """Findings where the two cannot be compared spec by spec."""
    if not theirs:
        return [Finding(f"version {version} declares no {part}, so there is nothing to keep to", fatal=False)]
    if not ours:
        return [Finding(f"no {part} are declared, which version {version} does")]
    now, before = _form(ours), _form(theirs)
    return [] if now == before else [Finding(f"{part} are {now} now and were {before}")]


def _form(specs: Sequence[_Spec]) -> str:
    kinds = {"tensors" if spec.type == "tensor" else "columns" for spec in specs}
    names = {"unnamed" if spec.name is None else "named" for spec in specs}
    return f"{' and '.join(sorted(names))} {' and '.join(sorted(kinds))}"


def _by_key(specs: Sequence[_Spec]) -> Mapping[str, _Spec]:
    """Specs by their name, or by their place where they have none."""
    return {str(place) if spec.name is None else repr(spec.name): spec for place, spec in enumerate(specs, start=1)}


def _refused(ours: _Spec, theirs: _Spec) -> str:
    """Why `ours` would refuse something that `theirs` let in; empty if it would not."""
    if ours.needed and not theirs.needed:
        return "is required now and was optional"
    if ours.type == "any" or ours.type in _WIDER.get(theirs.type, ()):
        return ""
    if ours.type != theirs.type:
        return f"is {_told(ours)} now and was {_told(theirs)}"
    if ours.tensor and theirs.tensor:
        return "" if _fits(theirs.tensor, ours.tensor) else f"is {_told(ours)} now and was {_told(theirs)}"
    if ours.properties is not None and theirs.properties is not None:
        return _refused_object(ours.properties, theirs.properties)
    return _refused_part(ours, theirs)


def _refused_part(ours: _Spec, theirs: _Spec) -> str:
    for now, before, which in ((ours.items, theirs.items, "items"), (ours.values, theirs.values, "values")):
        if now and before and (why := _refused(now, before)):
            return f"has {which} of which one {why}"
    return ""


def _refused_object(ours: Mapping[str, _Spec], theirs: Mapping[str, _Spec]) -> str:
    """MLflow refuses an object with a property that it does not know, other than a column."""
    for name, spec in theirs.items():
        if name not in ours:
            return f"refuses property {name!r} now"
        if why := _refused(ours[name], spec):
            return f"has property {name!r}, which {why}"
    new = [name for name, spec in ours.items() if spec.needed and name not in theirs]
    return f"requires the new property {new[0]!r}" if new else ""


def _lost(ours: _Spec, theirs: _Spec) -> str:
    """What callers who read `theirs` would miss in `ours`; empty if nothing."""
    if theirs.needed and not ours.needed:
        return "is optional now and was always given"
    if theirs.type == "any":
        return ""
    if ours.type != theirs.type or (ours.tensor and theirs.tensor and not _fits(ours.tensor, theirs.tensor)):
        return f"is {_told(ours)} now and was {_told(theirs)}"
    if ours.properties is not None and theirs.properties is not None:
        return _lost_object(ours.properties, theirs.properties)
    for now, before, which in ((ours.items, theirs.items, "items"), (ours.values, theirs.values, "values")):
        if now and before and (why := _lost(now, before)):
            return f"has {which} of which one {why}"
    return ""


def _lost_object(ours: Mapping[str, _Spec], theirs: Mapping[str, _Spec]) -> str:
    for name, spec in theirs.items():
        if name not in ours:
            return f"lacks property {name!r} now"
        if why := _lost(ours[name], spec):
            return f"has property {name!r}, which {why}"
    return ""


def _fits(narrow: _Tensor, wide: _Tensor) -> bool:
    """Whether every tensor of `narrow` is one of `wide`: -1 stands for any length."""
    return (
        narrow.dtype == wide.dtype
        and len(narrow.shape) == len(wide.shape)
        and all(w in (n, -1) for n, w in zip(narrow.shape, wide.shape, strict=True))
    )


def _told(spec: _Spec) -> str:
    if spec.tensor:
        return f"a tensor of {spec.tensor.dtype} {list(spec.tensor.shape)}"
    inner = spec.items or spec.values
    return f"{spec.type} of {_told(inner)}" if inner else spec.type


def _form_of(parameter: _Spec) -> str:
    return "a list" if parameter.shape else "a single value"

import json

import pytest

from torchrelay.config import Json
from torchrelay.gate.signatures import differences


def tensor(*shape: int, dtype: str = "uint8", name: str | None = None) -> Json:
    named = {"name": name} if name else {}
    return {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}, **named}


def column(kind: str, name: str | None = None, required: bool = True, **content: object) -> Json:
    return {"type": kind, "required": required, **({"name": name} if name else {}), **content}


def array(items: str, name: str | None = None) -> Json:
    return column("array", name, items={"type": items})


def thing(name: str = "o", **properties: Json) -> Json:
    return column("object", name, properties=properties)


def found(part: str, ours: list[Json] | None, theirs: list[Json] | None) -> tuple[list[str], list[str]]:
    """What breaks callers, and what is only worth a word; the same from lists and from the JSON that MLflow stores."""
    seen = differences({part: ours}, {part: theirs}, "7")
    stored = [{part: None if specs is None else json.dumps(specs)} for specs in (ours, theirs)]
    assert differences(*stored, "7") == seen
    about = [text for text, _ in seen if part in text or part[:-1] in text]
    return (
        [text for text, fatal in seen if fatal and text in about],
        [text for text, fatal in seen if not fatal and text in about],
    )


def breaks(part: str, ours: Json | list[Json], theirs: Json | list[Json]) -> list[str]:
    lists = [specs if isinstance(specs, list) else [specs] for specs in (ours, theirs)]
    return found(part, *lists)[0]


# (wide, narrow): a version that takes the wide one takes all that callers of the narrow one send, and not the reverse
WIDER = [
    (tensor(-1, 28, 28), tensor(1, 28, 28)),
    (tensor(-1, -1, -1), tensor(-1, 28, 28)),
    (column("long", "a"), column("integer", "a")),
    (column("double", "a"), column("integer", "a")),
    (column("double", "a"), column("float", "a")),
    (column("any", "a"), column("string", "a")),
    (column("any", "a"), array("string", "a")),
    (column("string", "a", required=False), column("string", "a")),
    (array("long", "a"), array("integer", "a")),
    (array("any", "a"), array("string", "a")),
    (column("map", "a", values={"type": "double"}), column("map", "a", values={"type": "float"})),
    (thing(x={"type": "long"}), thing(x={"type": "integer"})),
    (thing(x={"type": "long", "required": False}), thing(x={"type": "long"})),
    (thing(x={"type": "long"}, y={"type": "long", "required": False}), thing(x={"type": "long"})),
    ([column("long", "a"), column("long", "b", required=False)], column("long", "a")),
]


@pytest.mark.parametrize(("wide", "narrow"), WIDER)
def test_an_input_may_widen_and_not_narrow(wide, narrow):
    assert breaks("inputs", wide, narrow) == []
    assert breaks("inputs", wide, wide) == breaks("inputs", narrow, narrow) == []
    if isinstance(wide, dict):
        assert len(breaks("inputs", narrow, wide)) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (
            tensor(-1, 28, 28, dtype="float32"),
            tensor(-1, 28, 28),
            "a tensor of float32 [-1, 28, 28] now and was a tensor",
        ),
        (tensor(-1, 784), tensor(-1, 28, 28), "a tensor of uint8 [-1, 784] now"),
        (tensor(-1, 32, 32), tensor(-1, 28, 28), "[-1, 32, 32] now"),
        (column("integer", "a"), column("long", "a"), "input 'a' is integer now and was long"),
        (column("string", "a"), column("long", "a"), "input 'a' is string now and was long"),
        (array("string", "a"), column("string", "a"), "input 'a' is array of string now and was string"),
        (array("string", "a"), array("long", "a"), "input 'a' has items of which one is string now and was long"),
        (thing(), thing(x={"type": "long"}), "input 'o' refuses property 'x' now"),
        (
            thing(x={"type": "long"}, y={"type": "long"}),
            thing(x={"type": "long"}),
            "input 'o' requires the new property 'y'",
        ),
        (
            [column("long", "a"), column("long", "b")],
            column("long", "a"),
            "input 'b' is new and required; callers of version 7 do not send it",
        ),
        ([column("long"), column("long")], column("long"), "input 2 is new and required"),
        (tensor(-1, 28, 28), column("long", "a"), "inputs are unnamed tensors now and were named columns"),
        (tensor(-1, 28, name="a"), tensor(-1, 28), "inputs are named tensors now and were unnamed tensors"),
    ],
)
def test_what_breaks_callers_inputs(ours, theirs, why):
    (reason,) = breaks("inputs", ours, theirs)
    assert why in reason


def test_an_input_that_is_dropped_is_ignored_as_mlflow_does_and_told_of():
    faults, remarks = found("inputs", [column("long", "a")], [column("long", "a"), column("long", "b")])
    assert (faults, remarks) == ([], ["input 'b' is ignored now; callers of version 7 may send it"])


def test_named_inputs_may_change_their_order_and_unnamed_ones_may_not():
    assert (
        breaks("inputs", [column("long", "b"), column("string", "a")], [column("string", "a"), column("long", "b")])
        == []
    )
    assert len(breaks("inputs", [column("long"), column("string")], [column("string"), column("long")])) == 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (tensor(-1, 10, dtype="float32"), tensor(-1, -1, dtype="float32")),
        ([column("long", "a"), column("string", "new")], column("long", "a")),
        (column("long", "a"), column("long", "a", required=False)),
        (column("long", "a"), column("any", "a")),
        (thing(x={"type": "long"}, y={"type": "long"}), thing(x={"type": "long"})),
        (thing(x={"type": "long"}), thing(x={"type": "long", "required": False})),
    ],
)
def test_outputs_may_be_more(ours, theirs):
    assert breaks("outputs", ours, theirs) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (column("long", "b"), column("long", "a"), "output 'a' of version 7 is missing"),
        (column("long", "a", required=False), column("long", "a"), "output 'a' is optional now and was always given"),
        (column("double", "a"), column("float", "a"), "output 'a' is double now and was float"),
        (column("any", "a"), column("long", "a"), "output 'a' is any now and was long"),
        (array("long", "a"), array("double", "a"), "output 'a' has items of which one is long now and was double"),
        (
            tensor(-1, 12),
            tensor(-1, 10),
            "output 1 is a tensor of uint8 [-1, 12] now and was a tensor of uint8 [-1, 10]",
        ),
        (tensor(-1, -1), tensor(-1, 10), "output 1 is a tensor of uint8 [-1, -1] now"),
        (thing(), thing(x={"type": "long"}), "output 'o' lacks property 'x' now"),
        (
            thing(x={"type": "long", "required": False}),
            thing(x={"type": "long"}),
            "output 'o' has property 'x', which is optional now and was always given",
        ),
    ],
)
def test_what_breaks_readers_of_outputs(ours, theirs, why):
    (reason,) = breaks("outputs", ours, theirs)
    assert why in reason


def parameter(kind: str, default: object, shape: list[int] | None = None, name: str = "t") -> Json:
    return {"name": name, "type": kind, "default": default, "shape": shape}


def test_parameters():
    before = [parameter("float", 0.5)]
    assert found_parameters([parameter("double", 0.5), parameter("long", 1, name="new")], before) == ([], [])
    assert found_parameters([parameter("string", "x")], before)[0] == ["parameter 't' is string now and was float"]
    assert found_parameters([parameter("float", [0.5], [-1])], before)[0] == [
        "parameter 't' is a list now and was a single value"
    ]
    assert found_parameters([parameter("float", 0.7)], before) == (
        [],
        ["parameter 't' has the default 0.7 now and had 0.5"],
    )
    assert found_parameters(None, before) == ([], ["parameter 't' is ignored now; callers of version 7 may send it"])


def found_parameters(ours: list[Json] | None, theirs: list[Json]) -> tuple[list[str], list[str]]:
    seen = [one for one in differences({"params": ours}, {"params": theirs}, "7") if one.text.startswith("parameter")]
    return [one.text for one in seen if one.fatal], [one.text for one in seen if not one.fatal]


def test_a_schema_that_is_gone_breaks_callers_and_one_that_never_was_cannot():
    assert found("inputs", None, [column("long", "a")]) == (["no inputs are declared, which version 7 does"], [])
    faults, remarks = found("outputs", [column("long", "a")], None)
    assert (faults, remarks) == ([], ["version 7 declares no outputs, so there is nothing to keep to"])


@pytest.mark.parametrize(
    "broken", ["{", 5, {"a": 1}, [{"name": "a"}], [{"type": "tensor"}], '[{"type": "array"}]', [7]]
)
def test_a_signature_that_cannot_be_read_is_a_finding(broken):
    for pair in (({"inputs": broken}, {}), ({}, {"inputs": broken})):
        (finding,) = differences(*pair, "7")
        assert finding.fatal
        assert finding.text.startswith("a signature cannot be read")


@pytest.mark.filterwarnings("ignore")
def test_signatures_as_mlflow_itself_writes_them():
    """What MLflow's own `to_dict` gives of the types that exist is read without a finding against itself."""
    from mlflow import models, types
    from mlflow.types import schema

    kinds = [
        schema.Array(types.DataType.double),
        schema.Map(types.DataType.string),
        schema.AnyType(),
        schema.Object([schema.Property("p", schema.Array(types.DataType.long), required=False)]),
        *types.DataType,
    ]
    columns = types.Schema([types.ColSpec(kind, f"c{n}", required=n % 2 == 0) for n, kind in enumerate(kinds)])
    params = types.ParamSchema([types.ParamSpec("t", types.DataType.double, 0.5)])
    written = models.ModelSignature(inputs=columns, outputs=columns, params=params).to_dict()
    assert differences(written, written, "7") == []

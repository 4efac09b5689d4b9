"""Answers a control node's calls on a serving node: `torchrelay agent`, which SSH starts there.

A call is two lines on stdin, a header and the arguments, its answer two lines on stdout; all of them are JSON. Calls
are answered side by side and in any order, so that a long load keeps nobody from looking. When stdin ends, calls
underway are finished, and the agent with them: an `apply` that lost its caller does no harm, since whoever comes next
brings a newer fencing token.
"""

import inspect
import json
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, create_model

from torchrelay import __version__
from torchrelay.config import Json
from torchrelay.errors import TorchrelayError
from torchrelay.serving.calls import Calls

_AS_MESSAGES = ConfigDict(extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")
_AT_ONCE = 8


def serve(folder: Path, calls: BinaryIO, answers: BinaryIO) -> None:
    """Answer until `calls` ends. The first line says which release of torchrelay this is."""
    node, lock = Calls(folder), threading.Lock()
    _say(answers, lock, {"torchrelay": __version__}, b"null")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while header := calls.readline():
            given = json.loads(header)
            pool.submit(_answer, node, given, calls.readline(), lambda *said: _say(answers, lock, *said))


def arguments_of(name: str) -> type[BaseModel]:
    """The arguments of a call as a model, which both sides go by."""
    method = getattr(Calls, name)
    hints, parameters = get_type_hints(method), list(inspect.signature(method).parameters.values())[1:]
    fields: dict[str, Any] = {
        one.name: (hints[one.name], ... if one.default is inspect.Parameter.empty else one.default)
        for one in parameters
    }
    return create_model(name, __config__=_AS_MESSAGES, **fields)


def answer_of(name: str) -> TypeAdapter[Any]:
    """What a call returns."""
    return TypeAdapter(get_type_hints(getattr(Calls, name))["return"])


def _answer(node: Calls, header: Json, arguments: bytes, say: Callable[[Json, bytes], None]) -> None:
    name, number = str(header["call"]), header["id"]
    try:
        given = arguments_of(name).model_validate_json(arguments)
        found = getattr(node, name)(**{field: getattr(given, field) for field in type(given).model_fields})
        say({"id": number}, answer_of(name).dump_json(found))
    except TorchrelayError as error:
        parts = {"found": error.found, "expected": error.expected, "next_command": error.next_command}
        say({"id": number, "error": type(error).__name__}, json.dumps(parts).encode())
    except Exception as error:  # whoever called must hear of it, whatever it is
        text = f"{name} on the node ended in {type(error).__name__}: {error}"
        parts = {"found": text, "expected": "an answer", "next_command": "read the orchestrator's log"}
        say({"id": number, "error": "ServingError"}, json.dumps(parts).encode())
        traceback.print_exc()


def _say(answers: BinaryIO, lock: threading.Lock, header: Json, content: bytes) -> None:
    with lock:
        answers.write(json.dumps(header).encode() + b"\n" + content + b"\n")
        answers.flush()


def main(folder: Path) -> None:
    """Serve on this process's own streams; whatever else is printed goes to stderr."""
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    serve(folder, sys.stdin.buffer, answers)

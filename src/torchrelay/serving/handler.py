"""The base handler, which answers requests inside a TorchServe worker.

It is copied into every archive as `torchrelay_handler.py` and runs in the component's environment, where nothing of
torchrelay is importable: torch and the standard library only. TorchServe wants exactly one class in this module.
It hands over a batch of requests as rows (`body`, or `data`, already parsed when TorchServe could parse it as JSON)
and takes one answer per row; each has a status and headers of its own.
"""

import importlib
import json
import logging
import os
import sys
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
Reply = tuple[int, dict[str, Any]]

logger = logging.getLogger(__name__)
# What curl sends unless told otherwise: TorchServe takes such a body apart, so there is nothing left to read.
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data"})
_INTERNAL: Reply = (500, {"error": "the model failed on this request; the worker's log has the details"})


class TorchrelayHandler:
    """One worker: a predictor, and who it is (component, version, archive digest), read once when it loads."""

    def initialize(self, context: Any) -> None:
        """Load the predictor from TorchServe's model folder and warm it up with the golden inputs.

        TORCHRELAY_INSTANCE names the engine's folder, where `digests/<component>/<version>` holds the digest of the
        archive that the engine was given. Raises RuntimeError without it: an answer must be traceable.
        """
        import torch

        logging.getLogger().setLevel(logging.WARNING)  # TorchServe's worker logs a line per batch
        torch.set_num_threads(1)
        folder = Path(context.system_properties["model_dir"])
        release = json.loads((folder / "release.json").read_bytes())
        self.headers = _identity(release)
        self.predictor = _predictor(folder)
        golden = json.loads((folder / "golden.json").read_bytes())["instances"]
        for instances in (golden, golden[:1]):
            self._forward(self.predictor.encode(instances))

    def handle(self, rows: list[Row], context: Any) -> list[bytes]:
        """Answer every row. A bad request gets a 4xx and never spoils its neighbours in the batch."""
        replies: dict[int, Reply] = {}
        encoded: dict[int, torch.Tensor] = {}
        ids: list[str] = []
        for index, row in enumerate(rows):
            headers = _headers(context, index)
            ids.append(_request_id(context, index, headers))
            content_type = _content_type(headers)
            if content_type in _FORMS:
                replies[index] = _unsupported(content_type)
                continue
            try:
                encoded[index] = self._encode(row, content_type)
            except ValueError as error:
                replies[index] = (400, {"error": str(error)})
            except RecursionError:
                replies[index] = (400, {"error": "the body is nested too deeply"})
            except Exception:  # whatever a component's code raises concerns this request alone
                logger.exception("encoding a request failed")
                replies[index] = _INTERNAL
        replies |= self._predict(encoded)
        return [self._answer(context, index, replies[index], ids[index]) for index in range(len(rows))]

    def _encode(self, row: Row, content_type: str) -> "torch.Tensor":
        """(N, …) for one request; ValueError says what is wrong with it."""
        body = row.get("body", row.get("data"))
        if body is None:
            raise ValueError('the request has no body; expected JSON {"instances": [...]} or an image')
        if content_type in ("", "application/json"):
            return self.predictor.encode(_instances(body))
        raw = body.encode() if isinstance(body, str) else body if isinstance(body, bytes) else bytes(body)
        return self.predictor.encode(self.predictor.decode(raw, content_type))

    def _predict(self, encoded: "dict[int, torch.Tensor]") -> dict[int, Reply]:
        """One forward pass over all; if it fails, one for each, so that only the culprits get a 500."""
        if not encoded:
            return {}
        try:
            return self._split(encoded)
        except Exception:  # whatever a component's code raises concerns these requests alone
            logger.exception("a forward pass over %d requests failed", len(encoded))
        if len(encoded) == 1:
            return dict.fromkeys(encoded, _INTERNAL)
        return {index: self._predict({index: part})[index] for index, part in encoded.items()}

    def _split(self, encoded: "dict[int, torch.Tensor]") -> dict[int, Reply]:
        import torch

        parts = list(encoded.values())
        rest = iter(self._forward(torch.cat(parts) if len(parts) > 1 else parts[0]))
        return {
            index: (200, {"predictions": [next(rest) for _ in range(len(part))]}) for index, part in encoded.items()
        }

    def _forward(self, batch: "torch.Tensor") -> list[Any]:
        import torch

        with torch.inference_mode():
            predictions = list(self.predictor.predict(batch))
        if len(predictions) != len(batch):
            raise RuntimeError(f"predict gave {len(predictions)} predictions for {len(batch)} instances")
        return predictions

    def _answer(self, context: Any, index: int, reply: Reply, request_id: str) -> bytes:
        """Set status and headers of the row, and give its body."""
        status, content = reply
        try:
            body = _json(content if status == 200 else content | {"request_id": request_id})
        except (TypeError, ValueError, RecursionError):
            logger.exception("a prediction is not JSON")
            status, content = _INTERNAL
            body = _json(content | {"request_id": request_id})
        context.set_response_status(status, HTTPStatus(status).phrase, index)
        for name, value in (*self.headers.items(), ("x-torchrelay-request-id", request_id)):
            context.set_response_header(index, name, value)
        return body


def _identity(release: dict[str, str]) -> dict[str, str]:
    """The headers that say which worker answered."""
    component, version = release["component"], release["version"]
    instance = os.environ.get("TORCHRELAY_INSTANCE")
    if not instance:
        raise RuntimeError("TORCHRELAY_INSTANCE is not set; expected the folder of the engine instance")
    file = Path(instance) / "digests" / component / version
    if not file.is_file():
        raise RuntimeError(f"{file} does not exist; expected the digest of the archive, written before it is loaded")
    return {
        "content-type": "application/json",
        "x-component": component,
        "x-model-version": version,
        "x-archive-digest": file.read_text(encoding="ascii").strip(),
    }


def _predictor(folder: Path) -> Any:
    """The component's own Predictor; its modules are found by plain name, before any other of that name."""
    sys.path.insert(0, str(folder))
    return importlib.import_module("handler").Predictor(folder)


def _headers(context: Any, index: int) -> dict[str, Any]:
    return {name.lower(): value for name, value in context.get_all_request_header(index).items()}


def _content_type(headers: dict[str, Any]) -> str:
    """Without parameters, in lower case; empty where none is given."""
    return str(headers.get("content-type", "")).partition(";")[0].strip().lower()


def _unsupported(content_type: str) -> Reply:
    expected = 'application/json with {"instances": [...]}, or the type of an image'
    return 415, {"error": f"the content-type is {content_type}; expected {expected}"}


def _request_id(context: Any, index: int, headers: dict[str, Any]) -> str:
    """The gateway's id of the request; TorchServe's own where no gateway stands before it."""
    return str(headers.get("x-torchrelay-request-id") or context.get_request_id(index) or "")


def _instances(body: Any) -> list[Any]:
    """The instances of a JSON body, which TorchServe has parsed unless it could not."""
    if isinstance(body, bytes | bytearray | str):
        try:
            body = json.loads(body)
        except ValueError as error:
            raise ValueError(f"the body is not JSON: {error}") from error
    match body:
        case {"instances": [*instances]} if instances:
            return instances
        case {"instances": []}:
            raise ValueError('"instances" is empty; expected at least one instance')
    raise ValueError('the body has no list named "instances"; expected {"instances": [...]}')


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()

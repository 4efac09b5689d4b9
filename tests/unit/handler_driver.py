"""Runs the base handler as TorchServe's worker does, with TorchServe's own classes; driven over stdin and stdout.

Started by the component's interpreter with the model folder as its argument. Each line in is a batch: a list of
{"headers", "content_type", "body" (base64), "parsed"}; each line out is the list of answers.
"""

import base64
import json
import logging
import sys
from typing import Any


def main(folder: str) -> None:
    """Load the handler by TorchServe's loader, then answer batches."""
    logging.basicConfig(stream=sys.stderr)
    sys.path.insert(0, folder)
    from ts.model_loader import TsModelLoader

    service = TsModelLoader().load("tiny", folder, "torchrelay_handler.py", -1, 8)
    print("loaded", flush=True)
    for line in sys.stdin:
        print(json.dumps(answers(service, json.loads(line))), flush=True)


def answers(service: Any, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One answer per request, through TorchServe's own unpacking of a batch."""
    requests = [request(index, asked) for index, asked in enumerate(batch)]
    processors, rows, ids = service.retrieve_data_for_inference(requests)
    service.context.request_processor, service.context.request_ids = processors, ids
    bodies = service._entry_point(rows, service.context)
    return [
        {
            "status": service.context.get_response_status(index)[0],
            "headers": service.context.get_response_headers(index),
            "body": json.loads(body),
        }
        for index, body in enumerate(bodies)
    ]


def request(index: int, asked: dict[str, Any]) -> dict[str, Any]:
    """A request as TorchServe's protocol reader hands it on: JSON is parsed unless that fails."""
    body: Any = base64.b64decode(asked["body"])
    if asked["parsed"]:
        body = json.loads(body)
    parameters = [{"name": "body", "contentType": asked["content_type"], "value": body}] if asked["body"] else []
    headers = [{"name": name.encode(), "value": value.encode()} for name, value in asked["headers"].items()]
    return {"requestId": f"torchserve-{index}".encode(), "headers": headers, "parameters": parameters}


if __name__ == "__main__":
    main(sys.argv[1])

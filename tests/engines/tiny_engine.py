"""The adapter of the minimal engine in tiny_server.py: proof that the seam fits more than TorchServe."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import urllib3

from torchrelay.config import write_file
from torchrelay.errors import ServingError
from torchrelay.handover import Endpoint, WantedVersion
from torchrelay.serving.engine import Answer, Engine, Instance, Loaded, Program, digest_file


class TinyEngine(Engine):
    ports_needed: ClassVar[int] = 1

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def prepare(self) -> Program:
        self.instance.folder.mkdir(parents=True, exist_ok=True)
        server = Path(__file__).with_name("tiny_server.py")
        return Program(
            name=self.instance.name,
            command=(
                self.instance.python,
                str(server),
                str(self.instance.ports[0]),
                str(self.instance.response_timeout_s),
            ),
            environment={
                "TORCHRELAY_INSTANCE": str(self.instance.folder),
                "TORCHRELAY_PREDICTIONS": str(self.instance.predictions) if self.instance.predictions else "",
                "TORCHRELAY_KEEP_INPUTS": "1" if self.instance.keep_inputs else "",
                "OMP_NUM_THREADS": "1",
            },
            directory=self.instance.folder,
            log=self.instance.log,
        )

    def ready(self) -> bool:
        try:
            return self._call("GET", "/", timeout=5).status == 200
        except ServingError:
            return False

    def load(self, archive: Path, wanted: WantedVersion) -> None:
        if any(
            (found.version, found.digest, found.healthy) == (wanted.version, wanted.digest, True)
            for found in self.loaded()
        ):
            return
        self.unload(wanted.component, wanted.version)
        folder = self._folder(wanted.component, wanted.version)
        folder.parent.mkdir(exist_ok=True)
        shutil.copyfile(archive / "model.mar", folder.with_suffix(".mar"))
        if not zipfile.is_zipfile(folder.with_suffix(".mar")):
            self.unload(wanted.component, wanted.version)
            raise self._error("was given what is not an archive")
        write_file(digest_file(self.instance.folder, wanted.component, wanted.version), wanted.digest.encode())
        order = json.dumps({"folder": str(folder), "digest": wanted.digest}).encode()
        answer = self._call("PUT", self.path(wanted.component, wanted.version), order)
        if answer.status != 200:
            self.unload(wanted.component, wanted.version)
            raise self._error(f"would not load {wanted.component} {wanted.version}: {answer.data.decode()}")

    def loaded(self) -> list[Loaded]:
        held: dict[str, dict[str, Any]] = self._call("GET", "/held").json()
        return [
            Loaded(component=path.split("/")[2], version=path.split("/")[3], **found) for path, found in held.items()
        ]

    def predict(self, component: str, version: str, body: bytes, headers: dict[str, str]) -> Answer:
        answer = self._call("POST", self.path(component, version), body, headers)
        found = {name.lower(): value for name, value in answer.headers.items()}
        return Answer(status=answer.status, headers=found, body=answer.data)

    def unload(self, component: str, version: str) -> None:
        self._call("DELETE", self.path(component, version))
        folder = self._folder(component, version)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".mar").unlink(missing_ok=True)
        digest_file(self.instance.folder, component, version).unlink(missing_ok=True)

    def metrics(self) -> str:
        return self._call("GET", "/metrics").data.decode()

    def endpoint(self, component: str, version: str) -> Endpoint:
        path = self.path(component, version)
        return Endpoint(host="127.0.0.1", port=self.instance.ports[0], health_path="/", health_text=f'"{path}"')

    def path(self, component: str, version: str) -> str:
        return f"/v/{component}/{version}"

    def _folder(self, component: str, version: str) -> Path:
        return self.instance.folder / "models" / f"{component}-{version}"

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> urllib3.BaseHTTPResponse:
        url = f"http://127.0.0.1:{self.instance.ports[0]}{path}"
        try:
            return urllib3.request(method, url, body=body, headers=headers, timeout=timeout, retries=False)
        except urllib3.exceptions.HTTPError as error:
            raise self._error(f"does not answer: {error}") from error

    def _error(self, what: str) -> ServingError:
        return ServingError(f"engine {self.instance.name} {what}", "an answer", f"read {self.instance.log}")

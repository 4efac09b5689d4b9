"""Google's API, read-only: what stands is asked here, what changes is done by the role `gcp`."""

import os
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from torchrelay.config import Json
from torchrelay.errors import ProvisionError

COMPUTE = "https://compute.googleapis.com/compute/v1/projects/"
STORAGE = "https://storage.googleapis.com/storage/v1/b/"
ACCOUNTS = "https://iam.googleapis.com/v1/projects/"
PROJECTS = "https://cloudresourcemanager.googleapis.com/v1/projects/"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_SECONDS = 60
# Nothing here changes anything, POST included: getIamPolicy is one.
_AGAIN = Retry(4, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)


def token() -> str:
    """An access token: GCP_ACCESS_TOKEN, or one for whoever `gcloud` or this machine's service account is."""
    if given := os.environ.get("GCP_ACCESS_TOKEN"):
        return given
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    try:
        credentials, _ = google.auth.default(scopes=[_SCOPE])
        credentials.refresh(Request())  # type: ignore[no-untyped-call]
    except GoogleAuthError as error:
        raise ProvisionError(
            f"no credentials for Google: {' '.join(str(error).split())}",
            "application default credentials, or an access token in GCP_ACCESS_TOKEN",
            "gcloud auth application-default login",
        ) from error
    return str(credentials.token)


class Google:
    """One identity's view of the API. Busy answers are asked for again; a refusal is a ProvisionError."""

    def __init__(self, access: str) -> None:
        self._session = requests.Session()
        self._session.headers["Authorization"] = f"Bearer {access}"
        self._session.mount("https://", HTTPAdapter(max_retries=_AGAIN))

    def get(self, url: str, **params: str) -> Json | None:
        """What stands at `url`; None where nothing does."""
        return self._ask("GET", url, params=params)

    def policy(self, url: str) -> Json:
        """Who may do what in a project, asked by POST as Google wants it."""
        return self._ask("POST", url, json={"options": {"requestedPolicyVersion": 3}}) or {}

    def every(self, url: str, key: str = "items", **params: str) -> list[Json]:
        """A list with all its pages; of an aggregated list, the parts of all zones."""
        found: list[Json] = []
        while True:
            page = self.get(url, **params) or {}
            part: Any = page.get(key, [])
            found += [one for zone in part.values() for one in zone.get("instances", [])] if _zoned(part) else part
            if not page.get("nextPageToken"):
                return found
            params["pageToken"] = page["nextPageToken"]

    def _ask(self, method: str, url: str, **what: Any) -> Json | None:
        try:
            answer = self._session.request(method, url, timeout=_SECONDS, **what)
        except requests.RequestException as error:
            raise ProvisionError(f"{url}: {error}", "an answer from Google", "the same command again") from error
        if answer.status_code == requests.codes.not_found:
            return None
        if not answer.ok:
            raise ProvisionError(
                f"Google answered {answer.status_code} to {method} {url}: {_message(answer)}",
                "permission to read it, and the API enabled in the project",
                "docs/runbooks/gcp.md names roles and APIs",
            )
        found: Json = answer.json()
        return found


def _zoned(part: object) -> bool:
    return isinstance(part, dict)


def _message(answer: requests.Response) -> str:
    """Google's own words."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]

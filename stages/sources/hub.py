"""A model or a data set of the Hugging Face Hub, at one commit; safetensors and rows only, never code.

HF_TOKEN, from the environment alone, opens gated and private repositories; HF_ENDPOINT names another hub.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from stages.params import Section
from stages.refusal import Refusal
from stages.sources import repository, transfer
from stages.sources.provenance import Announced, Provenance
from stages.sources.transfer import Remote

SITE = "https://huggingface.co"


class Spec(Section):
    """`repository` is owner/name, or datasets/owner/name; `revision` is a commit of 40 digits; `files` are patterns of
    paths, or auto: a model's safetensors, configuration, tokenizer and licence, a data set's rows."""

    source: Literal["hub"]
    repository: repository.Name
    revision: repository.Revision
    files: repository.Files


def fetch(spec: Spec, folder: Path) -> Provenance:
    """Fill `folder` with the files that `spec` asks for; raises Refusal, with what has come so far kept for later."""
    with _opened(spec) as (listed, http, explain):
        return repository.fetch(spec, listed, folder, http, explain)


def look(spec: Spec) -> Announced:
    """What `fetch` would bring."""
    with _opened(spec) as (listed, http, explain):
        return repository.look(spec, listed, http, explain)


@contextlib.contextmanager
def _opened(spec: Spec) -> Iterator[tuple[list[Remote], httpx.Client, Callable[[httpx.Response], Refusal]]]:
    """All that the repository holds at the commit, a client that may read it, and what to make of its refusals."""
    if constants.is_offline_mode():
        raise Refusal(
            f"{spec.repository}: HF_HUB_OFFLINE is set, so it is not fetched; unset that, or put the files in "
            "models/own or data/own and take source: path"
        )
    token = repository.token("HF_TOKEN")
    endpoint = repository.address("HF_ENDPOINT", SITE)
    # False, since with None it would look for a token in files too
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token or False, library_name="lorepro")
    commit = _commit(api, spec, spec.revision)
    if not repository.is_commit(spec.revision):
        raise repository.unpinned(spec, commit)
    if commit != spec.revision:
        raise Refusal(f"{spec.repository}: asked for {spec.revision}, the hub answers for {commit}; do not use it")
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    with transfer.client(authorization) as http:
        yield _listed(api, spec), http, lambda response: _explain(api, spec, response)


def _named(spec: Spec) -> dict[str, str]:
    """The repository as the library's functions want it."""
    kind = "dataset" if repository.is_dataset(spec.repository) else "model"
    return {"repo_id": spec.repository.removeprefix("datasets/"), "repo_type": kind}


def _commit(api: huggingface_hub.HfApi, spec: Spec, revision: str | None) -> str:
    """The commit at which a branch, tag or commit stands; None is the main branch."""
    return _ask(api, spec, lambda: api.repo_info(**_named(spec), revision=revision, timeout=30).sha)


def _listed(api: huggingface_hub.HfApi, spec: Spec) -> list[Remote]:
    named = _named(spec)
    entries = _ask(api, spec, lambda: list(api.list_repo_tree(**named, revision=spec.revision, recursive=True)))
    return [
        Remote(
            name=entry.path,
            url=huggingface_hub.hf_hub_url(filename=entry.path, revision=spec.revision, endpoint=api.endpoint, **named),
            size=entry.size,
            sha256=entry.lfs.sha256 if entry.lfs else None,
            blob=entry.blob_id,
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    ]


def _ask(api: huggingface_hub.HfApi, spec: Spec, call):
    """What `call` returns; what is wrong with the repository, the token or the network becomes a Refusal."""

    def attempt():
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code in transfer.PASSING:
                raise transfer.asked_to_wait(error.response) from None
            raise _explain(api, spec, error.response) from None
        except httpx.RequestError as error:
            raise transfer.Again(
                f"{repository.shown(api.endpoint)} cannot be reached ({type(error).__name__})"
            ) from None

    return transfer.patiently(spec.repository, attempt)


def _explain(api: huggingface_hub.HfApi, spec: Spec, response: httpx.Response) -> Refusal:
    """A status that no later attempt will change, in the words of who has to change something."""
    code, message = response.headers.get("X-Error-Code"), response.headers.get("X-Error-Message", "")
    has_token = repository.token("HF_TOKEN") is not None
    page, tokens = f"{SITE}/{spec.repository}", f"{SITE}/settings/tokens"
    if code == "GatedRepo" and not has_token:
        return Refusal(
            f"{spec.repository}: is gated; accept its licence at {page}, and set HF_TOKEN to a token from {tokens}"
        )
    if code == "GatedRepo":
        return Refusal(
            f"{spec.repository}: is gated, and the token in HF_TOKEN may not read it; accept the licence at {page} "
            f"with the token's account, and let the token read gated repositories at {tokens}"
        )
    if has_token and response.status_code == 401 and (not code or "credentials" in message):
        return Refusal(f"{spec.repository}: the hub does not know the token in HF_TOKEN; make one at {tokens}")
    if code == "RevisionNotFound":
        return Refusal(
            f"{spec.repository}: has no revision {spec.revision}; its main branch stands at "
            f"{_commit(api, spec, None)}: correct fetch.revision in params.yaml"
        )
    if response.status_code in (401, 403, 404):
        return Refusal(
            f"{spec.repository}: there is no such repository at {repository.shown(api.endpoint)}, or it is private; "
            f"correct fetch.repository in params.yaml, or set HF_TOKEN to a token from {tokens} that may read it"
        )
    return Refusal(f"{spec.repository}: {response.url.host} answers {response.status_code}; try again later")

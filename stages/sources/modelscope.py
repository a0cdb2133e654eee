"""A model or a data set of ModelScope, at one commit; safetensors and rows only, never code.

MODELSCOPE_API_TOKEN, from the environment alone, opens private repositories; MODELSCOPE_ENDPOINT names another site.

Four requests in place of the modelscope package, which takes branches and tags but refuses a commit
(modelscope/modelscope#1386). They are those of its client, modelscope-hub 0.5.1.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlencode, urlsplit

import httpx
from pydantic import BaseModel, Field, ValidationError

from stages.params import Section
from stages.refusal import Refusal
from stages.sources import repository, transfer
from stages.sources.provenance import Announced, Provenance
from stages.sources.transfer import Remote

SITE = "https://modelscope.cn"
PAGE_ENTRIES = 200  # of a data set's listing; a model's comes whole


class Spec(Section):
    """`repository` is owner/name, or datasets/owner/name; `revision` is a commit of 40 digits; `files` are patterns of
    paths, or auto: a model's safetensors, configuration, tokenizer and licence, a data set's rows."""

    source: Literal["modelscope"]
    repository: repository.Name
    revision: repository.Revision
    files: repository.Files


class Entry(BaseModel):
    """A file or a folder in a listing; `Revision` is the commit that last changed it."""

    Path: str
    Type: str
    Size: Annotated[int, Field(ge=0)] = 0
    Sha256: str = ""
    Revision: str = ""


class Head(BaseModel):
    """The commit of the tree that was listed, often only its first eight digits."""

    Id: str | None = ""
    ShortId: str | None = ""


class Listing(BaseModel):
    """What is listed; without files where there is no such revision."""

    Files: list[Entry] | None
    LatestCommitter: Head | None = None


def fetch(spec: Spec, folder: Path) -> Provenance:
    """Fill `folder` with the files that `spec` asks for; raises Refusal, with what has come so far kept for later."""
    with _opened(spec) as (listed, http):
        return repository.fetch(spec, listed, folder, http, lambda response: _explain(spec, response))


def look(spec: Spec) -> Announced:
    """What `fetch` would bring."""
    with _opened(spec) as (listed, http):
        return repository.look(spec, listed, http, lambda response: _explain(spec, response))


@contextlib.contextmanager
def _opened(spec: Spec) -> Iterator[tuple[list[Remote], httpx.Client]]:
    """All that the repository holds at the commit, and a client that may read it."""
    token = repository.token("MODELSCOPE_API_TOKEN")
    # both, as its own client does: some addresses look at the one, some at the other
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    with transfer.client(headers) as http:
        entries, head = _listed(http, spec)
        if not repository.is_commit(spec.revision):
            raise repository.unpinned(spec, _whole(head, entries))
        if not spec.revision.startswith(head):
            raise Refusal(f"{spec.repository}: asked for {spec.revision}, the site answers for {head}; do not use it")
        yield [_remote(spec, entry) for entry in entries if entry.Type != "tree"], http


def _endpoint() -> str:
    """Where to ask, as its own client finds it."""
    return repository.address("MODELSCOPE_ENDPOINT", repository.address("MODELSCOPE_DOMAIN", SITE))


def _address(spec: Spec, path: str, query: dict[str, Any]) -> str:
    name = spec.repository if repository.is_dataset(spec.repository) else f"models/{spec.repository}"
    return f"{_endpoint()}/api/v1/{name}/{path}?{urlencode(query)}"


def _listed(http: httpx.Client, spec: Spec) -> tuple[list[Entry], str]:
    """All files and folders of the revision, and as much of the commit's id as the site tells, or nothing of it."""
    query = {"Revision": spec.revision, "Recursive": "True"}
    if not repository.is_dataset(spec.repository):
        listing = _ask(http, spec, _address(spec, "repo/files", query))
        return listing.Files, _head(listing)
    entries, page = [], 1
    while True:
        paged = {**query, "PageNumber": page, "PageSize": PAGE_ENTRIES}
        listing = _ask(http, spec, _address(spec, "repo/tree", paged))
        entries += listing.Files
        if len(listing.Files) < PAGE_ENTRIES:
            return entries, _head(listing)
        page += 1


def _head(listing: Listing) -> str:
    head = listing.LatestCommitter or Head()
    return head.Id or head.ShortId or ""


def _whole(head: str, entries: list[Entry]) -> str:
    """The commit of which `head` is the beginning: the site tells it whole only beside the files that it changed."""
    found = [entry.Revision for entry in entries if head and entry.Revision.startswith(head)]
    return found[0] if found else f"the commit {head}…, whose 40 digits its page of commits shows"


def _ask(http: httpx.Client, spec: Spec, url: str) -> Listing:
    def attempt() -> Listing:
        try:
            response = http.get(url)
        except httpx.RequestError as error:
            raise transfer.Again(
                f"{repository.shown(_endpoint())} cannot be reached ({type(error).__name__})"
            ) from None
        if response.status_code in transfer.PASSING:
            raise transfer.asked_to_wait(response)
        if response.status_code != 200:
            raise _explain(spec, response)
        try:
            listing = Listing.model_validate(response.json()["Data"])
        except (ValueError, KeyError, TypeError, ValidationError):
            raise Refusal(
                f"{spec.repository}: {repository.shown(_endpoint())} answers with what is no listing; is it the site?"
            ) from None
        if listing.Files is None:
            raise Refusal(f"{spec.repository}: has no revision {spec.revision}; correct fetch.revision in params.yaml")
        return listing

    return transfer.patiently(spec.repository, attempt)


def _remote(spec: Spec, entry: Entry) -> Remote:
    url = _address(spec, "repo", {"Revision": spec.revision, "FilePath": entry.Path})
    return Remote(name=entry.Path, url=url, size=entry.Size, sha256=entry.Sha256)


def _explain(spec: Spec, response: httpx.Response) -> Refusal:
    """A status that no later attempt will change, in the words of who has to change something."""
    name = spec.repository if repository.is_dataset(spec.repository) else f"models/{spec.repository}"
    site, tokens = repository.shown(_endpoint()), f"{SITE}/my/myaccesstoken"
    page = f"{site}/{name}"
    has_token = repository.token("MODELSCOPE_API_TOKEN") is not None
    if response.status_code in (401, 403) and not has_token:
        return Refusal(
            f"{spec.repository}: may not be read by all; accept its terms at {page}, and set MODELSCOPE_API_TOKEN to a "
            f"token from {tokens}"
        )
    if response.status_code == 401:
        return Refusal(
            f"{spec.repository}: {urlsplit(site).netloc} does not know the token in MODELSCOPE_API_TOKEN; "
            f"make one at {tokens}"
        )
    if response.status_code == 403:
        return Refusal(
            f"{spec.repository}: the token in MODELSCOPE_API_TOKEN may not read it; ask for access at {page}, with the "
            "token's account"
        )
    if response.status_code == 404:
        return Refusal(
            f"{spec.repository}: there is no such repository at {site}, or it is private, or it has no revision "
            f"{spec.revision}; correct fetch in params.yaml, or set MODELSCOPE_API_TOKEN"
        )
    return Refusal(f"{spec.repository}: {response.url.host} answers {response.status_code}; try again later")

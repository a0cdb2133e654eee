"""What the hubs share: which of a repository's files are taken, in what order, and what is refused on the way."""

import dataclasses
import fnmatch
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field

from stages.params import Section
from stages.refusal import Refusal
from stages.sources import kept, transfer
from stages.sources.provenance import Announced, Provenance
from stages.sources.transfer import Remote
from stages.sources.weights import CONFIGURATIONS, PICKLES, refuse_remote_code

# as a hub's own addresses have it: owner/name, a data set's after datasets/
Name = Annotated[str, Field(pattern=r"^(datasets/)?[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
Files = Literal["auto"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]

# What transformers looks for in a model, beside its weights. A repository may well hold those once more: in original/,
# as consolidated.safetensors, in pickles, GGUF or ONNX.
PARTS = (
    *CONFIGURATIONS,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "licen[cs]e*",
    "notice*",
    "use_policy*",
    "*terms*",
)
# of the two, transformers takes the first where it is there
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".gguf")
ROWS = (".parquet", ".jsonl", ".json", ".csv")
TEXTS = (".json", ".jinja", ".model", ".txt", ".md", ".html", "")


def is_dataset(repository: str) -> bool:
    return repository.startswith("datasets/")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit id, which no one can move to other files."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def token(variable: str) -> str | None:
    """The token in an environment variable. No other place is looked in, and nothing writes it anywhere."""
    value = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", value):
        raise Refusal(f"{variable}: holds a blank or a letter that no token has; set it anew")
    return value or None


def address(variable: str, default: str) -> str:
    """The hub's address in an environment variable, without a slash at its end. One that is none is refused unseen: a
    slash in a password ends the host, and what is behind it would be shown."""
    value = os.environ.get(variable, "").rstrip("/") or default
    value = value if "://" in value else f"https://{value}"
    name = r"[^\s/?#@\[\]]+@"
    host = r"(\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]]+)(:\d+)?"
    if not re.fullmatch(rf"https?://({name})?{host}(/[^\s?#@]*)?", value):
        raise Refusal(f"{variable}: is no address; in a name or password write / as %2F, @ as %40, ? as %3F, # as %23")
    return value


def shown(address: str) -> str:
    """An address without the name and password that it may hold, for people and logs to read."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def unpinned(spec: Section, commit: str) -> Refusal:
    """The answer to a branch or tag. Were it followed, the same params.yaml would fetch other files on another day, and
    DVC, which looks at params.yaml, could not know."""
    return Refusal(
        f"{spec.repository}: {spec.revision} is a branch or tag, which can move; for a result that can be made again, "
        f"write where it stands now to fetch.revision in params.yaml: {commit}"
    )


def fetch(
    spec: Section,
    listed: list[Remote],
    folder: Path,
    http: httpx.Client,
    explain: Callable[[httpx.Response], Refusal],
) -> Provenance:
    """Fill `folder` with those of the `listed` files, each called by its path, that `spec` asks for."""
    chosen = _choose(spec, listed)
    origin = f"{spec.repository}@{spec.revision}"
    place = kept.place(kept.name(spec.source, origin))
    with kept.held(place):
        # what tells whether the weights are wanted comes before them
        files = transfer.fetch([r for r in chosen if not r.name.endswith(WEIGHTS)], place, folder, http, explain)
        if not is_dataset(spec.repository):
            for name in CONFIGURATIONS:
                refuse_remote_code(folder / name, f"{spec.repository}: {name}")
        if spec.files == "auto" and INDEX in files:
            chosen += _shards(spec, folder / INDEX, listed)
        files |= transfer.fetch([r for r in chosen if r.name.endswith(WEIGHTS)], place, folder, http, explain)
    return Provenance(source=spec.source, origin=[origin], files=dict(sorted(files.items())), kept=place)


def look(
    spec: Section, listed: list[Remote], http: httpx.Client, explain: Callable[[httpx.Response], Refusal]
) -> Announced:
    """What `fetch` would take of the `listed` files. Who may list a repository may not always read it: a small file is
    asked for, too."""
    chosen = {remote.name: remote for remote in _choose(spec, listed)}
    with tempfile.TemporaryDirectory() as scratch:
        small = [name for name in ("config.json", INDEX) if name in chosen]
        for name in small or list(chosen)[:1]:
            content = transfer.patiently(name, partial(_read, chosen[name].url, name in small, http, explain))
            (Path(scratch) / name).write_bytes(content)
        refuse_remote_code(Path(scratch) / "config.json", f"{spec.repository}: config.json")
        if spec.files == "auto" and INDEX in small:
            chosen |= {remote.name: remote for remote in _shards(spec, Path(scratch) / INDEX, listed)}
        config = Path(scratch) / "config.json"
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    return Announced({name: remote.size for name, remote in chosen.items()}, values)


def _read(url: str, whole: bool, http: httpx.Client, explain: Callable[[httpx.Response], Refusal]) -> bytes:
    """What lies at `url`; without `whole`, nothing of it, once it is clear that it may be read."""
    try:
        with http.stream("GET", url) as response:
            if response.status_code in transfer.PASSING:
                raise transfer.asked_to_wait(response)
            if response.status_code not in (200, 206):
                response.read()
                raise explain(response)
            return response.read() if whole else b""
    except httpx.RequestError as error:
        raise transfer.Again(f"the connection was lost ({type(error).__name__})") from None


def _choose(spec: Section, listed: list[Remote]) -> list[Remote]:
    """The files to take, called by their base names; the shards that an index names are not yet among them."""
    for remote in listed:
        parts = PurePosixPath(remote.name).parts
        if remote.name.startswith("/") or ".." in parts or "\\" in remote.name or not remote.name.isprintable():
            raise Refusal(f"{spec.repository}: lists {remote.name!r}, which leads out of its folder; do not use it")
    taken = ROWS if is_dataset(spec.repository) else WEIGHTS
    allowed = {*taken, *TEXTS}
    if spec.files != "auto":
        chosen = _matching(spec, listed, allowed)
    elif is_dataset(spec.repository):
        chosen = [remote for remote in listed if remote.name.lower().endswith(ROWS)]
    else:
        top = {remote.name: remote for remote in listed if "/" not in remote.name}
        chosen = [top[name] for name in top if any(fnmatch.fnmatchcase(name.lower(), part) for part in PARTS)]
        chosen += [top[name] for name in (WHOLE, INDEX) if name in top][:1]
    if not any(remote.name.lower().endswith((*taken, INDEX)) for remote in chosen):
        raise _nothing_of_use(spec, listed, taken)
    by_name: dict[str, Remote] = {}
    for remote in chosen:
        name = PurePosixPath(remote.name).name
        if name in by_name:
            raise Refusal(
                f"{spec.repository}: {by_name[name].name} and {remote.name} would both be written as {name}; "
                "name one of them in fetch.files"
            )
        if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", remote.sha256 or remote.blob or ""):
            raise Refusal(f"{spec.repository}: {remote.name} is listed without a checksum; take another revision")
        by_name[name] = remote
    return [dataclasses.replace(remote, name=name) for name, remote in by_name.items()]


def _matching(spec: Section, listed: list[Remote], allowed: set[str]) -> list[Remote]:
    chosen = {}
    for pattern in spec.files:
        found = [remote for remote in listed if fnmatch.fnmatchcase(remote.name, pattern)]
        fit = [r for r in found if PurePosixPath(r.name).suffix.lower() in allowed and r.name.split("/")[-1][0] != "."]
        if found and not fit:
            raise Refusal(
                f"{spec.repository}: {found[0].name} is not fetched: only {', '.join(sorted(allowed - {''}))} are, "
                "since other files can hold code; correct fetch.files"
            )
        if not found:
            there = ", ".join(remote.name for remote in listed[:12])
            raise Refusal(f"{spec.repository}: {pattern!r} of fetch.files fits no file; there are: {there}")
        chosen |= {remote.name: remote for remote in fit}
    return list(chosen.values())


def _nothing_of_use(spec: Section, listed: list[Remote], wanted: tuple[str, ...]) -> Refusal:
    unfit = [remote.name for remote in listed if remote.name.lower().endswith((*PICKLES, ".py"))]
    only = f" (only {unfit[0]}, which can run code)" if unfit else ""
    if is_dataset(spec.repository):
        converted = "; of many data sets the hub keeps a copy in Parquet, at revision refs/convert/parquet"
        hint = converted if spec.source == "hub" else "; take another data set"
        return Refusal(f"{spec.repository}: has no {', '.join(wanted)} file{only}{hint}")
    there = [remote.name for remote in listed if remote.name.lower().endswith(WEIGHTS)]
    hint = f"name what to take in fetch.files, of: {', '.join(there[:6])}" if there else "take one that has safetensors"
    return Refusal(f"{spec.repository}: has no {WHOLE} and no {INDEX}{only}; {hint}")


def _shards(spec: Section, index: Path, listed: list[Remote]) -> list[Remote]:
    """The files of weights that the index names."""
    top = {remote.name: remote for remote in listed}
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [top[name] for name in names if "/" not in name and name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(
            f"{spec.repository}: {INDEX} names no shards, or one that is not there ({error}); take another revision"
        ) from None

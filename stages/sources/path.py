"""A file of rows, a GGUF file or a folder of weights that already lies on this machine; copied, never linked.

DVC watches `data/own` and `models/own`: what lies there may change, and the pipeline notices. A file elsewhere must be
named with its sha256, and a folder elsewhere is refused.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

from stages.outputs import refuse_without_room
from stages.params import Section
from stages.refusal import Refusal
from stages.sources.provenance import Announced, Provenance, Sha256, checksum, checksums
from stages.sources.weights import CONFIGURATIONS, PICKLES, refuse_remote_code

WATCHED = (Path("data/own"), Path("models/own"))
HASHED_BYTES = 256 << 20
FILES = (".jsonl", ".json", ".csv", ".parquet", ".gguf", "")


class Spec(Section):
    """`path` is relative to the repository's top folder, or absolute; `sha256` is a file's."""

    source: Literal["path"]
    path: str
    sha256: Sha256 | None


def fetch(spec: Spec, folder: Path) -> Provenance:
    """Copy what `spec` names into `folder`; raises Refusal, with nothing copied, when it is not fit for use."""
    path = Path(spec.path)
    files = _files(spec, hashed=True)
    refuse_without_room(folder.parent, sum(file.stat().st_size for file in files))
    for file in files:
        shutil.copyfile(file, folder / file.name)
    origin = path.name if path.is_absolute() else path.as_posix()
    return Provenance(source="path", origin=[origin], files=checksums(folder))


def look(spec: Spec) -> Announced:
    """What `fetch` would copy; a file too large to be hashed in a second is not compared with its sha256."""
    path = Path(spec.path)
    small = path.is_file() and path.stat().st_size <= HASHED_BYTES
    files = _files(spec, hashed=small)
    config = path / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    return Announced({file.name: file.stat().st_size for file in files}, values)


def _files(spec: Spec, hashed: bool) -> list[Path]:
    """What is to be copied, fit for use; `hashed`: a file's checksum is what it should be, too."""
    path = Path(spec.path)
    if path.is_dir():
        return _weights(spec)
    if path.is_file():
        return [_file(spec, hashed)]
    raise Refusal(f"{spec.path}: there is no such file or folder; correct fetch.path in params.yaml")


def _is_in(path: Path, folder: Path) -> bool:
    """Whether `path` as written lies in `folder`; a symbolic link counts as lying where the link lies."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))  # noqa: PTH100 - resolve() follows links


def _file(spec: Spec, hashed: bool) -> Path:
    path = Path(spec.path)
    if path.suffix.lower() not in FILES:
        raise Refusal(f"{path}: is neither a folder of weights nor one of {', '.join(filter(None, FILES))}")
    found = checksum(path) if hashed else None
    if spec.sha256 is None and not any(_is_in(path, folder) for folder in WATCHED):
        now = f", which is now {found}" if found else ""
        raise Refusal(f"{path}: changes to it would go unnoticed; put it in data/own, or give fetch.sha256{now}")
    if found and spec.sha256 not in (None, found):
        raise Refusal(
            f"{path}: has sha256 {found[:12]}…, not {spec.sha256[:12]}…; "
            "restore the file, or correct fetch.sha256 in params.yaml"
        )
    return path


def _weights(spec: Spec) -> list[Path]:
    """The files at the top of a folder of weights: no pickles, no code, nothing hidden, no subfolders."""
    path = Path(spec.path)
    if not _is_in(path, Path("models/own")):
        raise Refusal(f"{path}: changes to a folder would go unnoticed here; put it, or a link to it, in models/own")
    if spec.sha256:
        raise Refusal(f"{path}: a folder has no sha256 of its own; leave fetch.sha256 empty")
    if not (path / "config.json").is_file():
        raise Refusal(f"{path}: has no config.json, so it is not a folder of weights; give the folder that has one")
    left_out = (*PICKLES, ".py")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != "." and p.suffix.lower() not in left_out)
    for file in files:
        if not file.resolve().is_relative_to(path.resolve()):
            raise Refusal(f"{file}: is a link out of its folder; make a copy that has none with: cp -rL {path} NEW")
    if not any(file.suffix == ".safetensors" for file in files):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix.lower() in PICKLES)
        why = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "no weights"
        raise Refusal(f"{path}: has {why}; save the model as safetensors")
    for name in CONFIGURATIONS:
        refuse_remote_code(path / name, str(path / name))
    return files

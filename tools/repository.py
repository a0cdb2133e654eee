"""What git and DVC say of this repository, in whose top folder the tools are run, and where its large things lie.

dvc is imported where it is asked, since tools/doctor.py does without.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.refusal import Refusal

LOCK = Path("dvc.lock")
RUNS = Path(".runs")  # what outlives a command that was killed
BASE, RAW, ADAPTER, MERGED = Path("models/base"), Path("data/raw"), Path("models/adapter"), Path("models/merged")
PROVENANCE = (BASE / "provenance.json", RAW / "provenance.json")


def git(*arguments: str | Path) -> str:
    """What git says, without the line's end; raises Refusal where it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise Refusal(f"git {arguments[0]} fails: {said}; run in the top folder of a clone of the repository")
    return done.stdout.rstrip("\n")


def uncommitted(*paths: str | Path, new: bool = True) -> list[str]:
    """Files, of those in `paths` where there are any, that are not as in the last commit. `new`: those too that git
    neither has nor ignores."""
    untracked = f"--untracked-files={'all' if new else 'no'}"
    told = git("status", "--porcelain", "-z", "--no-renames", untracked, "--", *paths)
    return [entry[3:] for entry in told.split("\0") if entry]  # two letters for the state, and a blank


def read_lock() -> dict[str, Any]:
    """dvc.lock; raises Refusal where there is none."""
    if not LOCK.is_file():
        raise Refusal(f"{LOCK}: there is none here; run in the repository's top folder, after dvc repro")
    return YAML(typ="safe", pure=True).load(LOCK)


def cache() -> Path:
    """The folder in which DVC keeps each file under its md5, as a path from here where it lies in here."""
    from dvc.repo import Repo

    with Repo(".") as repo:
        path = Path(repo.cache.local.path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def object_of(cache: Path, name: str) -> Path:
    """Where in the cache that lies whose md5 is `name`, with .dir behind it where it is a folder's list."""
    return cache / name[:2] / name[2:]


def members(cache: Path, name: str) -> list[dict[str, str]] | None:
    """relpath and md5 of each file of the folder whose list is `name`; None where the cache does not have that list, or
    has a damaged one."""
    listing = object_of(cache, name)
    content = listing.read_bytes() if listing.is_file() else b""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != name.removesuffix(".dir"):
        return None
    return json.loads(content)


def outputs(lock: dict[str, Any], cache: Path) -> Iterator[tuple[Path, str, str]]:
    """Each file of each output that `lock` names, its md5, and the stage that made it; nothing of a folder whose list
    is not in the cache, or is damaged."""
    for stage, entry in lock.get("stages", {}).items():
        for out in entry.get("outs", []):
            path, name = Path(out["path"]), out["md5"]
            if not name.endswith(".dir"):
                yield path, name, stage
                continue
            for member in members(cache, name) or []:
                yield path / member["relpath"], member["md5"], stage

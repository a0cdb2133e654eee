"""The cache, the outputs and the sources' checksums in; a line for each file that is not what it should be out.

    python -m tools.verify              every byte here is read and hashed; exit status 1 where something is wrong
    python -m tools.verify --remote     the objects on DVC's default remote too

DVC itself believes a file of its cache that looks untouched; outputs are links into the cache, so that one edit in
place damages both. Nothing is changed here: each line ends with what to type.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dvc.exceptions import DvcException
from dvc.repo import Repo
from tqdm import tqdm

from stages.refusal import Refusal, run
from tools.repository import PROVENANCE, cache, object_of, outputs, read_lock

BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Check:
    """A file to hash: `opened` opens it, `expected` is its md5 or sha256, `wrong` the line where it is another."""

    opened: Callable[[], BinaryIO]
    expected: str
    wrong: str

    def fails(self) -> str | None:
        """What is wrong, in one line; None where nothing is."""
        digest = hashlib.md5(usedforsecurity=False) if len(self.expected) == 32 else hashlib.sha256()
        try:
            with self.opened() as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            return f"{self.wrong} ({error.strerror or error})"
        return None if digest.hexdigest() == self.expected else self.wrong


def objects(cache: Path, users: dict[str, list[str]]) -> Iterator[Check]:
    """Every object of the cache against its name; `users` says which outputs hold it."""
    for path in sorted(cache.glob("??/*")):
        expected = path.parent.name + path.name.removesuffix(".dir")
        used = users.get(path.parent.name + path.name, [])
        held = f"; {', '.join(used)} holds it" if used else ""
        remove = " ".join(map(str, [path, *used]))
        wrong = f"{path}: is not what its name says{held}; rm -f {remove}, then dvc pull or dvc repro"
        yield Check(lambda path=path: path.open("rb"), expected, wrong)


def lost(lock: dict, cached: set[str], files: list[tuple[Path, str, str]], there: set[str]) -> Iterator[str]:
    """A line for each output that is here while objects of it are not: DVC would make it again."""
    for stage, entry in lock.get("stages", {}).items():
        for out in entry.get("outs", []):
            path = Path(out["path"])
            if out["path"] in cached and path.exists():
                needed = {out["md5"], *(name for file, name, _ in files if path in (file, *file.parents))}
                if gone := sorted(needed - there):
                    which = f"{gone[0]} and {len(gone) - 1} more" if gone[1:] else gone[0]
                    yield f"{path}: the cache has lost {which}; dvc commit {stage}, and python -m tools.verify again"


def sources() -> Iterator[Check]:
    """What download has recorded of the base model and the data, against the files."""
    for record in PROVENANCE:
        if not record.is_file():
            continue
        try:
            recorded = json.loads(record.read_bytes())
        except ValueError:
            continue  # an output like others, of which main() and objects() tell
        stage = "download@model" if record.parent.name == "base" else "download@data"
        for name, expected in (recorded.get("produced") or recorded["files"]).items():
            path = record.parent / name
            mend = f"rm -rf {record.parent}, then dvc repro -f {stage}"
            wrong = f"{path}: is not the file whose sha256 {record.name} names; {mend}"
            if path.exists() or "produced" in recorded:
                yield Check(lambda path=path: path.open("rb"), expected, wrong)


def remote_objects(repo: Repo, needed: dict[str, str]) -> Iterator[Check]:
    """The objects that dvc.lock needs, as the default remote holds them; `needed` names the outputs of those that it
    must hold, '' for others."""
    try:
        store = repo.cloud.get_remote_odb()
    except DvcException as error:
        raise Refusal(f"the remote cannot be opened: {error}; see dvc remote list") from None
    there = set(store.oids_exist(sorted(needed)))
    for name, output in sorted(needed.items()):
        path = store.oid_to_path(name)
        place = store.fs.unstrip_protocol(path)
        wrong = f"{place}: is not what its name says; delete it there, then dvc push"
        if name not in there:
            wrong = f"{place}: is not there, and {output} needs it; dvc push"
        if output or name in there:
            yield Check(lambda path=path: store.fs.open(path, "rb"), name.removesuffix(".dir"), wrong)


def pushed(lock: dict, files: list[tuple[Path, str, str]], kept: set[str]) -> dict[str, str]:
    """The objects of all outputs, with one that each belongs to; '' where only outputs that are not of `kept`, those
    that dvc push takes, have it."""
    objects = [(out["md5"], out["path"]) for entry in lock["stages"].values() for out in entry.get("outs", [])]
    owners = {path for _, path in objects}
    for path, name, _ in files:
        objects.append((name, next(str(one) for one in (path, *path.parents) if str(one) in owners)))
    needed: dict[str, str] = {}
    for name, output in objects:
        needed[name] = needed.get(name) or (output if output in kept else "")
    return needed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description="Hash everything again.")
    parser.add_argument("--remote", action="store_true", help="the default remote's objects too")
    options = parser.parse_args(arguments)
    lock, place = read_lock(), cache()
    files = list(outputs(lock, place))
    users: dict[str, list[str]] = {}
    for path, name, _ in files:
        users.setdefault(name, []).append(str(path))
    checks = list(objects(place, users))
    there = {path.parent.name + path.name for path in place.glob("??/*")}
    try:
        repo = Repo(".")
        cached = {out.def_path for out in repo.index.outs if out.use_cache}
        kept = {out.def_path for out in repo.index.outs if out.use_cache and out.can_push}
    except DvcException as error:
        raise Refusal(f"dvc.yaml: {error}") from None
    lines = list(lost(lock, cached, files, there))
    for path, name, stage in files:
        if not path.exists():
            how = "dvc checkout" if name in there else f"dvc pull, or dvc repro {stage}"
            lines.append(f"{path}: is not there; {how}")
        # a link to an object that is hashed already needs no second reading
        elif name not in there or not path.samefile(object_of(place, name)):
            wrong = f"{path}: is not what {stage} made; dvc checkout --force {path}, or git checkout {path}"
            checks.append(Check(lambda path=path: path.open("rb"), name, wrong))
    checks += sources()
    if options.remote:
        checks += remote_objects(repo, pushed(lock, files, kept))
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(Check.fails, checks), total=len(checks), unit="file", file=sys.stderr, disable=None)
        lines += [line for line in found if line]
    print("\n".join(lines) if lines else f"{len(checks)} files hashed: all are what they should be")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    run(main)

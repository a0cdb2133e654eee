"""The cache and .runs in; what nothing needs any longer, and what its going frees, out.

    python -m tools.prune           says what would go
    python -m tools.prune --yes     removes it

Of the cache goes what neither the workspace nor a branch, a tag or an experiment uses, unless it lies outside of this
repository, where other clones may use it; of .runs, checkpoints whose result DVC has, downloads whose files are in
place, and what nobody has gone on with for a week. It can all be made or fetched again: a setting that comes back runs
again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.models.checkpoints import DOWNLOADS, KEPT_DAYS, STATE, locked
from stages.outputs import size
from stages.refusal import Refusal, run
from stages.sources import kept
from tools.repository import PROVENANCE, RUNS, members, object_of
from tools.verify import Check

SWEEP = "sweep"  # where tools/sweep.py keeps its clones, and its lock
NEEDED_BY = {"all_branches": True, "all_tags": True, "all_experiments": True}  # and by the workspace


@dataclass(frozen=True)
class Unneeded:
    """What would go, why, the bytes that it frees, and how it is removed."""

    what: str
    why: str
    freed: int
    remove: Callable[[], object]


def cached(repo: Repo, made: Collection[str]) -> Iterator[Unneeded]:
    """What no output that is needed consists of. `dvc gc` would take small files too, such as metrics, that git holds
    and without which a stage runs again. An object that is linked from elsewhere frees nothing."""
    # force: a folder's listing that is not in this cache has no members there that anything could find
    used = {*made} | {info.value for infos in repo.used_objs(**NEEDED_BY, force=True).values() for info in infos}
    here = Path(repo.root_dir).resolve()
    stores = {store.path: store for _, store in repo.cache.by_scheme() if store}
    paths = []
    for path, store in stores.items():
        if Path(path).resolve().is_relative_to(here):
            paths += [Path(store.oid_to_path(name)) for name in store.all() if name not in used]
        else:
            print(f"{path}: other clones may use it too, so that nothing of it goes", file=sys.stderr)
    if paths:
        count = f"{len(paths)} object{'s' * (len(paths) > 1)} of the cache"
        why = "in use by no workspace, branch, tag or experiment"
        yield Unneeded(count, why, on_disk(paths), lambda: [path.unlink() for path in paths])


def checkpoints(made: dict[str, set[tuple[str, ...]]], place: Path) -> Iterator[Unneeded]:
    """Those whose result DVC has in its cache, `place`, and old ones; never those of a training that goes on."""
    for folder in sorted(RUNS.iterdir() if RUNS.is_dir() else ()):
        if not folder.is_dir() or folder.name == DOWNLOADS or held(folder):
            continue
        if any(all(whole(place, name) for name in names) for names in made.get(finished(folder), ()) if names):
            why = "training is done, and DVC has its result"
        elif old(folder):
            why = f"nobody has gone on from it for {KEPT_DAYS} days"
        else:
            continue
        yield Unneeded(str(folder), why, on_disk(files(folder)), lambda folder=folder: remove_checkpoints(folder))


def held(folder: Path) -> bool:
    """Whether a training has these checkpoints now."""
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        with locked(lock, "") if lock.exists() else contextlib.nullcontext():
            return False
    except Refusal:
        return True


def remove_checkpoints(folder: Path) -> None:
    with locked(folder.with_name(f"{folder.name}.lock"), f"{folder}: a training goes on from it"):
        shutil.rmtree(folder)


def finished(folder: Path) -> str:
    """The md5 of the loss curve of a training that is done; empty for one that is not."""
    for state in sorted(folder.glob(f"step*/{STATE}"), reverse=True)[:1]:
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: it goes when it is old
            found = json.loads(state.read_text(encoding="utf-8"))
            if found["finished"]:
                from stages.train import curve_of  # brings all that training needs

                return hashlib.md5(curve_of(found["history"]).encode(), usedforsecurity=False).hexdigest()
    return ""


def recorded(repo: Repo) -> dict[str, set[tuple[str, ...]]]:
    """The md5 of every output of the workspace, the branches, tags and experiments; with each, of the stages that made
    it, the md5 of all that the cache holds of their outputs, where it is whole."""
    made: dict[str, set[tuple[str, ...]]] = {}
    for _ in repo.brancher(**NEEDED_BY):
        for stage in repo.index.stages:
            outs = [out for out in stage.outs if out.hash_info]
            held = tuple(sorted(out.hash_info.value for out in outs if out.use_cache))
            for out in outs:
                made.setdefault(out.hash_info.value, set()).add(held)
    return made


def whole(place: Path, name: str) -> bool:
    """Whether the cache has the output with that md5, every file of it as it was made."""
    names = [member["md5"] for member in members(place, name) or []] if name.endswith(".dir") else [name]
    checks = [Check(partial(object_of(place, one).open, "rb"), one, "is not what it was") for one in names]
    return bool(checks) and not any(check.fails() for check in checks)


def downloads() -> Iterator[Unneeded]:
    """Those whose files are in place, and old ones; never one that is under way."""
    done = set()
    for path in PROVENANCE:
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(path.read_text(encoding="utf-8"))
            done |= {kept.name(found["source"], origin) for origin in found["origin"]}
    for folder in sorted((RUNS / DOWNLOADS).iterdir() if (RUNS / DOWNLOADS).is_dir() else ()):
        why = "its files are in place" if folder.name in done else f"nobody has gone on with it for {KEPT_DAYS} days"
        if folder.name in done or old(folder):
            with contextlib.suppress(Refusal), kept.held(folder):
                yield Unneeded(str(folder), why, on_disk(files(folder)), lambda folder=folder: kept.forget(folder))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def old(folder: Path) -> bool:
    held = (path for path in files(folder) if path.name != kept.LOCK)  # which is new whenever somebody looks
    newest = max((path.stat().st_mtime for path in held), default=folder.stat().st_mtime)
    return newest < time.time() - KEPT_DAYS * 86400


def on_disk(paths: Iterable[Path]) -> int:
    """The bytes that deleting the files frees."""
    return sum(status.st_size for status in map(os.stat, paths) if status.st_nlink == 1)


def refuse_while_dvc_runs(repo: Repo) -> None:
    """Raise Refusal while DVC runs a stage here or in a copy: what it has cached is in no dvc.lock that others see."""
    for path in (path for folder in (Path(repo.tmp_dir), RUNS / SWEEP) for path in folder.rglob("rwlock")):
        try:
            lock = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # gone, or being written
            continue
        holders = [*lock.get("write", {}).values(), *(info for of in lock.get("read", {}).values() for info in of)]
        for process in {info["pid"] for info in holders}:
            if runs(process):
                raise Refusal(f"DVC is running (process {process}); wait for its end, or end it")


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.prune", description="Say what can go, and what it frees.")
    parser.add_argument("--yes", action="store_true", help="remove it")
    options = parser.parse_args(arguments)
    try:
        RUNS.mkdir(exist_ok=True)
        sweep = locked(RUNS / f"{SWEEP}.lock", "a sweep runs, and what it has made is in no experiment yet")
        with Repo(".") as repo, repo.lock, sweep:
            refuse_while_dvc_runs(repo)
            made = recorded(repo)
            found = [*cached(repo, made), *checkpoints(made, Path(repo.cache.local.path)), *downloads()]
            for one in found:
                print(f"{size(one.freed):>10}  {one.what}: {one.why}")
                if options.yes:
                    one.remove()
    except DvcException as error:
        raise Refusal(f"DVC says: {error}; nothing is removed before it can tell what is in use") from None
    total = size(sum(one.freed for one in found))
    if not found:
        print("nothing can go")
    elif options.yes:
        print(f"{total} freed", file=sys.stderr)
    else:
        print(f"{total} would be freed by: python -m tools.prune --yes", file=sys.stderr)


if __name__ == "__main__":
    run(main)

"""Every object of a small real cache damaged in turn, and every file of a real checkpoint: is each found before use?

    python -m bench.corruptions

The pipeline runs on the tests' tiny model; then each object of its cache is flipped (one bit, time and size as they
were), cut short, and deleted, one at a time; the metrics, which git has and DVC's cache keeps besides, are not deleted.
Found: tools.verify ends with status 1 and names the object; undamaged, it ends with 0. A checkpoint of a training that
was killed is damaged the same way. Found: the one before it is what training would go on from. Adds `corruptions`,
`corruptions_found` and `corrupted`, how many objects and files there were, to bench/results/reliability.json.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from dvc.repo import Repo

from bench.checkpoints import RESULTS
from stages.models.checkpoints import Run
from stages.outputs import write_json
from tests.conftest import write_tiny_model
from tests.test_pipeline import STAGES, cloned
from tests.test_resume import Place, started
from tools import verify

DAMAGES = ("flipped", "truncated", "deleted")


def damage(path: Path, how: str) -> None:
    """In place, so that links to the file are damaged with it; what was flipped keeps size, time and mode."""
    before, content = path.stat(), path.read_bytes() or b"\0"  # an empty one gets a byte
    middle = len(content) // 2
    if how == "deleted":
        path.unlink()
        return
    path.chmod(0o644)
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(flipped if how == "flipped" else content[:middle])
    path.chmod(before.st_mode)
    if how == "flipped":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def verified() -> tuple[int, str]:
    """tools.verify's exit status, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            verify.main([])
        except SystemExit as ended:
            return ended.code, said.getvalue()
    raise AssertionError("verify did not end")


def in_the_cache(folder: Path) -> tuple[int, list[bool]]:
    """How many objects the pipeline's cache has; for each damage of each, whether it is found."""
    found, back, held = [], Path.cwd(), folder / "held"
    with cloned(folder, write_tiny_model(folder / "tiny")) as clone:
        assert clone.repro() == STAGES
        os.chdir(clone.folder)
        assert verified()[0] == 0, verified()[1]
        git_has = {out.hash_info.value for out in Repo(".").index.outs if not out.use_cache}
        for path in sorted(Path(".dvc/cache/files/md5").glob("??/*")):
            name = path.parent.name + path.name
            for how in DAMAGES:
                if (how == "deleted" and name in git_has) or (how == "truncated" and not path.stat().st_size):
                    continue
                before, content = path.stat(), path.read_bytes()
                os.link(path, held)
                damage(path, how)
                status, said = verified()
                found.append(status == 1 and (name if how == "deleted" else str(path)) in said)
                if not found[-1]:
                    print(f"not found: {path} {how}\n{said}", file=sys.stderr)
                path.unlink(missing_ok=True)
                held.chmod(0o644)
                held.write_bytes(content)
                held.chmod(before.st_mode)
                os.utime(held, ns=(before.st_atime_ns, before.st_mtime_ns))
                held.rename(path)
        assert verified()[0] == 0, verified()[1]
        count = len(list(Path(".dvc/cache/files/md5").glob("??/*")))
        os.chdir(back)
    return count, found


def in_a_checkpoint(folder: Path) -> list[bool]:
    """For each damage of each file of the newest checkpoint, whether the one before is used."""
    found = []
    with started(folder / "python") as python:
        place = Place(folder / "place", python, write_tiny_model(folder / "model"))
        place.killed("step:6")
    before, last = place.checkpoints()
    for name in sorted(path.name for path in last.iterdir()):
        for how in DAMAGES:
            copy = folder / "copy"
            shutil.copytree(last.parent, copy)
            damage(copy / last.name / name, how)
            used = Run(copy, "auto").latest()
            found.append(used is not None and used.step == int(before.name[4:13]))
            if not found[-1]:
                print(f"not found: {last / name} {how}", file=sys.stderr)
            shutil.rmtree(copy)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pipeline").mkdir()
        count, objects = in_the_cache(folder / "pipeline")
        files = in_a_checkpoint(folder)
    figures = {
        "corruptions": len(objects) + len(files),
        "corruptions_found": sum(objects) + sum(files),
        "corrupted": {"objects": count, "checkpoint_files": len(files) // len(DAMAGES)},
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, {**known, **figures})


if __name__ == "__main__":
    main()

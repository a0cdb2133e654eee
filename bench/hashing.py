"""How long `dvc repro` takes to hash and cache an output of 10 GB, by its number of files and those hashed at once.

    python -m bench.hashing FOLDER      FOLDER needs 11 GB
    python -m bench.hashing nothing     how long it takes where nothing has changed: here, where all is up to date

Both append to bench/results/data.json. The bytes are random and have just been written, so that what memory there is
holds them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.cpu_formats import cpu
from bench.data import RESULTS
from stages.outputs import write_json

GB = 10**9
# files in the folder, core.checksum_jobs (None: DVC's own, half the cores, four at most)
CASES = ((1, None), (5, None), (1, 16), (5, 16), (10, 16), (20, 16))
STAGE = "stages: {merge: {cmd: mv ready model, outs: [model]}}"


def dvc(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def write_random(folder: Path, files: int, size: int) -> None:
    folder.mkdir()
    for number in range(files):
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            for _ in range(size // 10**7):
                file.write(os.urandom(10**7))


def seconds(folder: Path, files: int, jobs: int | None) -> float:
    """Of a stage that puts 10 GB in so many files into place, in a repository of its own with this one's link types."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dvc(folder, "init", "--no-scm", "-q")
    for key, value in {"cache.type": "hardlink,symlink", "core.analytics": "false", "core.checksum_jobs": jobs}.items():
        if value is not None:
            dvc(folder, "config", key, str(value))
    (folder / "dvc.yaml").write_text(STAGE)
    write_random(folder / "ready", files, 10 * GB // files)
    began = time.perf_counter()
    dvc(folder, "repro", "-q")
    taken = time.perf_counter() - began
    assert all(file.stat().st_nlink == 2 or file.is_symlink() for file in (folder / "model").iterdir())
    shutil.rmtree(folder)
    return round(taken, 1)


def seconds_of_nothing() -> float:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], check=True, stdout=subprocess.PIPE, text=True)
    taken = time.perf_counter() - began
    assert "up to date" in done.stdout, done.stdout
    return round(taken, 2)


def main(folder: Path) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    machine = f"{cpu()}, {os.cpu_count()} cores"
    if folder == Path("nothing"):
        found = {"stage": "nothing to do", "seconds": [seconds_of_nothing() for _ in range(6)]}
        print(found, flush=True)
        write_json(RESULTS, [*results, {**found, "machine": machine}])
        return
    for files, jobs in CASES:
        found = {"stage": "hashing", "files": files, "gb": 10, "checksum_jobs": jobs}
        found["seconds"] = seconds(folder, files, jobs)
        print(found, flush=True)
        results.append({**found, "machine": machine})
        write_json(RESULTS, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Every malformed data set and parameter file of tests/malformed.py, each given to the stage in a process of its own.

    python -m bench.malformed

Adds bad_inputs, bad_inputs_refused and bad_inputs_cpu_seconds_at_most to bench/results/reliability.json. Refused:
status 2, a single line that goes on as the list says, nothing written, in under five seconds of the processor's time,
which other work on the machine does not lengthen as it does the clock's. The modules are imported once, before the
processes are forked, and that time is added to each.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stages import params, prepare
from stages.outputs import write_json
from stages.refusal import run
from stages.tasks import chat, instructions, quotes, text_to_sql  # noqa: F401 - what prepare imports when it needs it
from tests.conftest import ROOT, write_params
from tests.malformed import DATA, params_files

RESULTS = ROOT / "bench/results/reliability.json"
SECONDS = 5.0  # of the processor, that a refusal may take
PREPARE = ("data/raw", "data/conversations", "metrics/data.json")


def refused(folder: Path, said: str, main: Callable[[list[str]], None], *arguments: str) -> tuple[bool, float]:
    """Whether the stage refuses, its line going on as `said`, and the seconds of the processor that it took."""
    before = sorted(folder.rglob("*"))
    with tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.chdir(folder)
                os.dup2(stderr.fileno(), 2)
                sys.argv = ["stage", *arguments]
                run(main)
                status = 0
            except SystemExit as end:
                status = end.code
            finally:  # where there is a trace, status 1 tells
                sys.stderr.flush()
                os._exit(status)
        _, status, used = os.wait4(child, 0)
        stderr.seek(0)
        line = stderr.read().decode()
    seconds = used.ru_utime + used.ru_stime
    one_line = line.startswith(f"error: {said}") and line.count("\n") == 1
    sound = os.waitstatus_to_exitcode(status) == 2 and one_line and sorted(folder.rglob("*")) == before
    if not sound or seconds > SECONDS:
        print(f"not as it should be: {said!r} after {seconds:.1f} s, {line[-400:]!r}", file=sys.stderr)
    return sound and seconds <= SECONDS, seconds


def main() -> None:
    found: list[tuple[bool, float]] = []
    imports = time.process_time()
    for wrong in DATA:
        with tempfile.TemporaryDirectory() as name:
            write_params(Path(name), **wrong.write(Path(name)))
            found.append(refused(Path(name), wrong.said, prepare.main, *PREPARE))
    for content, said in params_files():
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "params.yaml").write_bytes(content)
            found.append(refused(Path(name), f"params.yaml: {said}", params.main))
    figures = {
        "bad_inputs": len(found),
        "bad_inputs_refused": sum(sound for sound, _ in found),
        "bad_inputs_cpu_seconds_at_most": round(imports + max(seconds for _, seconds in found), 2),
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, {**known, **figures})


if __name__ == "__main__":
    main()

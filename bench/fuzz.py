"""Every parser of strangers' files, given for a stated time what hypothesis makes up (tests/strange.py).

    python -m bench.fuzz SECONDS [PARSER …]

SECONDS are of each parser, all of them where none is named. Each runs in a process of its own with a gibibyte beyond
what it starts with, so that a crash of a library and memory without bounds are found too. Where atheris is installed,
what it sees the parser's code do guides the choice of inputs (`python -m bench.fuzz guided SECONDS PARSER …`).

Prints what was found, each with the smallest input, and adds fuzz_seconds, fuzz_inputs and fuzz_found, by parser, to
bench/results/reliability.json.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench.checkpoints import RESULTS
from stages.outputs import write_json

MEMORY_BYTES = 1 << 30
INPUTS_AT_ONCE = 500  # after which hypothesis begins from another seed


def search(name: str, seconds: float, guided: bool) -> None:
    """Try inputs until the time is up or one is found that is wrong; print a JSON line of how it went."""
    if guided:
        import atheris

        with atheris.instrument_imports(include=["stages", "json", "csv", "zipfile", "gguf", "ruamel"]):
            from tests.strange import PARSERS
    else:
        from tests.strange import PARSERS
    import hypothesis

    parser = PARSERS[name]
    inputs, found, last = 0, "", b""
    ends = time.monotonic() + seconds

    class Over(BaseException):
        """The time is up."""

    with tempfile.TemporaryDirectory() as folder:

        def attempt(content: bytes) -> None:
            nonlocal inputs, found, last
            if time.monotonic() > ends and not found:
                raise Over
            inputs += 1
            try:
                parser.try_on(content, Path(folder))
            except Exception:
                found, last = traceback.format_exc(limit=-4), content  # the last that hypothesis tries is the smallest
                raise

        attempt(b"")  # what a first call imports is not an input's doing
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))
        settings = hypothesis.settings(
            max_examples=INPUTS_AT_ONCE,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        began = time.monotonic()
        try:
            if guided:
                test = settings(hypothesis.given(parser.contents)(attempt))
                atheris.Setup([sys.argv[0], "-verbosity=0"], test.hypothesis.fuzz_one_input)
                atheris.Fuzz()
            seed = 0
            while True:
                seed += 1
                hypothesis.seed(seed)(settings(hypothesis.given(parser.contents)(attempt)))()
        except Over:
            pass
        except Exception:  # noqa: BLE001 - what hypothesis makes of what was found, or a fault of the search
            found = found or traceback.format_exc()[-1000:]  # of the search itself
        finally:
            taken = round(time.monotonic() - began, 1)
            said = {"parser": name, "seconds": taken, "inputs": inputs, "found": found, "input": repr(last)}
            print(json.dumps(said), flush=True)
            os._exit(0)  # atheris would go on, or end otherwise


def main(arguments: list[str]) -> None:
    from tests.strange import PARSERS

    guided = arguments[0] == "guided"
    seconds, *names = arguments[guided:]
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    figures = {key: results.get(key, {}) for key in ("fuzz_seconds", "fuzz_inputs", "fuzz_found")}
    for name in names or PARSERS:
        command = [sys.executable, "-m", "bench.fuzz", "one", name, seconds, "guided" if guided else ""]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        line = (re.findall(r"^\{\"parser.*$", process.stdout, re.MULTILINE) or [""])[-1]
        if not line:
            found = {"seconds": 0, "inputs": 0, "found": f"ended with {process.returncode}: {process.stderr[-2000:]}"}
        else:
            found = json.loads(line)
        print(f"{name}: {found['inputs']} inputs in {found['seconds']} s")
        if found["found"]:
            print(found["found"], found.get("input", "")[:2000], sep="\n", flush=True)
        for key, value in figures.items():
            own = found[key.removeprefix("fuzz_")]
            value[name] = round(value.get(name, 0) + (bool(own) if key == "fuzz_found" else own), 1)
        sys.stdout.flush()
        write_json(RESULTS, {**json.loads(RESULTS.read_text(encoding="utf-8")), **figures})


if __name__ == "__main__":
    if sys.argv[1] == "one":
        search(sys.argv[2], float(sys.argv[3]), sys.argv[4] == "guided")
    main(sys.argv[1:])

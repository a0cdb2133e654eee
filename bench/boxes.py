"""The tests in which one pipeline runs again, and on other machines: run, and what they counted set down.

    python -m bench.boxes

Adds repro_twice, repro_twice_identical, fresh_boxes, fresh_box_identical and canary_hits to
bench/results/reliability.json. A test that is skipped, as where there is no sshd, counts nothing.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from bench.checkpoints import RESULTS
from stages.outputs import write_json

TESTS = ("tests/test_boxes.py", "tests/test_pipeline.py::test_a_forced_rerun_leaves_the_lock_as_it_was")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-ojunit_family=xunit1", f"--junitxml={report}", *TESTS], check=False
        )
        found = ElementTree.parse(report).iter("property")
        counts: Counter[str] = Counter()
        for counted in found:
            counts[counted.attrib["name"]] += int(counted.attrib["value"])
    print(json.dumps(counts, indent=2))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    write_json(RESULTS, {**known, **counts})


if __name__ == "__main__":
    main()

"""What the stages hold of a base that is larger than they are: from download to the merged model's answers.

    python -m bench.large FOLDER LAYERS …      the shape of Gemma 2 9B with so many layers: 1.8 GB and 0.4 GB each

Random weights in shards of 400 MB, in models/own as a user would put them there; rows, adapter and params.yaml made up.
FOLDER needs room for the base twice, and is empty again afterwards. 121 layers are 50 GB. Each stage is a process of
its own; `peak_anonymous_gib` and `peak_resident_gib` as in bench/merge.py. Adds to `large` in
bench/results/reliability.json.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.checkpoints import RESULTS
from bench.cpu_formats import cpu
from bench.merge import SHAPES, watch, write_random
from stages.outputs import write_json
from tests.conftest import ROOT, tiny_tokenizer, write_params

GIB = 2**20  # in the KiB of /proc/PID/status
OWN = Path("models/own/large")
SETTINGS = {
    "model.fetch": {"source": "path", "path": str(OWN), "sha256": None},
    "model.chat_template": None,
    "data.fetch": {"source": "path", "path": "data/own/rows.jsonl", "sha256": None},
    "task": {"name": "chat", "rows": "rows.jsonl"},
    "prepare.group_by": "opening",
    "prepare.validation": 0.2,
    "merge.rows": 2,
    "merge.max_kl": 1000.0,  # a random adapter
    "evaluate.rows": 2,
    "evaluate.max_new_tokens": 2,
    "machine.device": "cpu",
    "machine.devices": 1,
    "machine.dtype": "bfloat16",
}
STAGES = {
    "download": "download model models/base",
    "merge": "merge models/base models/adapter data/tokens/test.parquet models/merged metrics/merge.json",
    "evaluate": "evaluate models/merged data/conversations/test.jsonl data/conversations/learned.jsonl "
    "data/tokens/test.parquet data/answers/tuned.jsonl metrics/tuned.json",
}
ROWS_STAGES = (
    "download data data/raw",
    "prepare data/raw data/conversations metrics/data.json",
    "encode models/base data/conversations data/tokens metrics/tokens.json",
)
NEEDED_NO_LONGER = {"download": OWN, "merge": Path("models/base"), "evaluate": Path("models/merged")}


def stage(folder: Path, command: str) -> dict[str, float]:
    """Run it there: its seconds and the most memory that it held."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *f"stages.{command}".split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")  # where memory does not suffice, this one goes
    peaks = {"RssAnon": 0, "VmHWM": 0}
    watching = threading.Thread(target=watch, args=(process.pid, peaks))
    watching.start()
    _, said = process.communicate()
    watching.join()
    assert process.returncode == 0, said
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_anonymous_gib": round(peaks["RssAnon"] / GIB, 2),
        "peak_resident_gib": round(peaks["VmHWM"] / GIB, 2),
    }


def measured(folder: Path, layers: int) -> dict:
    shutil.rmtree(folder, ignore_errors=True)
    write_random(
        {**SHAPES["gemma2-9b"], "num_hidden_layers": layers}, folder / OWN, folder / "models/adapter", shard="400MB"
    )
    tiny_tokenizer().save_pretrained(folder / OWN)
    write_params(folder, **SETTINGS)
    rows = [[("user", f"What is {n} and {n}?"), ("assistant", f"It is {2 * n}.")] for n in range(60)]
    (folder / "data/own").mkdir(parents=True)
    with (folder / "data/own/rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            messages = [{"role": role, "content": content} for role, content in row]
            file.write(json.dumps({"messages": messages}) + "\n")
    shards = list((folder / OWN).glob("*.safetensors"))
    found = {
        "layers": layers,
        "gb": round(sum(path.stat().st_size for path in shards) / 1e9, 2),
        "shards": len(shards),
        "machine": f"{cpu()}, {os.cpu_count()} cores",
    }
    for name, command in STAGES.items():
        found[name] = stage(folder, command)
        shutil.rmtree(folder / NEEDED_NO_LONGER[name])
        print(name, found[name], file=sys.stderr, flush=True)
        for more in ROWS_STAGES if name == "download" else ():
            stage(folder, more)
    shutil.rmtree(folder)
    return found


def main(arguments: list[str]) -> None:
    for layers in map(int, arguments[1:]):
        found = measured(Path(arguments[0]), layers)
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        others = [one for one in known.get("large", []) if one["layers"] != layers]
        write_json(RESULTS, {**known, "large": sorted([*others, found], key=lambda one: one["layers"])})


if __name__ == "__main__":
    main(sys.argv[1:])

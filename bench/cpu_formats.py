"""Which number format a CPU multiplies faster: why `machine.dtype: auto` measures it on a CPU instead of reading flags.

    python -m bench.cpu_formats        adds this machine to bench/results/cpu_formats.json

One matrix product of Gemma 3 270M (640 to 2,048 features), in each format in turn, the first again at the end.
"""

import json
import platform
import time
from pathlib import Path
from statistics import median

import torch

from stages.outputs import write_json

RESULTS = Path("bench/results/cpu_formats.json")
TOKENS = (8, 160, 650)
FORMATS = (torch.float32, torch.bfloat16, torch.float32)


def gflops(tokens: int, dtype: torch.dtype, repeats: int = 30) -> float:
    """Median rate of x·Wᵀ for x [tokens, 640] and W [2048, 640], in 10⁹ operations a second."""
    x, weight = torch.randn(tokens, 640, dtype=dtype), torch.randn(2048, 640, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * 640 * 2048 / median(seconds) / 1e9


def cpu() -> str:
    """What the kernel calls the processor, with its family and model: hypervisors hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if value}
    return f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}"


def main() -> None:
    rows = [
        {"tokens": tokens, "format": str(dtype).removeprefix("torch."), "gflops": round(gflops(tokens, dtype), 1)}
        for tokens in TOKENS
        for dtype in FORMATS
    ]
    has = torch.cpu.get_capabilities()
    machine = {
        "cpu": cpu(),
        "cores": torch.get_num_threads(),
        "avx512_bf16": bool(has.get("avx512_bf16")),
        "amx_bf16": bool(has.get("amx_bf16")),
        "torch": torch.__version__,
    }
    others = [m for m in json.loads(RESULTS.read_text(encoding="utf-8")) if m["machine"]["cpu"] != machine["cpu"]]
    write_json(RESULTS, [*others, {"machine": machine, "rows": rows}])
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()

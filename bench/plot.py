"""Draws bench/results/*.json as bench/results/speed.svg.

python -m bench.plot
"""

import json
import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "ours": "lorepro",
    "ours-nf4": "lorepro, nf4",
    "axolotl": "axolotl, its LoRA kernels",
    "trl": "TRL, bf16, no checkpointing",
    "trl-nf4": "TRL, nf4, checkpointing",
    "tutorial": "the tutorial's settings",
}


def training(axes) -> None:
    """The slowest reading of each variant in the newest run with TRL's fastest, or else in the newest that has it."""
    rows = json.loads((RESULTS / "train_h200.json").read_text(encoding="utf-8"))
    runs: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["model"] == "gemma3-1b" and row["variant"] in NAMES:
            found = runs.setdefault(row["run"], {})
            found[row["variant"]] = min(row["tokens_per_second"], found.get(row["variant"], math.inf))
    chosen = max(run for run in runs if "trl" in runs[run])
    shown = []
    for name in {name for found in runs.values() for name in found}:
        run = chosen if name in runs[chosen] else max(run for run in runs if name in runs[run])
        other = "" if run == chosen else " (another run)"
        shown.append((NAMES[name] + other, runs[run][name], name.startswith("ours")))
    dots(axes, sorted(shown, key=lambda one: one[1]))
    axes.set_title("Training, tokens a second\nGemma-3-1B shape, one H200", loc="left", fontsize=11)


def stage(axes) -> None:
    found = json.loads((RESULTS / "train_stage_h200.json").read_text(encoding="utf-8"))
    names = {
        "ours": "lorepro",
        "ours-again": "lorepro, its kernels compiled before",
        "unsloth": "Unsloth's whole script",
    }
    beside = max(one["run"] for one in found if one["variant"] == "unsloth")
    rows = [
        (names[one["variant"]], one["seconds"], one["variant"].startswith("ours"))
        for one in found
        if one["run"] == beside
    ]
    dots(axes, sorted(rows, key=lambda one: -one[1]))
    axes.set_title("The whole train stage, seconds\n10,000 rows, Gemma-3-1B shape, one H200", loc="left", fontsize=11)


def generation(axes) -> None:
    found = json.loads((RESULTS / "evaluation.json").read_text(encoding="utf-8"))
    rows = []
    for where, title in (("cpu", "two CPU cores, 270M"), ("gpu", "one H100, 1B shape")):
        one = found[f"generation_{where}"]
        rows.append((f"a pipeline call a row, {title}", max(one["pipeline_rows_per_minute"]), False))
        rows.append((f"lorepro, {title}", one["rows_per_minute"], True))
    dots(axes, rows)
    axes.set_title("Answering, rows a minute", loc="left", fontsize=11)


def dots(axes, rows: list[tuple[str, float, bool]]) -> None:
    """A dot for each name and number, ours in colour, on a logarithmic scale."""
    places = range(len(rows))
    colours = ["#3987e5" if ours else "#808891" for *_, ours in rows]
    axes.scatter([number for _, number, _ in rows], places, c=colours, s=60, zorder=2)
    axes.grid(axis="x", color="#e3e6ea", zorder=1)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("")
    numbers = [number for _, number, _ in rows]
    axes.set_xlim(min(numbers) / 2, max(numbers) * 3)
    for place, (_, number, _) in zip(places, rows, strict=True):
        axes.text(number * 1.15, place, f"{number:,.0f}", va="center")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    settings = {"svg.hashsalt": "lorepro", "svg.fonttype": "path", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.5, 6.8), layout="constrained")
        above, middle, below = figure.subplots(3, 1, height_ratios=[6, 3, 4])
        training(above)
        stage(middle)
        generation(below)
        figure.savefig(RESULTS / "speed.svg", facecolor="white", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()

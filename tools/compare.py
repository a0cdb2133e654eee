"""Two experiments, branches or commits in; what the second has over the first, and what of that is noise, out.

    python -m tools.compare EXP1 EXP2 [ANSWERS]

Reads the answers that both stored, data/answers/tuned.jsonl unless another file is named; `workspace` stands for the
files as they are here. Rows that only one of them has answered are left out, and counted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import dvc.api
from dvc.exceptions import DvcException
from dvc.scm import SCMError

from stages import noise
from stages.refusal import Refusal, run

ANSWERS = "data/answers/tuned.jsonl"


def answers(revision: str, path: str) -> dict[str, dict[str, Any]]:
    """The answers stored under a revision, by the row's id."""
    try:
        text = (
            Path(path).read_text(encoding="utf-8")
            if revision == "workspace"
            else dvc.api.read(path, repo=".", rev=revision)
        )
    except SCMError:
        raise Refusal(f"{revision}: no such experiment, branch or commit; dvc exp show lists the experiments") from None
    except (DvcException, OSError) as error:
        raise Refusal(f"{revision}: {path} cannot be had: {error}; dvc pull, or run it again: dvc exp run") from None
    rows = {row["id"]: row for row in map(json.loads, filter(None, text.split("\n")))}
    if not rows or "group" not in next(iter(rows.values())):
        raise Refusal(f"{revision}: {path} is from before answers kept their group and loss; run it again: dvc repro")
    return rows


def table(before: list[dict], after: list[dict], names: tuple[str, str]) -> list[str]:
    """Lines of text: each score of both, the difference with its 95% interval, its exact p, and the verdict."""
    first, second = noise.read(before), noise.read(after)
    width = max(map(len, first)) + 2
    wide = max(8, *map(len, names))
    lines = [f"{'':{width}}{names[0]:>{wide}}  {names[1]:>{wide}}  difference  95% interval         p        verdict"]
    for name in (name for name in first if name in second):
        found = noise.difference(first[name], second[name])
        between = f"{found.low:+.4f} to {found.high:+.4f}"
        lines.append(
            f"{name:{width}}{first[name].mean:>{wide}.4f}  {second[name].mean:>{wide}.4f}  {found.mean:>+10.4f}  "
            f"{between:20} {found.p:.2g}".ljust(width + 2 * wide + 46)
            + f" {noise.verdict(name, found)}"
        )
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description="What the second has over the first.")
    parser.add_argument("before", metavar="EXP1", help="an experiment, branch or commit, or workspace")
    parser.add_argument("after", metavar="EXP2")
    parser.add_argument("answers", nargs="?", default=ANSWERS, metavar="ANSWERS", help=f"{ANSWERS}, if left out")
    options = parser.parse_args(arguments)
    names = options.before, options.after
    first, second = (answers(revision, options.answers) for revision in names)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise Refusal(f"{names[0]} and {names[1]} answered different rows; compare runs of the same test rows")
    print("\n".join(table([first[i] for i in shared], [second[i] for i in shared], names)))
    left_out = len(first) + len(second) - 2 * len(shared)
    more = f"; {left_out} answers to rows that only one answered are left out" if left_out else ""
    print(f"{len(shared)} rows in {len({first[i]['group'] for i in shared})} groups{more}")


if __name__ == "__main__":
    run(main)

"""Raw rows in; conversations out, without duplicates, split into train, validation and test by group.

    python -m stages.prepare data/raw data/conversations metrics/data.json

Knows no model. A group goes to the side that its own hash says, so rows that are added later move no older row.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages import rows
from stages.conversation import SIDES, Conversation
from stages.outputs import new_folder, write_json, write_jsonl
from stages.params import Prepare, load
from stages.refusal import Refusal, run


@dataclass(frozen=True)
class Split:
    """Conversations by side, in the order of their source; how many were left out, as exact duplicates, and because a
    row on a side of more weight asks the very same; and the refusals of those that the task could not use."""

    sides: dict[str, list[Conversation]]
    duplicates: int
    asked_twice: int
    unusable: list[Refusal]


def side(group: str, prepare: Prepare) -> str:
    """The side of the split that a group belongs to, whatever other groups there are."""
    share = _share(f"{prepare.seed}:{group}")
    if share < prepare.test:
        return "test"
    return "validation" if share < prepare.test + prepare.validation else "train"


def _share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def split(conversations: Iterable[Conversation | Refusal], prepare: Prepare) -> Split:
    """Conversations, each on its side.

    Two groups can hold the same prompt with different answers. It then stays where it counts most: in the test rows,
    which no row added later may change, else in the validation rows.
    """
    seen: set[str] = set()
    kept, unusable, duplicates = [], [], 0
    for conversation in conversations:
        if isinstance(conversation, Refusal):
            unusable.append(conversation)
            continue
        if prepare.group_by not in conversation.groups:
            known = ", ".join(sorted(conversation.groups))
            raise Refusal(f"params.yaml: prepare.group_by is {prepare.group_by}; this task's rows group by: {known}")
        if conversation.id in seen:
            duplicates += 1
            continue
        seen.add(conversation.id)
        kept.append(conversation)
    if prepare.rows is not None and prepare.rows < len(kept):
        order = sorted(kept, key=lambda c: _share(f"{prepare.seed}:{c.id}"))[: prepare.rows]
        chosen = {c.id for c in order}
        kept = [c for c in kept if c.id in chosen]
    sides: dict[str, list[Conversation]] = {name: [] for name in SIDES}
    for conversation in kept:
        sides[side(conversation.groups[prepare.group_by], prepare)].append(conversation)
    asked: set[str] = set()
    for name in reversed(SIDES):
        sides[name] = [c for c in sides[name] if c.prompt_key not in asked]
        asked |= {c.prompt_key for c in sides[name]}
    return Split(sides, duplicates, len(kept) - sum(map(len, sides.values())), unusable)


def leaks(sides: dict[str, list[Conversation]], group_by: str) -> int:
    """Rows outside the training rows whose group, or whose very prompt, stands among the training rows."""
    groups = {c.groups[group_by] for c in sides["train"]}
    prompts = {c.prompt_key for c in sides["train"]}
    others = sides["validation"] + sides["test"]
    return sum(c.groups[group_by] in groups or c.prompt_key in prompts for c in others)


def main(arguments: list[str]) -> None:
    raw, out, metrics = (Path(argument) for argument in arguments)
    params = load()
    task = importlib.import_module(f"stages.tasks.{params.task.name}")
    files = {name: rows.read(raw / file) for name, file in params.task.files().items()}
    found = split(task.conversations(files, params.task), params.prepare)
    sides = found.sides
    if hasattr(task, "unscorable"):
        refusals = {row.id: why for row, why in task.unscorable(sides["test"], params.task)}
        sides["test"] = [row for row in sides["test"] if row.id not in refusals]
        found.unusable.extend(refusals.values())
    for name in SIDES:
        if not sides[name]:
            total = sum(map(len, sides.values()))
            wrong = f"; {len(found.unusable)} are unusable, the first: {found.unusable[0]}" if found.unusable else ""
            raise Refusal(f"no {name} rows out of {total}; add rows, or change the shares in prepare{wrong}")
    leaked = leaks(sides, params.prepare.group_by)
    if leaked:
        raise Refusal(
            f"{leaked} validation or test rows ask what a training row asks: a fault of this stage; report it"
        )
    with new_folder(out) as folder:
        for name in SIDES:
            write_jsonl(folder / f"{name}.jsonl", (c.model_dump() for c in sides[name]))
        # empty where no score reads it: an edited training row then reruns no evaluation of the base model
        learned = sides["train"] if getattr(task, "TRAINING", False) else []
        write_jsonl(folder / "learned.jsonl", (c.reference for c in learned))
        if found.unusable:
            (folder / "unusable.txt").write_text("".join(f"{why}\n" for why in found.unusable), encoding="utf-8")
    sizes = {f"{name}_rows": len(sides[name]) for name in SIDES}
    groups = {f"{name}_groups": len({c.groups[params.prepare.group_by] for c in sides[name]}) for name in SIDES}
    left_out = {"unusable": len(found.unusable), "duplicates": found.duplicates, "asked_twice": found.asked_twice}
    write_json(metrics, {**sizes, **groups, **left_out, "leaks": leaked})
    print(", ".join(f"{count} {name}" for name, count in {**sizes, **left_out}.items()), file=sys.stderr)


if __name__ == "__main__":
    run(main)

"""Raw rows in; conversations out, without duplicates, split into train, validation and test by group.

    python -m stages.prepare data/raw data/conversations metrics/data.json

Knows no model. A group goes to the side that its own hash says, so rows that are added later move no older row.
"""

import hashlib
import importlib
import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages import rows
from stages.conversation import SIDES, Conversation, Stored
from stages.outputs import new_folder, refuse_without_room, write_json, write_jsonl
from stages.params import Prepare, load
from stages.refusal import Refusal, run

LEFT_OUT = -1


@dataclass(frozen=True)
class Keys:
    """What decides about the rows, in the order of their source: 25 bytes a row, whatever the row holds.

    Ids, groups and prompts are digests of 8 bytes; that any two of a million prompts share one by chance is a matter
    of one data set in 37 million. Sides are places in SIDES.
    """

    ids: array = field(default_factory=lambda: array("Q"))
    groups: array = field(default_factory=lambda: array("Q"))
    prompts: array = field(default_factory=lambda: array("Q"))
    sides: array = field(default_factory=lambda: array("b"))

    def add(self, row: Conversation, prepare: Prepare) -> None:
        if prepare.group_by not in row.groups:
            known = ", ".join(sorted(row.groups))
            raise Refusal(f"params.yaml: prepare.group_by is {prepare.group_by}; this task's rows group by: {known}")
        group = row.groups[prepare.group_by]
        self.ids.append(int(row.id, 16))
        self.groups.append(_digest(group, 8))
        self.prompts.append(_digest(row.prompt_key, 8))
        self.sides.append(SIDES.index(side(group, prepare)))


@dataclass(frozen=True)
class Split:
    """Each row's side, as its place in SIDES or LEFT_OUT, in the order of the source; how many were left out as exact
    duplicates, and because a row on a side of more weight asks the very same."""

    sides: np.ndarray
    duplicates: int
    asked_twice: int


def side(group: str, prepare: Prepare) -> str:
    """The side of the split that a group belongs to, whatever other groups there are."""
    share = _share(f"{prepare.seed}:{group}")
    if share < prepare.test:
        return "test"
    return "validation" if share < prepare.test + prepare.validation else "train"


def _share(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, evenly spread."""
    return _digest(text, 7) / 2**56


def _digest(text: str, size: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")


def split(keys: Keys, prepare: Prepare) -> Split:
    """The rows, each on its side.

    Two groups can hold the same prompt with different answers. It then stays where it counts most: in the test rows,
    which no row added later may change, else in the validation rows.
    """
    prompts, own = np.array(keys.prompts), np.array(keys.sides)
    kept = np.sort(np.unique(np.array(keys.ids), return_index=True)[1])  # the first row of each id
    duplicates = len(prompts) - len(kept)
    if prepare.rows is not None and prepare.rows < len(kept):
        shares = np.array([_share(f"{prepare.seed}:{keys.ids[place]:016x}") for place in kept])
        kept = kept[np.argsort(shares, kind="stable")[: prepare.rows]]
    sides = np.full(len(prompts), LEFT_OUT, np.int8)
    sides[kept] = own[kept]
    asked = prompts[:0]
    for number in reversed(range(len(SIDES))):
        sides[(sides == number) & np.isin(prompts, asked)] = LEFT_OUT
        asked = np.concatenate([asked, prompts[sides == number]])
    return Split(sides, duplicates, len(kept) - int(np.sum(sides != LEFT_OUT)))


def leaks(keys: Keys, sides: np.ndarray) -> int:
    """Rows outside the training rows whose group, or whose very prompt, stands among the training rows."""
    train = sides == SIDES.index("train")
    others = ~train & (sides != LEFT_OUT)
    found = [np.isin(np.array(of)[others], np.array(of)[train]) for of in (keys.groups, keys.prompts)]
    return int(np.sum(found[0] | found[1]))


def gather(conversations: Iterable[Conversation | Refusal], prepare: Prepare, kept: Path, refused: Path) -> Keys:
    """Write the conversations into one file as they come, and why the others are unusable into another."""
    keys = Keys()
    with kept.open("w", encoding="utf-8") as lines, refused.open("w", encoding="utf-8") as refusals:
        for conversation in conversations:
            if isinstance(conversation, Refusal):
                refusals.write(f"{conversation}\n")
                continue
            keys.add(conversation, prepare)
            lines.write(json.dumps(conversation.model_dump(), ensure_ascii=False, allow_nan=False) + "\n")
    return keys


def deal(gathered: Path, sides: np.ndarray, folder: Path) -> None:
    """Write each line into the file of its side."""
    with gathered.open("rb") as lines, ExitStack() as files:
        hands = [files.enter_context((folder / f"{name}.jsonl").open("wb")) for name in SIDES]
        for line, number in zip(lines, sides, strict=True):
            if number != LEFT_OUT:
                hands[number].write(line)


def references(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["messages"][-1]["content"]


def main(arguments: list[str]) -> None:
    raw, out, metrics = (Path(argument) for argument in arguments)
    params = load()
    task = importlib.import_module(f"stages.tasks.{params.task.name}")
    files = {name: rows.read(raw / file) for name, file in params.task.files().items()}
    sources = [raw / file for file in params.task.files().values()]
    refuse_without_room(out, sum(path.stat().st_size for path in sources if path.is_file()))
    with new_folder(out) as folder:
        gathered, refused = folder / "gathered.jsonl", folder / "unusable.txt"
        keys = gather(task.conversations(files, params.task), params.prepare, gathered, refused)
        found = split(keys, params.prepare)
        sides = found.sides
        deal(gathered, sides, folder)
        if hasattr(task, "unscorable"):
            refusals = {
                int(row.id, 16): why for row, why in task.unscorable(Stored(folder / "test.jsonl"), params.task)
            }
            if refusals:
                with refused.open("a", encoding="utf-8") as file:
                    file.writelines(f"{why}\n" for why in refusals.values())
                sides[np.isin(np.array(keys.ids), np.array(list(refusals), np.uint64))] = LEFT_OUT
                deal(gathered, sides, folder)
        gathered.unlink()
        with refused.open(encoding="utf-8") as file:
            first = file.readline().rstrip("\n")
            unusable = bool(first) + sum(1 for _ in file)
        if not unusable:
            refused.unlink()
        counts = {name: int(np.sum(sides == number)) for number, name in enumerate(SIDES)}
        for name in SIDES:
            if not counts[name]:
                wrong = f"; {unusable} are unusable, the first: {first}" if unusable else ""
                total = sum(counts.values())
                raise Refusal(f"no {name} rows out of {total}; add rows, or change the shares in prepare{wrong}")
        leaked = leaks(keys, sides)
        if leaked:
            raise Refusal(
                f"{leaked} validation or test rows ask what a training row asks: a fault of this stage; report it"
            )
        # empty where no score reads it: an edited training row then reruns no evaluation of the base model
        learned = references(folder / "train.jsonl") if getattr(task, "TRAINING", False) else ()
        write_jsonl(folder / "learned.jsonl", learned)
    sizes = {f"{name}_rows": count for name, count in counts.items()}
    of = np.array(keys.groups)
    groups = {f"{name}_groups": len(np.unique(of[sides == number])) for number, name in enumerate(SIDES)}
    left_out = {"unusable": unusable, "duplicates": found.duplicates, "asked_twice": found.asked_twice}
    write_json(metrics, {**sizes, **groups, **left_out, "leaks": leaked})
    print(", ".join(f"{count} {name}" for name, count in {**sizes, **left_out}.items()), file=sys.stderr)


if __name__ == "__main__":
    run(main)

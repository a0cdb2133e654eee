"""The validation rows in; out what training needs to score its own answers to them: nothing with train.metric: loss.

    python -m stages.validation data/conversations data/validation CODE …

CODE are the files and folders that decide a score beside the task's own: with train.metric: score a change there trains
anew, with loss it does not.
"""

import hashlib
import heapq
import shutil
import sys
from pathlib import Path

from stages import conversation
from stages.outputs import new_folder, refuse_without_room, write_json, write_jsonl
from stages.params import load
from stages.refusal import Refusal, run


def main(arguments: list[str]) -> None:
    conversations, out, *code = (Path(argument) for argument in arguments)
    params = load()
    with new_folder(out) as folder:
        if params.train.metric == "loss":
            write_json(folder / "scoring.json", {})
            return
        validation, learned = conversations / "validation.jsonl", conversations / "learned.jsonl"
        refuse_without_room(out, validation.stat().st_size + learned.stat().st_size)
        # ids are hashes, so that the first of them are an even sample
        rows = heapq.nsmallest(params.train.metric_rows, conversation.read(validation), key=lambda row: row.id)
        if not rows:
            raise Refusal("params.yaml: train.metric is score, but no row validates; raise prepare.validation")
        write_jsonl(folder / "rows.jsonl", (row.model_dump() for row in rows))
        shutil.copyfile(learned, folder / "learned.jsonl")
        code.append(Path(f"stages/tasks/{params.task.name}.py"))
        files = sorted(file for path in code for file in ([path] if path.is_file() else path.rglob("*.py")))
        write_json(
            folder / "scoring.json",
            {
                "task": params.task.model_dump(),
                "max_new_tokens": params.evaluate.max_new_tokens,
                "code": {file.as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
            },
        )
    print(f"{len(rows)} validation rows to answer while training", file=sys.stderr)


if __name__ == "__main__":
    run(main)

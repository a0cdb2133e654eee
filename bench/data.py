"""How long preparing and encoding take, and how much memory, by the number of rows: made-up rows of three forms.

    python -m bench.data FOLDER models/base TASK ROWS …      appends to bench/results/data.json

TASK is instructions, chat or text_to_sql; the last has rows as gretelai/synthetic_text_to_sql has them, each with
tables of its own and what they hold. Texts are cut from the topics of Python's own help. FOLDER takes the files: about
4 GB for a million rows.
"""

import json
import os
import pydoc_data.topics
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ruamel.yaml

from bench.cpu_formats import cpu
from stages.outputs import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/data.json"
WORDS = " ".join(pydoc_data.topics.topics.values()).split()
TASKS = {
    "instructions": {"name": "instructions", "rows": "rows.jsonl", "headings": "english"},
    "chat": {"name": "chat", "rows": "rows.jsonl"},
    "text_to_sql": {
        "name": "text_to_sql",
        "rows": "rows.jsonl",
        "schemas": None,
        "columns": {"question": "sql_prompt", "query": "sql", "schema": "sql_context"},
        "schema_as": "ddl",
        "instances": 4,
        "seed": 0,
        "unusable": "drop",
    },
}
GROUPS = {"instructions": "instruction", "chat": "opening", "text_to_sql": "query"}
THINGS = ("ship", "crop", "well", "clinic", "donor", "artist", "player", "loan", "sensor", "plot", "trip", "song")
TRAITS = {
    "name": "VARCHAR(50)", "region": "TEXT", "price": "DECIMAL(10, 2)", "year": "INT", "amount": "FLOAT",
    "opened": "DATE", "category": "VARCHAR(30)", "rating": "INT", "active": "BOOLEAN", "country": "TEXT",
}  # fmt: skip


def text(rng: random.Random, median: int) -> str:
    """Words in a row out of the help topics; their number is lognormal."""
    count = max(3, int(rng.lognormvariate(0, 0.6) * median))
    start = rng.randrange(len(WORDS) - count)
    return " ".join(WORDS[start : start + count])


def instructions(rng: random.Random) -> dict[str, Any]:
    given = text(rng, 30) if rng.random() < 0.4 else ""
    return {"instruction": text(rng, 14), "input": given, "output": text(rng, 60)}


def chat(rng: random.Random) -> dict[str, Any]:
    turns = [{"role": "system", "content": text(rng, 12)}] if rng.random() < 0.3 else []
    for _ in range(rng.choice((1, 1, 2, 3))):
        turns += [{"role": "user", "content": text(rng, 20)}, {"role": "assistant", "content": text(rng, 60)}]
    return {"messages": turns}


def value(rng: random.Random, kind: str) -> str:
    if kind == "DATE":
        return f"'20{rng.randrange(10, 24)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}'"
    if kind == "BOOLEAN":
        return rng.choice(("TRUE", "FALSE"))
    if kind == "INT":
        return str(rng.randrange(3000))
    if kind in ("FLOAT", "DECIMAL(10, 2)"):
        return f"{rng.random() * 1000:.2f}"
    return "'" + rng.choice(WORDS).replace("'", "''") + "'"


def text_to_sql(rng: random.Random) -> dict[str, Any]:
    """One table or two, three to five rows in each, and a query that filters, groups, joins or nests."""
    thing, other = rng.sample(THINGS, 2)
    table, second = f"{thing}s_{rng.choice(WORDS[:400]).strip('_').lower()}", f"{other}s"
    table = "".join(c for c in table if c.isalnum() or c == "_")
    traits = rng.sample(sorted(TRAITS), 4)
    columns = {f"{thing}_id": "INT PRIMARY KEY", **{trait: TRAITS[trait] for trait in traits}}
    statements = [f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())});"]
    held = [[str(n + 1), *(value(rng, TRAITS[trait]) for trait in traits)] for n in range(rng.randrange(2, 6))]
    cells = ", ".join(f"({', '.join(row)})" for row in held)
    statements.append(f"INSERT INTO {table} ({', '.join(columns)}) VALUES {cells};")
    first, filtered, shown = traits[:3]
    condition = f"{table}.{filtered} = {value(rng, TRAITS[filtered])}"
    form = rng.randrange(4)
    query = f"SELECT {shown} FROM {table} WHERE {condition} ORDER BY {first} DESC LIMIT {rng.randrange(1, 9)};"
    if form == 1:
        query = f"SELECT {shown}, COUNT(*) AS n, AVG({thing}_id) FROM {table} WHERE {condition} GROUP BY {shown};"
    elif form == 2:
        statements.append(
            f"CREATE TABLE {second} ({other}_id INT PRIMARY KEY, {thing}_id INT, cost FLOAT, "
            f"FOREIGN KEY ({thing}_id) REFERENCES {table}({thing}_id));"
        )
        cells = ", ".join(f"({n}, {rng.randrange(1, 5)}, {rng.random() * 99:.1f})" for n in range(1, 5))
        statements.append(f"INSERT INTO {second} ({other}_id, {thing}_id, cost) VALUES {cells};")
        query = (
            f"SELECT t1.{shown}, SUM(t2.cost) FROM {table} t1 JOIN {second} t2 ON t1.{thing}_id = t2.{thing}_id "
            f"WHERE t1.{filtered} != {value(rng, TRAITS[filtered])} GROUP BY t1.{shown};"
        )
    elif form == 3:
        query = (
            f"SELECT COUNT(DISTINCT {shown}) FROM {table} WHERE {condition} AND {thing}_id > "
            f"(SELECT AVG({thing}_id) FROM {table});"
        )
    return {
        "id": rng.randrange(10**6),
        "domain": other,
        "sql_prompt": f"{text(rng, 14)}?",
        "sql_context": " ".join(statements),
        "sql": query,
        "sql_explanation": text(rng, 30),
    }


FORMS = {"instructions": instructions, "chat": chat, "text_to_sql": text_to_sql}


def write_rows(path: Path, task: str, rows: int) -> None:
    rng = random.Random(task)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(FORMS[task](rng), ensure_ascii=False) + "\n" for _ in range(rows))


def write_params(path: Path, task: str) -> None:
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["task"] = TASKS[task]
    params["prepare"] |= {"group_by": GROUPS[task], "validation": 0.01, "test": 0.02}
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds by the clock and of all cores, and the largest sum of the resident memory of the process and those it
    started."""
    load = os.getloadavg()[0]  # more than a few tenths: others were at work, and core_seconds say more than seconds
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = psutil.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(0.05)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    core_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    figures = {"seconds": seconds, "core_seconds": core_seconds, "peak_gib": peak / 2**30, "load_before": load}
    return {name: round(figure, 2) for name, figure in figures.items()}


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def runs(folder: Path, base: Path, task: str, rows: int) -> Iterator[dict[str, Any]]:
    """Run both stages on new rows; yields a row of results for each."""
    (folder / "data/raw").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "data/raw/rows.jsonl", task, rows)
    write_params(folder / "params.yaml", task)
    prepare = ["stages.prepare", "data/raw", "data/conversations", "metrics/data.json"]
    encode = ["stages.encode", str(base.resolve()), "data/conversations", "data/tokens", "metrics/tokens.json"]
    for command in (prepare, encode):
        found = measured([sys.executable, "-m", *command], folder)
        yield {"stage": command[0].removeprefix("stages."), "task": task, "rows": rows, **found}


def main(folder: Path, base: Path, task: str, *sizes: str) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    machine = f"{cpu()}, {os.cpu_count()} cores"
    for rows in map(int, sizes):
        for found in runs(folder, base, task, rows):
            print(found, flush=True)
            results.append({**found, "machine": machine})
            write_json(RESULTS, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

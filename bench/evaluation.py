"""Whether execution accuracy can be fooled or its sandbox escaped, on all of Spider's development questions.

    python -m bench.evaluation data/raw        writes bench/results/evaluation.json; about ten minutes on two cores

mutation_score: of the mutants of the gold queries that some of many more instances tell from their gold query, the
share that the eight instances of the default tell from it. A mutant that none of them tells apart counts as equivalent.
"""

import json
import random
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.mutants import mutants
from stages.outputs import write_json
from stages.sql.comparison import is_ordered, verdict
from stages.sql.execution import Rows, Sandbox
from stages.sql.instances import Instance, fill
from stages.sql.schema import Schema, from_spider
from tests.hostile import HOSTILE, PLACE

RESULTS = Path("bench/results/evaluation.json")
INSTANCES = 8  # task.instances of params.yaml
REFERENCE = 64  # instances more, of other seeds, that say which mutants are equivalent
HONEST_SECONDS = 20.0
HOSTILE_SECONDS = 0.5


def told_apart(sandbox: Sandbox, instances: list[Instance], gold: str, mutant: str) -> bool:
    """Whether some instance shows another result for the mutant, taken singly up to the first that does."""
    for instance in instances:
        mine = sandbox.run(instance, gold)
        if not isinstance(mine, Rows) or mine.truncated:
            continue
        if not verdict([mine], [sandbox.run(instance, mutant)], is_ordered(gold)).right:
            return True
    return False


def judge(schema: Schema, queries: list[str]) -> dict[str, Counter]:
    """For each kind of mutant of a database's queries: how many there are, told apart by the suite, by more only."""
    suite = fill(schema, queries, 0, INSTANCES)
    more = [instance for seed in range(1, 1 + REFERENCE // 8) for instance in fill(schema, queries, seed, 8)]
    found: dict[str, Counter] = defaultdict(Counter)
    with Sandbox(2.0) as sandbox:
        for query in sorted(set(queries)):
            gold = sandbox.run_all(suite, query)
            found["gold"]["made"] += 1
            found["gold"]["equal"] += verdict(gold, sandbox.run_all(suite, query), is_ordered(query)).right
            for kind, mutant in mutants(query):
                found[kind]["made"] += 1
                if told_apart(sandbox, suite, query, mutant):
                    found[kind]["suite"] += 1
                elif told_apart(sandbox, more, query, mutant):
                    found[kind]["more"] += 1
    return found


def power(asked: dict[str, tuple[Schema, list[str]]]) -> dict:
    """The suite's power, all databases together."""
    total: dict[str, Counter] = defaultdict(Counter)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda one: judge(*one), asked.values()):
            for kind, counts in found.items():
                total[kind] += counts
    gold = total.pop("gold")
    suite, more = (sum(counts[name] for counts in total.values()) for name in ("suite", "more"))
    by_kind = {
        kind: {**counts, "score": round(counts["suite"] / max(1, counts["suite"] + counts["more"]), 4)}
        for kind, counts in sorted(total.items())
    }
    return {
        "mutation_score": round(suite / (suite + more), 4),
        "mutants": sum(counts["made"] for counts in total.values()),
        "equivalent": sum(counts["made"] for counts in total.values()) - suite - more,
        "by_kind": by_kind,
        "gold_queries": gold["made"],
        "gold_equal_to_themselves": gold["equal"],
    }


def hostile() -> dict:
    """Every hostile statement of the tests: what got rows, changed a byte, left a file or outlived its deadline."""
    rows = [[number, f"n{number}", number] for number in range(20)]
    instance = Instance(["CREATE TABLE singer (id NUMERIC, name TEXT, age NUMERIC)"], {"singer": rows})
    escapes, slowest = [], 0.0
    with Sandbox(HOSTILE_SECONDS) as sandbox:
        everything = sandbox.run(instance, "SELECT * FROM singer")
        for statement in HOSTILE:
            began = time.monotonic()
            outcome = sandbox.run(instance, statement)
            over = time.monotonic() - began - HOSTILE_SECONDS
            slowest = max(slowest, over)
            left = list(Path(PLACE).parent.glob(Path(PLACE).name + "*"))
            changed = sandbox.run(instance, "SELECT * FROM singer") != everything
            if isinstance(outcome, Rows) or left or changed or over > 0.5:
                escapes.append(ascii(statement)[:80])
    return {
        "hostile_statements": len(HOSTILE),
        "escapes": len(escapes),
        "escaped": escapes,
        "seconds_past_the_deadline": round(max(0.0, slowest), 3),
    }


def speed(asked: dict[str, tuple[Schema, list[str]]]) -> float:
    """Gold queries a second, in two sandboxes side by side, each instance opened before."""
    work = [
        (instance, query) for schema, queries in asked.values() for instance in fill(schema, queries, 0, 2)
        for query in queries
    ]  # fmt: skip
    random.Random(0).shuffle(work)

    def run(share: list[tuple[Instance, str]]) -> float:
        with Sandbox(2.0) as sandbox:
            for instance in {instance.id: instance for instance, _ in share}.values():
                sandbox.run(instance, "SELECT 1")
            began, count = time.monotonic(), 0
            while time.monotonic() - began < HONEST_SECONDS:
                sandbox.run(*share[count % len(share)])
                count += 1
            return count / (time.monotonic() - began)

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(run, (work[::2], work[1::2])))


def main(arguments: list[str]) -> None:
    raw = Path(arguments[0])
    schemas = {schema.name: schema for schema in map(from_spider, json.loads((raw / "tables.json").read_text()))}
    asked: dict[str, tuple[Schema, list[str]]] = {}
    for row in json.loads((raw / "dev.json").read_text()):
        asked.setdefault(row["db_id"], (schemas[row["db_id"]], []))[1].append(row["query"])
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {**hostile(), "queries_per_second": round(speed(asked)), **power(asked)}
    write_json(RESULTS, {**known, **found})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

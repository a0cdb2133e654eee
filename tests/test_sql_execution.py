"""Queries that a model wrote: honest ones get their answer, hostile ones get none and leave nothing behind."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.sql import execution, worker
from stages.sql.execution import Failure, Rows, Sandbox, Timeout, WorkerError
from stages.sql.instances import Instance
from tests.hostile import HOSTILE, PLACE

SECONDS = 0.4
HONEST = "SELECT COUNT(*), SUM(age), MIN(name) FROM singer"
ANSWER = Rows([(20, 190, "n0")])


@pytest.fixture(scope="module")
def instance() -> Instance:
    rows = [[number, f"n{number}", number] for number in range(20)]
    return Instance(["CREATE TABLE singer (id NUMERIC, name TEXT, age NUMERIC)"], {"singer": rows})


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(seconds=SECONDS) as one:
        yield one


@pytest.mark.parametrize("statement", HOSTILE, ids=lambda statement: ascii(statement)[1:40])
def test_a_hostile_statement_gets_nothing_and_the_next_honest_query_its_answer(
    sandbox: Sandbox, instance: Instance, statement: str
):
    assert sandbox.run(instance, HONEST) == ANSWER
    start = time.monotonic()
    outcome = sandbox.run(instance, statement)
    assert time.monotonic() - start < SECONDS + 0.5
    assert isinstance(outcome, (Failure, Timeout)), outcome
    assert not isinstance(outcome, Failure) or 0 < len(outcome.message) <= 200
    assert list(Path("/tmp").glob(Path(PLACE).name + "*")) == []
    assert sandbox.run(instance, HONEST) == ANSWER


@pytest.mark.parametrize(
    "statement",
    [
        "WITH x AS (SELECT 1) DELETE FROM singer",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 9) SELECT x FROM c",
        "SELECT printf('x')",
        "SELECT COUNT(*) FROM sqlite_master",
    ],
)
def test_the_authorizer_denies_before_any_other_layer(sandbox: Sandbox, instance: Instance, statement: str):
    outcome = sandbox.run(instance, statement)
    assert isinstance(outcome, Failure) and re.search("not authorized|prohibited", outcome.message)


# Allowed, and harmless for the caps.
HUGE = [
    "SELECT a.id FROM singer AS a, singer AS b, singer AS c, singer AS d",
    "SELECT group_concat(a.name || b.name || c.name || d.name) FROM singer a, singer b, singer c, singer d",
    "SELECT hex(group_concat(a.name || b.name || c.name)) FROM singer a, singer b, singer c, singer d",
    "SELECT " + "replace(" * 12 + "'aaaaaaaa'" + ", 'a', 'aaaaaaaa')" * 12,
]


@pytest.mark.parametrize("statement", HUGE, ids=lambda statement: statement[:30])
def test_a_huge_result_is_cut_or_refused_in_time(sandbox: Sandbox, instance: Instance, statement: str):
    start = time.monotonic()
    outcome = sandbox.run(instance, statement)
    assert time.monotonic() - start < SECONDS + 0.5
    assert not isinstance(outcome, Rows) or outcome.truncated
    assert sandbox.run(instance, HONEST) == ANSWER


@pytest.mark.parametrize(
    "query",
    [
        "SELECT name FROM singer WHERE name LIKE 'n1_' ORDER BY age DESC LIMIT 1",
        "SELECT name FROM singer WHERE age = (SELECT MAX(age) FROM singer)",
        "WITH old AS (SELECT * FROM singer WHERE age > 18) SELECT name FROM old",
        "SELECT T1.name FROM singer AS T1 JOIN singer AS T2 ON T1.id = T2.id WHERE T2.age IN (19)",
        "SELECT name FROM singer EXCEPT SELECT name FROM singer WHERE age != 19",
        "SELECT name FROM (SELECT name, RANK() OVER (ORDER BY age DESC) AS place FROM singer) WHERE place = 1",
        "SELECT CASE WHEN CAST(COUNT(*) AS REAL) / 2 = 10 THEN 'n' || 19 END FROM singer",
        "SELECT substr(lower('XN19'), 2) FROM singer GROUP BY 1 HAVING count(*) > 1",
        "SELECT 'n' || 19 FROM (SELECT 1) WHERE strftime('%Y', '2014-03-01') = '2014' AND round(2.4) = 2",
    ],
)
def test_an_honest_query_is_answered(sandbox: Sandbox, instance: Instance, query: str):
    assert sandbox.run(instance, query) == Rows([("n19",)])


def test_every_kind_of_value_comes_back_as_it_is(sandbox: Sandbox, instance: Instance):
    shown = sandbox.run(instance, "SELECT NULL, 9007199254740993, 0.1, 'é\n', x'00ff', 9e999")
    assert shown == Rows([(None, 9007199254740993, 0.1, "é\n", b"\x00\xff", float("inf"))])


def test_counting_a_with_or_a_subquery_is_allowed(sandbox: Sandbox, instance: Instance):
    counted = Rows([(20,)])
    assert sandbox.run(instance, "WITH c AS (SELECT name FROM singer) SELECT COUNT(*) FROM c") == counted
    assert sandbox.run(instance, "SELECT COUNT(*) FROM (SELECT DISTINCT name FROM singer)") == counted


def test_a_result_over_the_caps_is_marked(sandbox: Sandbox, instance: Instance):
    shown = sandbox.run(instance, "SELECT a.id FROM singer AS a, singer AS b, singer AS c, singer AS d")
    assert isinstance(shown, Rows) and shown.truncated and len(shown.rows) == worker.MAX_ROWS


def test_run_all_stops_at_the_first_instance_that_fails(sandbox: Sandbox, instance: Instance):
    other = Instance(["CREATE TABLE band (id NUMERIC)"], {"band": [[1]]})
    assert sandbox.run_all([instance, instance], HONEST) == [ANSWER, ANSWER]
    outcomes = sandbox.run_all([instance, other, instance], HONEST)
    assert outcomes[0] == ANSWER and isinstance(outcomes[1], Failure) and len(outcomes) == 2


def test_the_oldest_instances_make_room_and_come_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "MOST_OPEN", 2)
    instances = [Instance(["CREATE TABLE t (a)"], {"t": [[number]]}) for number in range(5)]
    with Sandbox() as sandbox:
        for _ in range(2):
            shown = [sandbox.run(one, "SELECT a FROM t") for one in instances]
            assert shown == [Rows([(number,)]) for number in range(5)]


def test_a_worker_that_ignores_its_deadline_is_killed(instance: Instance, tmp_path: Path, monkeypatch):
    """The progress handler taken out, as printf escapes it: only the parent is left."""
    text = (
        Path(worker.__file__)
        .read_text(encoding="utf-8")
        .replace("database.set_progress_handler", "str and (lambda *_: 0)")
    )
    (tmp_path / "worker.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
    bomb = "SELECT COUNT(*) FROM " + ", ".join(f"singer AS s{number}" for number in range(12))
    with Sandbox(seconds=SECONDS) as sandbox:
        assert sandbox.run(instance, HONEST) == ANSWER
        start = time.monotonic()
        assert sandbox.run(instance, bomb) == Timeout(SECONDS)
        assert time.monotonic() - start < SECONDS + 0.5
        assert sandbox.run(instance, HONEST) == ANSWER


def test_a_query_that_kills_the_worker_is_a_failure_of_the_query(instance: Instance, tmp_path: Path, monkeypatch):
    text = Path(worker.__file__).read_text(encoding="utf-8")
    text = text.replace("cursor = database", "'crash' in sql and os.kill(os.getpid(), 11)\n        cursor = database")
    (tmp_path / "worker.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
    with Sandbox(seconds=SECONDS) as sandbox:
        assert sandbox.run(instance, "SELECT 'crash'") == Failure("the worker was ended by SIGSEGV")
        assert sandbox.run(instance, HONEST) == ANSWER


def test_a_bug_in_the_worker_is_raised_and_never_an_outcome(instance: Instance, tmp_path: Path, monkeypatch):
    text = Path(worker.__file__).read_text(encoding="utf-8").replace("size += sum(", "size += nonsense(")
    (tmp_path / "worker.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(worker, "__file__", str(tmp_path / "worker.py"))
    with Sandbox(seconds=SECONDS) as sandbox, pytest.raises(WorkerError, match="nonsense"):
        sandbox.run(instance, HONEST)


def test_an_instance_that_cannot_be_built_is_raised_and_never_an_outcome():
    broken = Instance(["CREATE TABLE t (a)"], {"u": [[1]]})
    with Sandbox() as sandbox:
        with pytest.raises(WorkerError, match="no such table"):
            sandbox.run(broken, "SELECT 1")
        assert sandbox.run(Instance(["CREATE TABLE t (a)"], {}), "SELECT 1") == Rows([(1,)])


def test_a_worker_that_died_in_between_is_replaced(instance: Instance):
    with Sandbox() as sandbox:
        assert sandbox.run(instance, HONEST) == ANSWER
        sandbox._process.kill()
        sandbox._process.wait()
        assert sandbox.run(instance, HONEST) == ANSWER


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_worker_has_no_environment_no_files_and_no_repository(instance: Instance):
    with Sandbox() as sandbox:
        sandbox.run(instance, HONEST)
        process = Path(f"/proc/{sandbox._process.pid}")
        assert (process / "environ").read_bytes() == b""
        assert str((process / "cwd").readlink()) == "/"
        assert sorted(path.name for path in (process / "fd").iterdir()) == ["0", "1", "2"]
        limits = (process / "limits").read_text()
        assert "Max open files            3 " in limits
        assert "Max file size             0 " in limits
        assert "Max core file size        0 " in limits


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_the_worker_dies_with_its_parent():
    program = (
        "import os, signal\n"
        "from stages.sql.execution import Sandbox\n"
        "from stages.sql.instances import Instance\n"
        "sandbox = Sandbox()\n"
        "sandbox.run(Instance(['CREATE TABLE t (a)'], {}), 'SELECT 1')\n"
        "print(sandbox._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    child = int(done.stdout)
    deadline = time.monotonic() + 2
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(child)


def _alive(process: int) -> bool:
    """A zombie that nobody has waited for is dead."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False

"""The child process that runs queries: started by execution.py as a script of the standard library alone.

Reads one JSON request a line from stdin, writes one JSON reply a line to stdout. Requests: {"open": id, "ddl": […],
"rows": {table: […]}}, {"close": id}, {"run": id, "sql": text, "seconds": number}. Whatever goes wrong in here that is
not the query's doing ends the process with a traceback, which the parent raises.
"""

import ctypes
import json
import os
import re
import resource
import signal
import sqlite3
import sys
import time

MEMORY_BYTES = 1 << 30
MAX_ROWS = 10_000
MAX_CELL = 10_000
MAX_CHARACTERS = 4_000_000

# sqlite3.h; Python names only some of them, and its setlimit only from 3.11.
_OK, _DENY = 0, 1
_INSERT, _READ, _SELECT, _FUNCTION = 18, 20, 21, 31
_LIMITS = {
    0: 1_000_000,  # SQLITE_LIMIT_LENGTH, bytes of a text or a row
    1: 20_000,  # SQL_LENGTH
    2: 500,  # COLUMN
    3: 200,  # EXPR_DEPTH
    4: 50,  # COMPOUND_SELECT
    5: 100_000,  # VDBE_OP
    6: 50,  # FUNCTION_ARG
    7: 0,  # ATTACHED
    8: 1_000,  # LIKE_PATTERN_LENGTH
    9: 0,  # VARIABLE_NUMBER
    10: 0,  # TRIGGER_DEPTH
    11: 0,  # WORKER_THREADS
}

# The authorizer lets EXPLAIN by.
_QUERY = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:SELECT|WITH|VALUES)\b", re.IGNORECASE | re.DOTALL)

# No printf, format, zeroblob (a gigabyte in one call, which no interrupt reaches), no random (another result each
# time), no load_extension, no JSON, no full-text search.
_HARMLESS = """
    abs avg cast ceil ceiling char coalesce count cume_dist date datetime dense_rank first_value floor glob
    group_concat hex ifnull iif instr julianday lag last_value lead length like lower ltrim max min nth_value ntile
    nullif percent_rank rank replace round row_number rtrim sign strftime string_agg substr substring sum time total
    trim typeof unicode unixepoch upper
"""
FUNCTIONS = frozenset(_HARMLESS.split())


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    limit_process()
    databases: dict[str, sqlite3.Connection] = {}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "open" in request:
            databases[request["open"]] = opened(request["ddl"], request["rows"])
            reply = {}
        elif "close" in request:
            databases.pop(request["close"]).close()
            reply = {}
        else:
            limit_cpu(request["seconds"])
            reply = answer(databases[request["run"]], request["sql"], request["seconds"])
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def die_with_parent(parent: int) -> None:
    """Linux: be killed when the thread that started us ends; elsewhere the CPU limit and stdin's end must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, sys/prctl.h
    if os.getppid() != parent:
        sys.exit("the parent was gone before the worker began")


def limit_process() -> None:
    """No file, no process, no core, and a GiB of address space beyond what Python has by now.

    macOS refuses RLIMIT_AS, so there the parent's deadline alone holds memory; root is not held by RLIMIT_NPROC.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_BASE_BYTES + MEMORY_BYTES,) * 2)
    except (ValueError, OSError):
        if sys.platform == "linux":
            raise


def limit_cpu(seconds: float) -> None:
    """The kernel's own deadline, for when the parent is stopped and cannot keep its."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 3
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def opened(ddl: list[str], rows: dict[str, list[list]]) -> sqlite3.Connection:
    """An in-memory database with our tables and rows, closed to everything but reading them."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute("PRAGMA temp_store = MEMORY")
    database.execute("BEGIN")
    for statement in ddl:
        database.execute(statement)
    for table, values in rows.items():
        if values:
            name = '"' + table.replace('"', '""') + '"'
            places = ", ".join("?" * len(values[0]))
            database.executemany(f"INSERT INTO {name} VALUES ({places})", values)
    database.execute("COMMIT")
    confine(database)
    # SQLite stores no more of a text that is not UTF-8 than its bytes
    database.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    return database


def confine(database: sqlite3.Connection, writable: bool = False) -> None:
    """Let the connection do nothing from now on but read the tables that it has, within SQLite's own limits; where
    `writable`, insert rows into them too."""
    tables = {name.lower() for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    modules = {name.lower() for (name,) in database.execute("PRAGMA module_list")}
    if not writable:
        database.execute("PRAGMA query_only = ON")
    if hasattr(database, "setlimit"):
        for limit, value in _LIMITS.items():
            database.setlimit(limit, value)
    database.set_authorizer(authorizer(tables, modules, writable))


def authorizer(tables: set[str], modules: set[str], writable: bool = False):
    """Allow SELECT, the tables' columns and FUNCTIONS; deny all else, recursion and virtual tables too, and INSERT but
    where `writable`."""

    def authorize(action: int, first: str | None, second: str | None, _database: str | None, _view: str | None) -> int:
        if action == _SELECT:
            return _OK
        if action == _INSERT:
            return _OK if writable and (first or "").lower() in tables else _DENY
        if action == _FUNCTION:
            return _OK if (second or "").lower() in FUNCTIONS else _DENY
        if action == _READ:
            name = (first or "").lower()
            if name in tables:
                return _OK
            # COUNT(*) over a WITH or a subquery reads no column of something that is no table
            private = name.startswith(("sqlite_", "pragma_")) or name in modules
            return _OK if not second and not private else _DENY
        return _DENY

    return authorize


def answer(database: sqlite3.Connection, sql: str, seconds: float) -> dict:
    """Run one query: its rows, or the error that it met, or that it took too long."""
    deadline = time.monotonic() + seconds
    database.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    if len(sql) > _LIMITS[1]:
        return {"error": "the query is too long"}
    if not _QUERY.match(sql):
        return {"error": "not a query: it begins with none of SELECT, WITH, VALUES"}
    # What a text can raise in sqlite3: a NUL or a lone surrogate is a ValueError, and Python 3.10 and 3.11 have a
    # sqlite3.Warning for two statements. Nothing but the query runs in here.
    try:
        cursor = database.execute(sql)
        return fetched(cursor)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        if time.monotonic() > deadline:
            return {"timeout": True}
        return {"error": str(error)[:200]}
    except MemoryError:
        return {"error": "out of memory"}


def fetched(cursor: sqlite3.Cursor) -> dict:
    if cursor.description is None:
        return {"error": "not a query: it shows no column"}  # WITH … INSERT, were it let by
    rows, size, truncated = [], 0, False
    for row in cursor:
        size += sum(len(value) for value in row if isinstance(value, (str, bytes)))
        if len(rows) == MAX_ROWS or size > MAX_CHARACTERS:
            truncated = True
            break
        truncated = truncated or any(isinstance(value, (str, bytes)) and len(value) > MAX_CELL for value in row)
        rows.append([shown(value) for value in row])
    cursor.close()
    return {"rows": rows, "truncated": truncated}


def shown(value):
    """A value as JSON has it: bytes as {"hex": …}, and what is over the cell's cap cut."""
    if isinstance(value, bytes):
        return {"hex": value[:MAX_CELL].hex()}
    return value[:MAX_CELL] if isinstance(value, str) else value


def _base_bytes() -> int:
    """Address space that this process has by now; 0 where /proc does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


_BASE_BYTES = _base_bytes() if __name__ == "__main__" else 0

if __name__ == "__main__":
    main()

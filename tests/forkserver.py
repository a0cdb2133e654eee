"""A `python` that starts in milliseconds, so that tests can run the real pipeline through the real DVC many times.

`python forkserver.py serve SOCKET` imports the heavy libraries once; `install(folder, socket)` puts a `python` into
`folder` that has it fork and run `-m stages.…` in the caller's folder, with the caller's environment and output.
Nothing of `stages` is imported before the fork: each call runs the code as it stands.
"""

import array
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import types
from pathlib import Path

CLIENT = """#!{python} -SE
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
call = json.dumps(dict(arguments=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))).encode()
files = array.array("i", [1, 2])
server.sendmsg([len(call).to_bytes(8, "big") + call], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
sys.exit(int(server.recv(16) or 70))
"""


def install(folder: Path, socket_path: Path) -> None:
    """Write the stand-in `python` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, socket=str(socket_path)))
    client.chmod(0o755)


def serve(socket_path: str) -> None:
    """Answer calls one at a time until the parent's end of stdin closes."""
    import datasets
    import jinja2
    import matplotlib.pyplot
    import peft
    import sqlglot
    import transformers
    import trl

    transformers.Gemma3ForCausalLM, transformers.AutoTokenizer, transformers.GenerationConfig  # noqa: B018 - lazy
    trl.SFTTrainer, peft.LoraConfig, datasets.Dataset, sqlglot.parse_one, jinja2, matplotlib.pyplot  # noqa: B018 - lazy
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(socket_path)
    listener.listen()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one call in this process, and a grandchild's exit status in the answer."""
    message, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(8))
    size = int.from_bytes(message[:8], "big")
    while len(message) < 8 + size:
        message += connection.recv(1 << 20)
    call = json.loads(message[8:])
    files = array.array("i", ancillary[0][2])
    child = os.fork()
    if child == 0:
        for target, file in enumerate(files, start=1):
            os.dup2(file, target)
        _run(call)
    _, status = os.waitpid(child, 0)
    connection.send(str(os.waitstatus_to_exitcode(status) & 255).encode())
    os._exit(0)


def _beset(trouble: str | None) -> None:
    """Have `trouble` befall a stage that has written an output and is about to put it into its place: a signal's name;
    memory, which runs out; room, of which there is none from the beginning on but what is kept for DVC."""
    if trouble is None:
        return
    from stages import outputs, refusal

    if trouble == "room":
        shutil.disk_usage = lambda path: types.SimpleNamespace(free=refusal.SPARE_BYTES)
        return

    def beset(opened):
        @contextlib.contextmanager
        def new(path: Path):
            with opened(path) as partial:
                yield partial
                if trouble == "memory":
                    bytearray(1 << 62)
                else:
                    os.kill(os.getpid(), signal.Signals[trouble])

        return new

    outputs.new_file, outputs.new_folder = beset(outputs.new_file), beset(outputs.new_folder)


def _run(call: dict) -> None:
    import runpy

    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    assert call["arguments"][0] == "-m"
    sys.argv = call["arguments"][1:]
    sys.path[0] = call["folder"]
    _beset(os.environ.get("TROUBLE"))
    status = 1  # python's own for a trace, which the hook prints
    sys.excepthook = lambda *error: (sys.__excepthook__(*error), sys.stderr.flush(), os._exit(status))
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[2])

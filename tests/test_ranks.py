"""Training on two CPU processes: the curve of one, the same bytes after a kill, one line whatever ends it."""

import random
import signal
import socket
import time

import pytest
import torch

from stages.models.packs import deal, pack
from stages.models.ranks import Machines, Ranks
from stages.refusal import Refusal
from tests.conftest import CHAT
from tests.test_refusal import alive
from tests.test_resume import Place, after, python  # noqa: F401 - a fixture
from tests.test_train import curve, write_tokens

# Runs the stage and does, in the process and at the step that its environment says, what that says. Its processes are
# forked, since the libraries are imported already.
DRIVER = """
import json, multiprocessing, os, signal, sys, torch
from pathlib import Path
from stages import refusal, train
from stages.models import ranks

def step(self, model, taken, *more, training_step=train.Trainer.training_step):
    written = Path(f"partial{self.ranks.number}")
    written.write_text(str(os.getpid()))
    written.replace(f"process{self.ranks.number}")  # a kill must not leave it empty
    with Path(f"packs{self.ranks.number}").open("a") as file:
        file.write(json.dumps([self.state.global_step, sum(map(len, taken.packs))]) + "\\n")
    what, number, at = os.environ.get("WHAT", "none:0:0").split(":")
    here = self.ranks.number == int(number) and self.state.global_step == int(at)
    if here and what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if here and what == "kill launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    if here and what == "refuse":
        raise refusal.Refusal("what is wrong, and what to do")
    if here and what == "fault":
        raise KeyError("a fault of the code")
    if here and what == "ctrl-c":
        for process in (os.getppid(), os.getpid(), int(Path("process0").read_text())):
            os.kill(process, signal.SIGINT)
    if here and what == "nan":
        taken.supervised = float("nan")
    return training_step(self, model, taken, *more)

train.Trainer.training_step = step
if "WHAT" in os.environ:
    sys.stdin = None  # a thread of the server read it when this was forked: closing it would wait forever
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda kind: get_context("fork")
if __name__ == "__main__":
    refusal.run(train.main)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, python, tiny_model):  # noqa: F811 - pytest hands it in
    def make(devices: int, **overrides) -> Place:
        folder = tmp_path_factory.mktemp("place") / "clone"
        there = Place(folder, python, tiny_model, **{"machine.devices": devices, **overrides})
        (folder / "driver.py").write_text(DRIVER)
        return there

    return make


def run(there: Place, what: str = "none:0:0", status: int = 0, **environment: str) -> str:
    process = there.start("driver", WHAT=what, **environment)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == status, said
    return said


def errors(said: str) -> list[str]:
    """The lines, without those that say how training goes."""
    return [line for line in said.splitlines() if line.strip() and not line.startswith("step ")]


def ended(there: Place) -> bool:
    """Whether both processes are gone, soon."""
    until = time.monotonic() + 10
    while any(alive(int((there.folder / f"process{number}").read_text())) for number in (0, 1)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def undisturbed(place):
    there = place(2)
    run(there)
    return there


@pytest.mark.parametrize("tokens_per_pack", [100, 10_000])
def test_two_processes_give_the_curve_of_one(place, tokens_per_pack):
    """Float32 on the tiny model: sums in another order, 1e-5 of the loss at worst, of the gradients' norm 1e-4."""
    settings = {"lora.dropout": 0.0, "machine.tokens_per_pack": tokens_per_pack}
    one, two = place(1, **settings), place(2, **settings)
    run(one)
    run(two)
    assert curve(two.folder) == pytest.approx(curve(one.folder), rel=1e-5)
    for column, bound in (("validation_loss", 1e-5), ("gradient_norm", 1e-4)):
        assert column_of(two, column) == pytest.approx(column_of(one, column), rel=bound)
    assert column_of(two, "learning_rate") == column_of(one, "learning_rate")


def test_two_processes_answer_the_validation_rows_together_and_score_as_one(place):
    settings = {**CHAT, "train.metric": "score", "evaluate.max_new_tokens": 6, "lora.dropout": 0.0}
    one, two = place(1, **settings), place(2, **settings)
    run(one)
    run(two)
    scores = column_of(one, "validation_score")
    assert column_of(two, "validation_score") == pytest.approx(scores, rel=1e-9) and scores[0] != 0


def column_of(there: Place, name: str) -> list[float]:
    header, *lines = (there.folder / "loss.csv").read_text().splitlines()
    place = header.split(",").index(name)
    return [float(value) for line in lines if (value := line.split(",")[place])]


def test_each_process_computes_about_half_of_each_steps_tokens(undisturbed):
    packs = [(undisturbed.folder / f"packs{number}").read_text().splitlines() for number in (0, 1)]
    (one, other) = ([eval(line)[1] for line in lines] for lines in packs)
    assert len(one) == len(other) == 12 and all(one) and all(other)
    assert 0.8 < sum(one) / sum(other) < 1.25


def test_the_stage_starts_its_processes_itself_and_they_give_the_same_bytes_again(place, undisturbed):
    """Without the driver: spawned, as on a GPU."""
    there = place(2)
    said = there.train()
    assert there.outputs() == undisturbed.outputs()
    assert said.count("step 12 of 12: loss") == 1
    assert not any(path.is_dir() for path in (there.folder / ".runs").iterdir())


def test_with_dropout_two_processes_drop_different_values(undisturbed, place):
    kept = place(2, **{"lora.dropout": 0.0})
    run(kept)
    assert curve(kept.folder) != curve(undisturbed.folder)


def test_a_training_on_two_killed_at_a_process_and_at_the_launcher_gives_the_same_bytes(place, undisturbed):
    there = place(2)
    said = run(there, "kill:1:3", status=2)
    (line,) = errors(said)
    assert line.startswith("error: the process that trains on cpu was ended by SIGKILL, perhaps since memory ran out")
    assert ended(there) and not (there.folder / "adapter").exists()
    assert after(run(there, "kill launcher:0:8", status=256 - signal.SIGKILL)) in (2, 3)
    assert ended(there)
    assert after(run(there)) in range(7, 12)  # the orphans may take a step or two more before they end
    assert there.outputs() == undisturbed.outputs()


def test_another_number_of_devices_begins_anew(place):
    there = place(2)
    run(there, "kill:0:6", status=2)
    there.set(**{"machine.devices": 1})
    assert after(run(there)) is None


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_process_refuses_comes_out_as_one_line_once(place, number):
    there = place(2)
    said = run(there, f"refuse:{number}:2", status=2)
    assert errors(said) == ["error: what is wrong, and what to do"]
    assert ended(there)


def test_a_fault_of_the_code_in_a_process_keeps_its_trace(place):
    said = run(place(2), "fault:1:2", status=1)
    assert said.count("KeyError: 'a fault of the code'") == 1


def test_a_number_that_is_not_finite_on_one_device_stops_all_in_one_line(place):
    there = place(2)
    said = run(there, "nan:1:2", status=2)
    (line,) = errors(said)
    assert line.startswith("error: step 3: the gradient is not finite, on rows row")
    assert ended(there) and not (there.folder / "adapter").exists()


def test_ctrl_c_ends_all_in_one_line(place):
    there = place(2)
    said = run(there, "ctrl-c:1:4", status=128 + signal.SIGINT)
    assert errors(said) == ["error: stopped by SIGINT"]
    assert ended(there) and not (there.folder / "adapter").exists()


def test_a_step_of_one_row_leaves_one_process_without_work_and_gives_the_same_curve(place):
    """22 rows, 7 a step: the fourth step of an epoch has one."""
    settings = {"train.batch_size": 7, "lora.dropout": 0.0}
    one, two = place(1, **settings), place(2, **settings)
    run(one)
    run(two)
    assert curve(two.folder) == pytest.approx(curve(one.folder), rel=1e-5)
    assert "[3, 0]" in (two.folder / "packs1").read_text()


def test_no_more_processes_than_rows_a_step(place):
    there = place(3, **{"train.batch_size": 1, "train.epochs": 0.1})
    run(there)
    assert [path.name for path in there.folder.glob("process?")] == ["process0"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_two_machines(one: Place, other: Place) -> list[tuple[int, str]]:
    """How the stage ended on each, and what it said."""
    met = {"WHAT": "none:0:0", "NNODES": "2", "GLOO_SOCKET_IFNAME": "lo"}
    started = [there.start("driver", NODE_RANK=str(n), **met) for n, there in enumerate((one, other))]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_two_machines_of_one_device_give_the_bytes_of_one_with_two(place, undisturbed):
    at = {"machine.rendezvous": f"127.0.0.1:{free_port()}"}
    one, other = place(1, **at), place(1, **at)
    (status, said), (other_status, other_said) = on_two_machines(one, other)
    assert (status, other_status) == (0, 0), said + other_said
    assert one.outputs() == undisturbed.outputs()
    assert not (other.folder / "adapter").exists() and not errors(other_said)


def test_a_machine_that_would_train_something_else_is_refused(place):
    at = {"machine.rendezvous": f"127.0.0.1:{free_port()}"}
    one, other = place(1, **at), place(1, **at)
    write_tokens(other.folder / "train.parquet", 22, 5)
    other.set(**{"machine.devices": 1, **at, "lora.r": 8})
    for status, said in on_two_machines(one, other):
        assert status == 2
        assert errors(said)[0].startswith(
            "error: machine 1 does not train what machine 0 trains: params, tokens differ"
        )


@pytest.mark.parametrize(
    "environment", [{}, {"NNODES": "2"}, {"NNODES": "2", "NODE_RANK": "2"}, {"NNODES": "two", "NODE_RANK": "0"}]
)
def test_a_rendezvous_without_a_number_of_machines_says_what_to_type(monkeypatch, environment):
    for name in ("NNODES", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match="NNODES=2 NODE_RANK=0 dvc repro"):
        Machines.found("10.0.0.1:29500")
    assert Machines.found(None) == Machines(1, 0, None)


def test_the_machines_that_write_nothing_are_not_run_by_dvc(monkeypatch):
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert Machines.found("10.0.0.1:29500") == Machines(2, 1, "10.0.0.1:29500")
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(Refusal, match=r"NODE_RANK=0 alone.*by itself"):
        Machines.found("10.0.0.1:29500")
    monkeypatch.setenv("NODE_RANK", "0")
    assert Machines.found("10.0.0.1:29500").number == 0


def test_rows_are_dealt_evenly_each_once_and_those_alike_together(tmp_path):
    rows = write_tokens(tmp_path / "rows.parquet", 48, 0)
    for shares in (1, 2, 3, 8):
        dealt = deal(rows, shares, 1000)
        assert sorted(row["id"] for share in dealt for row in share) == sorted(row["id"] for row in rows)
        tokens = [sum(map(len, pack(share, 1000))) for share in dealt]
        assert max(tokens) <= 1.34 * sum(tokens) / shares + 60  # Graham's bound, and a row's length
    alone = sum(map(len, pack(rows, 100_000)))
    assert sum(len(piece) for share in deal(rows, 2, 1000) for piece in pack(share, 1000)) < 1.2 * alone
    assert [len(share) for share in deal(rows[:1], 3, 1000)] == [1, 0, 0]


def test_a_step_has_the_same_packs_however_often_it_is_dealt():
    draw = random.Random(0)
    rows = [
        {"id": str(n), "input_ids": draw.choices(range(60), k=draw.randint(5, 90)), "labels": [1] * 90}
        for n in range(30)
    ]
    assert deal(rows, 4, 128) == deal(list(rows), 4, 128)


def test_alone_nothing_is_seeded_and_nothing_is_sent():
    alone, state = Ranks(), torch.get_rng_state()
    alone.seed_step(0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    loss, rows = torch.tensor(1.0), [{"id": "a"}]
    assert alone.add_up([], loss) is loss and alone.share(rows, 1) is rows
    assert (alone.of_first(3), alone.of_all(3)) == (3, [3])

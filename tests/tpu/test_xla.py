"""Training through torch-xla on two devices: the curve of the plain run, each device with a part of the base."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from stages import train
from stages.models.xla import Pod
from stages.refusal import Refusal
from tests import test_recipes, tiny_families
from tests.conftest import ROOT
from tests.test_recipes import server  # noqa: F401 - a fixture
from tests.test_train import curve, loss_of_what_was_saved, said, trained, validations, write_tokens  # noqa: F401 - a fixture

TPU = {"machine.device": "xla"}


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3_text", "gemma3", "llama3"])
def family(request, tmp_path_factory):
    """A model of the family as download leaves it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_families.write(request.param, folder)
    return folder


@pytest.fixture
def pods(monkeypatch):
    """Those that train while the test runs; `held`: each parameter's shape and how many of its numbers each device
    holds, at the last loss that was asked for; `program`: what computes that loss."""
    made = []

    class Seen(Pod):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def losses(self, packs):
            found = super().losses(packs)
            self.held, self.program = {}, self.xla._XLAC._get_xla_tensors_hlo([found])
            for name, parameter in self.model.named_parameters():
                held = [parameter.numel()] * self.count
                if "devices" in self.xla._XLAC._get_xla_sharding_spec(parameter.data):
                    held = [part.numel() for part, _ in self.xla._XLAC._get_local_shards([parameter.data])[0]]
                self.held[name] = parameter.shape, held
            return found

    monkeypatch.setattr(train, "Pod", Seen)
    return made


def column(folder, name: str) -> list[float]:
    with (folder / "loss.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def agree(one, other) -> None:
    """Float32, sums in another order: 1e-4 of the loss at worst, of the gradients' norm 1e-3."""
    assert curve(one) == pytest.approx(curve(other), rel=1e-4)
    assert validations(one) == pytest.approx(validations(other), rel=1e-4)
    assert column(one, "gradient_norm") == pytest.approx(column(other, "gradient_norm"), rel=1e-3)
    assert column(one, "learning_rate") == column(other, "learning_rate")


def test_two_devices_give_the_curve_of_the_plain_run(trained, family, pods):  # noqa: F811
    """Rows that share a beginning, windows, bounded scores; of 100 tokens a device has several packs a step, and not
    each as many."""
    settings = {"machine.tokens_per_pack": 100, "train.epochs": 3.0, "train.order": "shared"}
    plain, tpu = trained("plain", family, **settings), trained("tpu", family, **settings, **TPU)
    assert [pod.count for pod in pods] == [2]
    agree(tpu, plain)
    losses = curve(tpu)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert said(tpu)["trainable_parameters"] == said(plain)["trainable_parameters"]


def test_the_adapter_is_one_that_peft_opens_on_a_cpu(trained, tiny_model):  # noqa: F811
    folder = trained("tpu", **TPU)
    assert loss_of_what_was_saved(folder, tiny_model) == pytest.approx(said(folder)["validation_loss"], rel=1e-4)
    plain, tpu = (load_file(one / "adapter/adapter_model.safetensors") for one in (trained("plain"), folder))
    assert tpu.keys() == plain.keys()
    assert (folder / "adapter/adapter_config.json").read_bytes() == (
        folder.parent / "plain/adapter/adapter_config.json"
    ).read_bytes()


def test_each_device_holds_a_part_of_the_base_and_all_of_the_adapters(trained, pods):  # noqa: F811
    trained("tpu", **TPU)
    (pod,) = pods
    whole = {name for name in pod.held if "lora_" in name or "norm" in name}
    assert (len(whole), len(pod.held)) == (2 * 7 * 3 + 6 * 3 + 1, 2 * 7 * 3 + 6 * 3 + 1 + 7 * 3 + 1)
    for name, (shape, held) in pod.held.items():
        size, longest = math.prod(shape), max(shape)
        half = size // longest * math.ceil(longest / 2)
        assert held == ([size] if name in whole else [half]) * 2, name


def test_each_device_computes_rows_of_its_own(trained, pods):  # noqa: F811
    trained("tpu", **TPU)
    (pod,) = pods
    inputs = [line for line in pod.program.splitlines() if f"s64[2,{pod.tokens}]" in line and " parameter(" in line]
    assert len(inputs) == 4 and all("devices=[2,1]" in line for line in inputs)
    rows = [{"id": str(n), "input_ids": [6 + n] * 50, "labels": [7] * 50, "prompt_tokens": 0} for n in range(4)]
    (packs,) = pod.rounds(rows, 300)
    assert [len(piece) for piece in packs] == [100, 100]


def test_all_is_computed_there_by_programs_of_the_first_steps(trained, monkeypatch):  # noqa: F811
    """What torch-xla lacks it computes on the processor, and counts under the name of torch's own function."""
    import torch_xla.debug.metrics as metrics

    compiled = []

    def begin(self, seed, step, begin_step=Pod.begin_step):
        compiled.append((metrics.metric_data("CompileTime") or (0,))[0])
        begin_step(self, seed, step)

    monkeypatch.setattr(Pod, "begin_step", begin)
    metrics.clear_all()
    trained("tpu", **TPU, **{"train.epochs": 4.0, "train.validations": 1, "machine.tokens_per_pack": 100})
    assert len(compiled) == 24 and len(set(compiled[5:])) == 1
    assert not [name for name in metrics.counter_names() if name.startswith("aten::")]


def test_a_step_of_one_row_leaves_a_device_without(trained):  # noqa: F811
    plain, tpu = (trained(name, **{"train.batch_size": 1}, **device) for name, device in (("cpu", {}), ("tpu", TPU)))
    agree(tpu, plain)


def test_weights_of_4_bits_are_the_plain_runs(trained):  # noqa: F811
    plain, tpu = (trained(name, **{"lora.quantize": "nf4"}, **device) for name, device in (("cpu", {}), ("tpu", TPU)))
    agree(tpu, plain)
    assert curve(tpu) != pytest.approx(curve(trained("whole")), rel=1e-3)


def test_in_bfloat16_the_curve_is_near(trained):  # noqa: F811
    tpu = trained("tpu", **TPU, **{"machine.dtype": "auto"})
    assert curve(tpu) == pytest.approx(curve(trained("plain")), rel=0.03)


def test_training_that_ends_half_way_goes_on_to_the_same_bytes(trained, monkeypatch, tmp_path):  # noqa: F811
    settings = {**TPU, "lora.dropout": 0.1, "machine.checkpoint_minutes": 1e-9, "train.keep": "best"}
    whole = trained("whole", **settings)
    begun = []

    def begin(self, seed, step, begin_step=Pod.begin_step):
        if step == 4 and 4 not in begun:
            begun.append(step)
            raise Refusal("cut")
        begun.append(step)
        begin_step(self, seed, step)

    monkeypatch.setattr(Pod, "begin_step", begin)
    (tmp_path / "main").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    with pytest.raises(Refusal, match="cut"):
        trained("cut", **settings)
    again = trained("again", **settings)
    assert begun == [0, 1, 2, 3, 4, 4, 5]
    for name in ("adapter/adapter_model.safetensors", "train.json", "loss.csv"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_loss_that_is_not_finite_stops_training_and_names_its_step(trained, monkeypatch):  # noqa: F811
    losses = Pod.losses
    seen = []

    def broken(self, packs):
        seen.append(1)
        return losses(self, packs) * (math.nan if len(seen) == 3 else 1.0)

    monkeypatch.setattr(Pod, "losses", broken)
    with pytest.raises(Refusal, match=r"^step 3: the gradient is not finite, on rows row\d+, "):
        trained("broken", **TPU, **{"train.validations": 1})


def test_the_recipe_runs_from_download_to_report(server, tmp_path, monkeypatch):  # noqa: F811
    there = {**test_recipes.SIZE["machine"], "device": "xla", "devices": "auto"}
    monkeypatch.setitem(test_recipes.SIZE, "machine", there)
    test_recipes.test_a_recipe_runs_from_download_to_report("quotes-gemma-2b-tpu", server, tmp_path, monkeypatch)
    assert json.loads((tmp_path / "metrics/timing.json").read_text())["train"]["device"] == "xla"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.optimizer", "adamw_8bit"),
        ("train.metric", "score"),
        ("lora.trainable_tokens", ["<bos>"]),
        ("lora.modules_to_save", ["lm_head"]),
    ],
)
def test_what_tpus_do_not_train_is_refused(trained, name, value):  # noqa: F811
    with pytest.raises(Refusal, match=f"machine.device: xla does not go with {name}"):
        trained("run", **TPU, **{name: value})


def test_a_family_that_was_not_tried_is_refused(trained, tmp_path):  # noqa: F811
    tiny_families.write("gemma3n", tmp_path / "base")
    with pytest.raises(Refusal, match="gemma3n"):
        trained("run", tmp_path / "base", **TPU)


def test_without_a_tpu_the_device_is_refused(params_file, tiny_model, tmp_path):
    params_file(tmp_path, **TPU)
    (tmp_path / "asked").mkdir()
    for side in ("train", "validation"):
        write_tokens(tmp_path / f"{side}.parquet", 5, 0)
    clean = {name: value for name, value in os.environ.items() if name not in ("PJRT_DEVICE", "USE_TORCH_XLA")}
    command = [sys.executable, "-m", "stages.train", tiny_model, "train.parquet", "validation.parquet"]
    done = subprocess.run(
        [*command, "asked", "adapter", "train.json", "loss.csv"],
        cwd=tmp_path, env={**clean, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: params.yaml: machine.device is xla, but torch-xla sees no TPU"
    )

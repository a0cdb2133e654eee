"""The base model and tokens in; a LoRA adapter out, with its loss curve.

    python -m stages.train models/base data/tokens/train.parquet data/tokens/validation.parquet data/validation \
        models/adapter metrics/train.json metrics/loss.csv

An optimizer step is train.batch_size rows, whatever the memory: the rows are cut into packs that fit the machine, and
the loss is the sum over the step's supervised tokens divided by their number, over all packs.

On several devices the same function runs in a process for each (stages/models/ranks.py), and each keeps the whole base
or a share of its layers (stages/models/sharded.py).

Checkpoints are written as it goes (machine.checkpoint_minutes). After a kill the same command goes on from the last
one, and gives the bytes that it would have given undisturbed.
"""

import stages.models.quiet  # noqa: F401, I001 - before what it quiets

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from stages import timing
from stages.models.attention import takes_flash
from stages.models.checkpoints import Checkpoint, Run, checksums, opened, surroundings
from stages.models.families import recordable
from stages.models.graphs import Graphs, own_gradients
from stages.models.load import load_model, mean_loss, pack_loss, row_losses
from stages.models.compiled import compile_pieces
from stages.models.fused import fuse
from stages.models.lora import add_adapters, embedding_trained, save_adapter, token_ids, twin
from stages.models.machine import Resolved, add_in_one_order, resolve_training
from stages.models.memory import Shape, gpu_tokens_per_pack, shape, sharding
from stages.models.packs import IGNORED, Pack, pack, sizes
from stages.models.progress import best_step, validations, without_progress
from stages.models.ranks import ALONE, Machines, Ranks, launch
from stages.models.room import adapter_bytes, checkpoints_bytes
from stages.models.schedule import schedule
from stages.models.sharded import Sharded, load_sharded
from stages.models.state import (
    best,
    generators,
    moments,
    restore_generators,
    restore_moments,
    restore_trained,
    trained,
)
from stages.models.tokens import read_rows
from stages.models.trackers import refuse_missing, started
from stages.models.watch import Gauges, Telemetry, Watch
from stages.models.xla import Pod
from stages.outputs import new_file, new_folder, refuse_without_room, write_json
from stages.params import Params, Train, load
from stages.questions import Questions
from stages.refusal import Refusal, run


@dataclass
class Step:
    """The rows of one optimizer step, this device's share of them as packs; `supervised` counts the labelled tokens of
    all, `tokens` all tokens. On TPUs the packs are those of all, one for each core at a time."""

    packs: list[Pack] | list[list[Pack | None]]
    supervised: int
    tokens: int
    rows: list[str]


class Trainer(SFTTrainer):
    """TRL's trainer, over packs instead of padded batches, that stops at the first number that is not finite."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Train,
        machine: Resolved,
        rows: list[dict],
        validation_rows: list[dict],
        scratch: str,
        run: Run,
        saved: Checkpoint | None,
        ranks: Ranks = ALONE,
        sharded: Sharded | None = None,
        score: Callable[[], float] | None = None,
    ):
        """Go on from `saved`, of `run`, if it is there. What TRL saves on its own account goes to `scratch`. sharded:
        the model's layers, where each process keeps a share of them. `score` measures the adapters as they are, each
        time that the validation loss does."""
        self.rows, self.validation_rows = rows, validation_rows
        self.tokens_per_pack = machine.tokens_per_pack
        self.ranks, self.sharded = ranks, sharded
        self.score = score
        self.settings = train
        self.history: list[dict] = []
        self.best: dict[str, torch.Tensor] = {}  # the adapters at the best validation, with train.keep: best
        self.reader = Reader(self)
        self.planned = schedule(rows, train.batch_size, train.epochs, train.seed, train.order)
        self.done = saved.step if saved else 0  # steps that an earlier process made
        measured = math.ceil(len(self.planned) / every(train, len(self.planned)))
        if train.early_stopping and train.early_stopping >= measured:
            raise Refusal(
                f"params.yaml: train.early_stopping {train.early_stopping} never comes: {len(self.planned)} steps are "
                f"measured {measured} times; raise train.validations or lower it"
            )
        super().__init__(
            model=model,
            args=arguments_of(train, len(self.planned), machine, scratch),
            data_collator=self._step,
            train_dataset=Dataset.from_dict({"rows": self.planned[self.done :] or self.planned}),
            eval_dataset=Dataset.from_dict({"rows": [[]]}),  # unread: evaluate() measures validation_rows
            processing_class=tokenizer,
            callbacks=[self.reader, Keeper(self, run, saved)],
        )
        telemetry = Telemetry(**saved.state["telemetry"]) if saved else Telemetry()
        self.watch = Watch(len(self.planned), self.done, Gauges(self.args.device), telemetry)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL casts adapters of a quantized base to bfloat16
        self.pod = None
        if machine.device == "xla":
            self.accelerator.device_placement = False  # it knows no TPU
            self.pod = Pod(model)
            steps = ([rows[i] for i in step] for step in self.planned)
            self.pod.fit([*steps, validation_rows], machine.tokens_per_pack)
        if saved:
            restore_trained(model, saved.tensors)
            self.history = saved.state["history"]
            self.best = best(saved.tensors)
        self.adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ranks.begin_alike(self.adapters)
        self.graphs = None
        base = model.get_base_model()
        if takes_flash(base) and recordable(base) and not embedding_trained(model) and not sharded:
            own_gradients(model)
            steps = (ranks.share([rows[i] for i in step], self.tokens_per_pack) for step in self.planned)
            coming = (size for step in steps for size in sizes(step, self.tokens_per_pack))
            self.graphs = Graphs(base, rows, coming)
        self.remove_callback(PrinterCallback)  # Watch shows the same figures

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """With train.lora_plus_ratio, LoRA+ (Hayou et al. 2024): B's learning rate so many times A's."""
        if self.settings.lora_plus_ratio == 1:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options |= {"loraplus_lr_ratio": self.settings.lora_plus_ratio, "loraplus_weight_decay": self.args.weight_decay}
        self.optimizer = create_loraplus_optimizer(self.model, kind, **options)
        return self.optimizer

    def _step(self, chosen: list[dict]) -> Step:
        (step,) = chosen
        rows = [self.rows[i] for i in step["rows"]]
        own = self.ranks.share(rows, self.tokens_per_pack)
        return Step(
            (self.pod.rounds if self.pod else pack)(own, self.tokens_per_pack),
            supervised=sum(np.count_nonzero(np.not_equal(row["labels"][1:], IGNORED)) for row in rows),
            tokens=sum(len(row["input_ids"]) for row in rows),
            rows=[row["id"] for row in rows],
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model, step: Step, num_items_in_batch=None) -> torch.Tensor:
        """Add the step's gradients, a pack at a time; return its mean loss in nats a token."""
        model.train()
        self.step_now = step
        self.ranks.seed_step(self.args.seed, self.state.global_step)
        recorded = self.graphs.hidden if self.graphs else lambda piece: None
        if self.pod:
            self.pod.begin_step(self.args.seed, self.state.global_step)
        total = torch.zeros((), device="xla" if self.pod else self.args.device)
        with self._passes(len(step.packs), backward=True):
            for piece in step.packs:
                if self.pod:
                    loss = self.pod.losses(piece).sum() / step.supervised
                else:
                    loss = pack_loss(model.get_base_model(), piece, recorded) / step.supervised
                self.accelerator.backward(loss)
                total += loss.detach()
                # with it goes what autograd holds of the pass: where that was not recorded and the next one is, it
                # would end the recording (pytorch/pytorch#180090)
                del loss
                if self.pod:
                    self.pod.compute()
        self.loss_now = self.ranks.add_up(self.adapters, total)
        return self.loss_now if self.pod is None else torch.zeros(())  # of TPUs the Trainer knows nothing

    def _passes(self, own: int, backward: bool) -> contextlib.AbstractContextManager:
        return self.sharded.passes(own, backward) if self.sharded else contextlib.nullcontext()

    def _clip_grad_norm(self, model) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        self.reader.record(self.step_now, self.loss_now, norm, self.optimizer.param_groups[0]["lr"])
        return norm

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted nowhere: the Trainer's own count takes padded batches

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The mean loss, in nats a supervised token, of all validation rows."""
        self.reader.read_all()
        self.model.eval()
        rows = self.ranks.share(self.validation_rows, self.tokens_per_pack)
        passes = len(pack(rows, self.tokens_per_pack)) if self.sharded else 0
        with self._passes(passes, backward=False):
            measure = self.pod.row_losses if self.pod else functools.partial(row_losses, self.model.get_base_model())
            losses = measure(rows, self.tokens_per_pack)
        loss = mean_loss([loss for share in self.ranks.of_all(losses) for loss in share.values()])
        if not math.isfinite(loss):
            raise Refusal(f"step {self.state.global_step}: the validation loss is {loss}; {ADVICE}")
        score = {"validation_score": self.score()} if self.score else {}
        self.history.append({"step": self.state.global_step, "validation_loss": loss, **score})
        self.watch.validated(self.state.global_step, loss, **score)
        metrics = {"eval_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.settings.keep == "best" and not without_progress(self.history):
            self.best = {name: value.to("cpu", copy=True) for name, value in trained(self.model).items()}
        self.control.should_training_stop |= self.stalled
        return metrics

    @property
    def stalled(self) -> bool:
        """Whether train.early_stopping ends the training here."""
        patience = self.settings.early_stopping
        return patience is not None and without_progress(self.history) >= patience


BEHIND = {"cpu": 0, "cuda": 2, "xla": 1}  # steps that are not read yet


@dataclass
class Point:
    """What a step gave, [loss, gradient norm], on its way from the device. A GPU that is asked for it there and then
    answers when it has done all that it was told to do, and then waits for the next step."""

    number: int
    step: Step
    values: torch.Tensor
    arrived: torch.cuda.Event | None
    learning_rate: float


class Reader(TrainerCallback):
    """Reads what the steps gave into the loss curve and to who watches; stops at what is not finite."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.unread: list[Point] = []

    def on_train_begin(self, args, state, control, **_):
        self.trainer.watch.begin()

    def record(self, step: Step, loss: torch.Tensor, norm: torch.Tensor, learning_rate: float) -> None:
        """Take what the step gave, before the optimizer's step; refuse earlier ones that were not finite."""
        number = self.trainer.state.global_step + 1
        values = torch.stack((loss.float(), norm.float()))
        if loss.device.type != "xla":  # which would compute it for itself, apart from the step
            values = values.to("cpu", non_blocking=True)
        arrived = None
        if loss.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self.unread.append(Point(number, step, values, arrived, learning_rate))
        self._read(BEHIND[loss.device.type])

    def read_all(self) -> None:
        self._read(0)

    def _read(self, behind: int) -> None:
        while len(self.unread) > behind:
            point = self.unread.pop(0)
            if point.arrived:
                point.arrived.synchronize()
            loss, norm = point.values.tolist()
            for name, value in (("gradient", norm), ("loss", loss)):
                if not math.isfinite(value):
                    rows = ", ".join(point.step.rows)
                    raise Refusal(f"step {point.number}: the {name} is not finite, on rows {rows}; {ADVICE}")
            found = {"step": point.number, "loss": loss, "gradient_norm": norm, "learning_rate": point.learning_rate}
            self.trainer.history.append(found)
            self.trainer.watch.made(**found, tokens=point.step.tokens)

    def on_step_end(self, args, state, control, **_):
        if self.trainer.pod:
            self.trainer.pod.compute()

    def on_train_end(self, args, state, control, **_):
        self.read_all()


class Keeper(TrainerCallback):
    """Writes checkpoints, and puts back the one that training goes on from.

    Both as a step begins: what belongs to the step before, its validation too, is done by then, and the data loader
    has drawn its seed from torch's generator.
    """

    def __init__(self, trainer: Trainer, run: Run, saved: Checkpoint | None):
        self.trainer, self.run, self.saved = trainer, run, saved

    def on_train_begin(self, args, state, control, **_):
        if self.saved:
            self._go_on(args, state)

    def _go_on(self, args, state) -> None:
        state.global_step = self.saved.step
        restore_moments(self.trainer.optimizer, self.saved.tensors)
        scheduler = self.trainer.lr_scheduler
        scheduler.load_state_dict({**scheduler.state_dict(), **self.saved.state["schedule"]})
        for group, rate in zip(self.trainer.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if args.device.type == "cuda":
            # kernels are fitted to the first pack that they are compiled for: let it be the one that it was then
            self.trainer.training_step(self.trainer.model, self.trainer._step([{"rows": self.trainer.planned[0]}]))
            self.trainer.model.zero_grad()

    def on_step_begin(self, args, state, control, **_):
        if self.saved:
            restore_generators(args.device, self.saved.tensors)
            self.saved = None
        elif self.run.due and state.global_step:
            self.trainer.reader.read_all()  # what is not finite is not kept
            scheduler = self.trainer.lr_scheduler.state_dict()
            self.run.save(
                Checkpoint(
                    state.global_step,
                    {
                        **trained(self.trainer.model),
                        **{f"best.{name}": value for name, value in self.trainer.best.items()},
                        **moments(self.trainer.optimizer),
                        **generators(args.device),
                    },
                    {
                        "history": self.trainer.history,
                        "telemetry": self.trainer.watch.telemetry.state,
                        "schedule": {key: scheduler[key] for key in ("last_epoch", "_step_count", "_last_lr")},
                        "dtype": dtype_name(self.trainer.model.dtype),
                        "finished": False,
                    },
                )
            )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ADVICE = "look at the rows, lower train.learning_rate, or set machine.dtype to float32"


def memory_gib(device: torch.device) -> float:
    """The most memory held so far: the GPU's where there is one, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return timing.peak_gib()


# as transformers calls them; what bitsandbytes pages, it pages between GPU and CPU
OPTIMIZERS = {
    "adamw": {"cpu": "adamw_torch", "cuda": "adamw_torch_fused", "xla": "adamw_torch"},
    "adamw_8bit": {"cpu": "adamw_8bit", "cuda": "paged_adamw_8bit"},
}


def every(train: Train, steps: int) -> int:
    """Steps from one validation to the next."""
    return max(1, math.ceil(steps / train.validations))


def arguments_of(train: Train, steps: int, machine: Resolved, scratch: str) -> SFTConfig:
    """TRL's arguments; what they save goes to `scratch`."""
    arguments = SFTConfig(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=1,  # of the schedule's steps, each with its rows
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=math.ceil(train.warmup_ratio * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[train.optimizer][machine.device],
        seed=train.seed,
        bf16=False,  # the model is in its format already; autocast would cast every weight again
        use_cpu=machine.device != "cuda",
        eval_strategy="steps",
        eval_steps=every(train, steps),
        logging_strategy="no",  # Watch reads what a step gave
        logging_nan_inf_filter=False,  # it would wait for each step's loss
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    there = "cuda" if machine.device == "cuda" else "cpu"
    assert arguments.device.type == there  # asked first, since asking counts the GPUs
    arguments._n_gpu = 1  # the Trainer would spread each step over all there are
    return arguments


def curve_of(history: list[dict]) -> str:
    """The points of the loss curve as CSV, empty where a point has no such number."""
    columns = ["step", "loss", "validation_loss", "learning_rate", "gradient_norm"]
    if any("validation_score" in point for point in history):
        columns.insert(3, "validation_score")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def decisive(
    params: Params, machine: Resolved, base: Path, tokens: list[Path], processes: int = 1, sharded: bool = False
) -> dict:
    """All that decides the adapter's bytes. Of machine.dtype what was asked for: a checkpoint says what auto found."""
    return {
        "params": {"lora": params.lora.model_dump(), "train": params.train.model_dump()},
        "machine": [
            machine.device,
            params.machine.dtype,
            params.machine.deterministic,
            machine.tokens_per_pack,
            machine.rows_per_batch if params.train.metric == "score" else None,
            processes,
            sharded,
        ],
        "base": checksums({path.name: path for path in base.iterdir()}),
        "tokens": checksums({str(number): path for number, path in enumerate(tokens)}),
        **surroundings(machine.device),
    }


def shares_base(params: Params, machine: Resolved, base: Path, processes: int) -> bool:
    """Whether each process keeps a share of the base, by machine.shard_base and this device; raises Refusal where it
    cannot."""
    asked = params.machine.shard_base
    if asked is True and processes == 1:
        raise Refusal(
            "params.yaml: machine.shard_base is true, and one device trains (machine.devices); set it to auto"
        )
    if asked != "auto" or machine.device != "cuda" or processes == 1:
        return asked is True
    described, dtype, flash, room = on_card(machine, base)
    return described is not None and sharding(described, params, "cuda", dtype, flash, processes, room)


def on_card(machine: Resolved, base: Path) -> tuple[Shape | None, str, bool, int]:
    """What the estimate of memory asks: the base's shape, the format, whether this GPU is one that flash attention
    knows, and its bytes."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    described = shape(config, sum(path.stat().st_size for path in base.glob("*.safetensors")))
    card = torch.cuda.get_device_properties(0)
    return described, dtype_name(machine.dtype), (card.major, card.minor) >= (8, 0), card.total_memory


def fitted(params: Params, machine: Resolved, base: Path, shares: int, ranks: Ranks) -> Resolved:
    """The machine with packs that fit the smallest of all GPUs."""
    tokens = machine.tokens_per_pack
    if machine.device == "cuda":
        described, dtype, flash, room = on_card(machine, base)
        tokens = gpu_tokens_per_pack(described, params, dtype, flash, room, shares)
    return dataclasses.replace(machine, tokens_per_pack=min(ranks.of_all(tokens)))


def worth_going_on_from(run: Run) -> Checkpoint | None:
    """The run's latest checkpoint; none where the run is finished and DVC has its result, and so wants it anew."""
    saved = run.latest()
    if saved is None or not saved.state["finished"]:
        return saved
    lock = Path("dvc.lock")
    recorded = hashlib.md5(curve_of(saved.state["history"]).encode(), usedforsecurity=False).hexdigest()
    if lock.is_file() and recorded in lock.read_text(encoding="utf-8"):
        run.keep(0)
        return None
    return saved


def main(arguments: list[str]) -> None:
    params = load()
    refuse_missing(params.machine.report_to)
    began = time.monotonic()
    machine = resolve_training(params.machine)
    machines = Machines.found(params.machine.rendezvous)
    devices = machine.devices[: math.ceil(params.train.batch_size / machines.count)]  # a row each, at least
    if len(devices) * machines.count == 1:
        train_adapter(arguments, params, machine, began, ALONE)
    else:
        launch(train_adapter, (arguments, params, machine, began), devices, machines)


def train_adapter(arguments: list[str], params: Params, machine: Resolved, began: float, ranks: Ranks) -> None:
    """What each device's process does, `began` by time.monotonic; the first of them writes."""
    if machine.deterministic:
        add_in_one_order()
    base, train_tokens, validation_tokens, asked, out, metrics, curve = (Path(argument) for argument in arguments)
    tokens = [train_tokens, validation_tokens]
    with contextlib.ExitStack() as held:
        scratch = held.enter_context(tempfile.TemporaryDirectory())
        sharded = any(ranks.of_all(shares_base(params, machine, base, ranks.count)))
        if sharded and params.train.metric == "score":
            raise Refusal(
                "params.yaml: train.metric is score, but a base that devices share (machine.shard_base) answers "
                "nothing while it trains; set it to loss"
            )
        machine = fitted(params, machine, base, ranks.count if sharded else 1, ranks)
        read = [*tokens, *sorted(asked.iterdir())]
        decides = decisive(params, machine, base, read, ranks.count, sharded) if ranks.first_here else None
        ranks.refuse_differences(decides)
        run, saved = Run(Path(scratch) / "unused", math.inf), None
        if ranks.first:
            run = held.enter_context(opened(out, decides, params.machine.checkpoint_minutes))
            saved = worth_going_on_from(run)
        machine, saved = ranks.of_first((machine, saved))
        if saved:
            machine = dataclasses.replace(machine, dtype=getattr(torch, saved.state["dtype"]))
        rows, validation_rows = (read_rows(path) for path in tokens)
        device = "cpu" if machine.device == "xla" else machine.device  # the trainer moves the model to TPUs
        if sharded:
            model, layers = load_sharded(base, device, machine.dtype, params.lora.quantize, ranks)
        else:
            model, layers = load_model(base, device, machine.dtype, quantize=params.lora.quantize), None
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        trainable = token_ids(tokenizer, params.lora.trainable_tokens)
        model = add_adapters(model, params.lora, params.train.seed, trainable)
        if ranks.first:
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            refuse_without_room(out, adapter_bytes(count, params.lora.init))
            if not (saved and saved.state["finished"]):
                there = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
                wanted = checkpoints_bytes(count, params.train.keep == "best")
                refuse_without_room(run.folder, max(0, wanted - there))
        score = None
        if params.train.metric == "score":
            questions, answering = Questions(asked, validation_rows, base, params, machine), twin(model)
            score = lambda: questions.score(answering, ranks)  # noqa: E731
        if machine.device != "xla":  # whose compiler fuses by itself, and lacks some of those functions
            fuse(model)
        if machine.device == "cuda":
            compile_pieces(model.get_base_model())
        given = (tokenizer, params.train, machine, rows, validation_rows, scratch, run, saved, ranks, layers, score)
        trainer = Trainer(model, *given)
        if saved:
            print(f"going on after step {trainer.done} of {len(trainer.planned)}", file=sys.stderr)
        if not (saved and saved.state["finished"]):
            if ranks.first:
                who = params.machine.report_to
                tell = held.enter_context(started(who, parameters_of(params, trainer, machine)))
                held.enter_context(trainer.watch.shown(tell))
            finish(trainer, run)
            record_timing(trainer, machine, began)
        if ranks.first:
            write_outputs(trainer, out, metrics, curve)
            # DVC, should it be killed before it has the outputs, deletes them: what they are made of is kept for it
            run.keep(1 if "DVC_STAGE" in os.environ else 0)


def parameters_of(params: Params, trainer: Trainer, machine: Resolved) -> dict[str, str | float]:
    """What a tracker shows beside a run's curves; a list, or nothing, as text."""
    sections = {"lora": params.lora.model_dump(), "train": params.train.model_dump()}
    decided = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    decided |= {"steps": len(trainer.planned), "after_step": trainer.done, "device": machine.device}
    decided["dtype"] = dtype_name(machine.dtype)
    return {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in decided.items()}


def finish(trainer: Trainer, run: Run) -> None:
    """Train what is left to train, measure, and keep the result."""
    trainer.train()
    steps, history = trainer.state.global_step, trainer.history
    if steps != len(trainer.planned) and not trainer.stalled:
        raise Refusal(f"training ended at step {steps} of {len(trainer.planned)}; run it again")
    if "validation_loss" not in history[-1]:
        trainer.evaluate()
    if trainer.best:
        restore_trained(trainer.model, trainer.best)
    if trainer.ranks.first:
        telemetry = trainer.watch.telemetry.state
        state = {"history": history, "telemetry": telemetry, "dtype": dtype_name(trainer.model.dtype), "finished": True}
        run.save(Checkpoint(steps, trained(trainer.model), state))


def write_outputs(trainer: Trainer, out: Path, metrics: Path, curve: Path) -> None:
    if trainer.pod:
        trainer.model.to("cpu")  # safetensors takes nothing from TPUs
    with new_folder(out) as folder:
        save_adapter(trainer.model, folder)
    history = trainer.history
    with new_file(curve) as partial:
        partial.write_bytes(curve_of(history).encode())
    losses = [point["loss"] for point in history if "loss" in point]
    last = losses[-max(1, len(losses) // 10) :]
    steps = history[-1]["step"]
    kept = validations(history)[best_step(history) if trainer.settings.keep == "best" else steps]
    write_json(
        metrics,
        {
            "steps": steps,
            "kept_step": kept["step"],
            "ended": "early: no progress" if steps < len(trainer.planned) else "as planned",
            "train_loss": round(sum(last) / len(last), 6),
            **{name: round(kept[name], 6) for name in ("validation_loss", "validation_score") if name in kept},
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        },
    )


def record_timing(trainer: Trainer, machine: Resolved, began: float) -> None:
    """Of this process: what one that was killed did before is not counted. The memory is that of the fullest device."""
    watch, device, ranks = trainer.watch, trainer.args.device, trainer.ranks
    peak_gib = max(ranks.of_all(memory_gib(device)))
    if not ranks.first:
        return
    timing.record(
        "train",
        seconds=round(time.monotonic() - began, 1),
        tokens_per_second=round(watch.tokens_per_second, 1),
        peak_gib=round(peak_gib, 2),
        device=machine.device,
        **({"devices": ranks.count, "shard_base": bool(trainer.sharded)} if ranks.count > 1 else {}),
        dtype=dtype_name(machine.dtype),
        tokens_per_pack=machine.tokens_per_pack,
        threads=torch.get_num_threads(),
        **({"after_step": trainer.done} if trainer.done else {}),
        **watch.gauges.figures(),
    )
    watch.write_telemetry()


if __name__ == "__main__":
    run(main)

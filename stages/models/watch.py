"""What training gave at each step in; a live table in a terminal, plain lines elsewhere, and telemetry at the end.

Told of steps whose figures have been read already: nothing here waits for a GPU.
"""

import contextlib
import csv
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pynvml
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from stages import timing
from stages.models.trackers import Tell
from stages.outputs import new_file

REFRESHED_PER_SECOND = 2
LINES = 20  # that a run says where there is no terminal; more only where they would be QUIET_SECONDS apart
QUIET_SECONDS = 600.0
BAR, NAME, VALUE = 20, 17, 18  # characters; rich's own Table takes six times as long to draw
RECENT = 20  # steps over which the pace shown is taken


@dataclass(frozen=True)
class Reading:
    """The memory in use, on a GPU of the whole card, and how busy and how hot the GPU is, where it tells."""

    memory_gib: float
    utilisation_percent: int | None = None
    temperature_celsius: int | None = None


class Gauges:
    """What the machine says of itself, looked at every few seconds."""

    EVERY_SECONDS = 2.0

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic):
        self.device, self.clock = device, clock
        self.seen: list[tuple[int, int]] = []
        self.silent = False
        self.looked = -math.inf

    def look(self) -> Reading:
        """The latest reading."""
        now = self.clock()
        if now - self.looked >= self.EVERY_SECONDS:
            self.looked, self.latest = now, self._read()
        return self.latest

    def _read(self) -> Reading:
        if self.device.type != "cuda":
            return Reading(resident_gib())
        if not self.silent:
            try:
                used = torch.cuda.device_memory_used(self.device) / 2**30
                self.seen.append((torch.cuda.utilization(self.device), torch.cuda.temperature(self.device)))
                return Reading(used, *self.seen[-1])
            except (pynvml.NVMLError, RuntimeError):  # a GPU that is shared or virtual may not tell
                self.silent = True
        return Reading(torch.cuda.memory_reserved(self.device) / 2**30)

    def room(self) -> str:
        """The memory that the GPU has, to put behind what is in use; on a CPU nothing."""
        if self.device.type != "cuda":
            return ""
        return f" of {torch.cuda.get_device_properties(self.device).total_memory / 2**30:.1f}"

    def figures(self) -> dict[str, str | float]:
        """The GPU's name, its mean utilisation in percent and its highest temperature; on a CPU nothing."""
        if not self.seen:
            return {}
        busy, warm = zip(*self.seen, strict=True)
        return {
            "gpu": torch.cuda.get_device_name(self.device),
            "gpu_utilisation_percent": round(sum(busy) / len(busy), 1),
            "gpu_temperature_celsius": max(warm),
        }


def resident_gib() -> float:
    """The memory that this process holds, in GiB; where the system does not tell (macOS), the most it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return timing.peak_gib()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


@dataclass(frozen=True)
class Moment:
    """A point of the telemetry: seconds of training and tokens so far, and what the machine said then."""

    seconds: float
    step: int
    tokens: int
    memory_gib: float
    utilisation_percent: int | None
    temperature_celsius: int | None


class Telemetry:
    """A run's moments, under MOST however long it is: when there are so many, every second one goes."""

    MOST = 300

    def __init__(self, moments: list[list] | None = None, apart_seconds: float = 0.1):
        """`moments`: of an earlier process, whose seconds and tokens are counted on."""
        self.moments = [Moment(*moment) for moment in moments or []]
        self.apart_seconds = apart_seconds
        last = self.moments[-1] if self.moments else None
        self.seconds_before, self.tokens_before = (last.seconds, last.tokens) if last else (0.0, 0)

    def add(self, seconds: float, step: int, tokens: int, reading: Reading, last: bool = False) -> None:
        """Take a moment unless the one before is too near; the `last` of a run is taken in its place."""
        moment = Moment(self.seconds_before + seconds, step, self.tokens_before + tokens, *astuple(reading))
        if self.moments and moment.seconds - self.moments[-1].seconds < self.apart_seconds:
            if not last:
                return
            self.moments.pop()
        self.moments.append(moment)
        if len(self.moments) == self.MOST:
            del self.moments[-2::-2]
            self.apart_seconds = (moment.seconds - self.moments[0].seconds) / len(self.moments)

    @property
    def state(self) -> dict[str, Any]:
        """What the telemetry of a process that goes on is made from, as JSON."""
        return {"moments": [astuple(moment) for moment in self.moments], "apart_seconds": self.apart_seconds}

    def write(self, path: Path) -> None:
        """Write CSV: the tokens a second of each row since the row before; nothing where a GPU does not tell."""
        with new_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            columns = ["seconds", "step", "tokens_per_second", *Reading.__dataclass_fields__]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            seconds, tokens = 0.0, 0
            for moment in self.moments:
                rate = (moment.tokens - tokens) / max(1e-9, moment.seconds - seconds)
                seconds, tokens = moment.seconds, moment.tokens
                rounded = {"seconds": round(seconds, 2), "memory_gib": round(moment.memory_gib, 3)}
                writer.writerow({**vars(moment), **rounded, "tokens_per_second": round(rate, 1)})


class Watch:
    """How a training goes: what it gave, how fast, how long it will take, and what the machine says meanwhile."""

    def __init__(
        self,
        steps: int,
        done: int,
        gauges: Gauges,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`done`: of `steps`, those that an earlier process made, whose `telemetry` goes on here."""
        self.steps, self.done = steps, done
        self.gauges, self.telemetry, self.clock = gauges, telemetry, clock
        self.tell: Tell = lambda values, step: None
        self.plain = False
        self.begin()

    def begin(self) -> None:
        """Count time and tokens from here."""
        self.step, self.tokens = self.done, 0
        self.began = self.ended = self.said = self.clock()
        self.reading = self.gauges.look()
        self.first: tuple[float, int] | None = None  # when the first step was read, and its number
        self.recent = deque([(self.began, 0)], maxlen=RECENT + 1)
        self.latest: dict[str, float] = {}
        self.validation = ""

    @contextlib.contextmanager
    def shown(self, tell: Tell, console: Console | None = None) -> Iterator[None]:
        """`tell` every step's figures, and show them on stderr until the block ends: in a terminal as a table that is
        drawn again and again, elsewhere as a few lines."""
        self.tell = tell
        console = console or Console(stderr=True)
        # is_interactive alone is true of a file where FORCE_COLOR is set, as some build servers do
        self.plain = not (console.is_interactive and console.file.isatty())
        table = Live(console=console, get_renderable=self.table, refresh_per_second=REFRESHED_PER_SECOND)
        with contextlib.nullcontext() if self.plain else table:
            yield

    def made(self, step: int, tokens: int, loss: float, gradient_norm: float, learning_rate: float) -> None:
        """Take what a step gave, and how many tokens its rows had."""
        self.ended = self.clock()
        self.reading = self.gauges.look()
        self.step = step
        self.tokens += tokens
        self.first = self.first or (self.ended, step)
        self.recent.append((self.ended, self.tokens))
        self.latest = {"loss": loss, "gradient_norm": gradient_norm, "learning_rate": learning_rate}
        self.telemetry.add(self.ended - self.began, step, self.tokens, self.reading)
        said = {name: value for name, value in vars(self.reading).items() if value is not None}
        self.tell({**self.latest, "tokens_per_second": self.pace, **said}, step)
        due = step in (self.done + 1, self.steps) or step % math.ceil(self.steps / LINES) == 0
        if self.plain and (due or self.ended - self.said >= QUIET_SECONDS):
            self.said = self.ended
            figures = [(name, value) for name, value in self.figures() if value and name != "validation loss"]
            self._say(step, ", ".join(f"{name} {value}" for name, value in figures) + f", {self.left} left")

    def validated(self, step: int, validation_loss: float, **score: float) -> None:
        """Take the validation loss, and as validation_score, where answers were scored, the share that they reach."""
        reached = "".join(f", score {value:.1%}" for value in score.values())
        self.validation = f"{validation_loss:.3f}{reached} at {step:,}"
        self.tell({"validation_loss": validation_loss, **score}, step)
        if self.plain:
            self._say(step, f"validation loss {validation_loss:.3f}{reached}")

    def _say(self, step: int, text: str) -> None:
        print(f"step {step:,} of {self.steps:,}: {text}", file=sys.stderr, flush=True)

    def write_telemetry(self) -> None:
        self.telemetry.add(self.ended - self.began, self.step, self.tokens, self.reading, last=True)
        self.telemetry.write(timing.TELEMETRY)

    @property
    def tokens_per_second(self) -> float:
        """Of this process, from its beginning to the last step that was read."""
        return self.tokens / max(1e-9, self.ended - self.began)

    @property
    def pace(self) -> float:
        """Tokens a second of the last steps."""
        (before, tokens), (now, more) = self.recent[0], self.recent[-1]
        return (more - tokens) / max(1e-9, now - before)

    @property
    def left(self) -> str:
        """The time left at the pace since the first step, which compiles; validations and checkpoints are in it."""
        if not self.first or self.step == self.first[1]:
            return "?"
        since, step = self.first
        left = (self.steps - self.step) * (self.ended - since) / (self.step - step)
        return clock_time(max(0.0, left - (self.clock() - self.ended)))

    def figures(self) -> list[tuple[str, str]]:
        """What there is to see, named; empty where nothing is known of it yet, or the machine does not tell."""
        busy, hot = self.reading.utilisation_percent, self.reading.temperature_celsius
        loss, norm, rate = (self.latest.get(name) for name in ("loss", "gradient_norm", "learning_rate"))
        return [
            ("loss", "" if loss is None else f"{loss:.3f}"),
            ("validation loss", self.validation),
            ("gradient norm", "" if norm is None else f"{norm:.3g}"),
            ("learning rate", "" if rate is None else f"{rate:.2e}"),
            ("tokens/s", f"{self.pace:,.0f}" if self.latest else ""),
            ("memory", f"{self.reading.memory_gib:.1f}{self.gauges.room()} GiB"),
            ("utilisation", "" if busy is None else f"{busy}%"),
            ("temperature", "" if hot is None else f"{hot} °C"),
        ]

    def table(self) -> Text:
        """A bar of the steps, and under it the figures, two a line."""
        drawn = BAR * self.step // self.steps
        table = Text(no_wrap=True, overflow="crop")
        table.append(f"step {self.step:,} of {self.steps:,}  {'━' * drawn}").append("─" * (BAR - drawn), "dim")
        table.append(f"  {100 * self.step // self.steps}%")
        table.append(f"  {clock_time(self.clock() - self.began)} gone, {self.left} left")
        figures = self.figures() if self.gauges.device.type == "cuda" else self.figures()[:-2]
        for number, (name, value) in enumerate(figures):
            table.append("  " if number % 2 else "\n").append(f"{name:<{NAME}}", "dim").append(f"{value:<{VALUE}}")
        return table


def clock_time(seconds: float) -> str:
    """As a clock shows it: 0:07, 12:34, 3:25:45."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

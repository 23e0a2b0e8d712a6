"""Shows a run: records for metrics.jsonl and TensorBoard, a bar or lines for the console.

Invariant: one process writes; a file never holds two records of one step, nor one of a step that a
resumed run has yet to do.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


@dataclass
class StepRecord:
    """One logged step. Counts and rates are global, `memory_mb` is in 2**20 bytes, None = unknown.

    `step` counts optimizer steps done, from 1, those skipped on overflow included.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens_per_second: float | None
    samples_per_second: float | None
    tflops_per_gpu: float | None
    mfu: float | None
    memory_mb: float | None
    data_wait_s: float | None
    step_time_s: float | None
    loss_scale: float | None


@dataclass(frozen=True)
class Measure:
    """Mean held-out loss in nats per label token, and the share of label tokens whose prediction,
    the likeliest token, is right."""

    loss: float
    accuracy: float


class MetricsSink:
    """Writes metrics.jsonl, eval.jsonl and TensorBoard events into one folder.

    Args:
        first_step: the first step this run does. On a resume (above 1) later records are cut from
            the files; a fresh run moves another run's files aside, to metrics.1.jsonl and so on.
        is_writer: False makes every method do nothing.
    """

    def __init__(self, tensorboard_dir: str | Path, first_step: int, is_writer: bool) -> None:
        self._events: Any = None
        self._warned = False
        if not is_writer:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(tensorboard_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = continued(folder / "metrics.jsonl", first_step)
        self._evals = continued(folder / "eval.jsonl", first_step)
        self._events = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, record: StepRecord) -> None:
        if self._events is None:
            return
        values = asdict(record)
        with self._tolerant():
            _append(self._metrics, values)
            step = values.pop("step")
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"train/{name}", value, step)

    def log_eval(self, step: int, found: Mapping[str, Measure]) -> None:
        """Held-out losses and accuracies by source, as eval/<source> and accuracy/<source>, and as
        one record of eval.jsonl."""
        if self._events is None:
            return
        losses = {source: value.loss for source, value in found.items()}
        accuracies = {source: value.accuracy for source, value in found.items()}
        with self._tolerant():
            _append(self._evals, {"step": step, "losses": losses, "accuracies": accuracies})
            for group, values in (("eval", losses), ("accuracy", accuracies)):
                for source, value in values.items():
                    self._events.add_scalar(f"{group}/{source}", value, step)
            self._events.flush()

    def has_eval(self, step: int) -> bool:
        """Whether eval.jsonl has a record of a step; False on all but the writer."""
        if self._events is None:
            return False
        with open(self._evals.name, encoding="utf-8") as file:
            return any(json.loads(line)["step"] == step for line in file)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A full disk costs records, said once, not the run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                print(f"warning: metrics cannot be written ({error})", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        if self._events is not None:
            with self._tolerant():
                self._metrics.close()
                self._evals.close()
                self._events.close()


def continued(path: Path, first_step: int) -> IO[str]:
    """`path` opened for appending, holding only records of steps before `first_step`.

    A run that begins anew moves the file of an earlier one aside, to NAME.1.jsonl and so on.
    """
    if path.exists() and first_step > 1:
        _cut(path, first_step)
    elif path.exists() and path.stat().st_size:
        number = 1
        while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)
    return path.open("a", encoding="utf-8")


def _cut(path: Path, first_step: int) -> None:
    kept = path.with_name(path.name + ".tmp")
    with (
        path.open(encoding="utf-8", errors="replace") as old,
        kept.open("w", encoding="utf-8") as new,
    ):
        for line in old:
            # A run that was killed while writing leaves half a line; its step is done again.
            if line.endswith("\n") and 0 < _step_of(line) < first_step:
                new.write(line)
    os.replace(kept, path)


def _step_of(line: str) -> int:
    """The step of a line of JSON, 0 when it is not a whole record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 0
    return step if isinstance(step, int) else 0


def _append(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json_text(record) + "\n")
    file.flush()


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON, which has no NaN and no infinity: both become null."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Console:
    """One bar on a terminal; elsewhere one line per logged step.

    Args:
        done: steps done before this run, `total` those of the whole run.
        is_terminal: None asks standard error, where the bar is drawn.
    """

    def __init__(
        self, total: int, done: int, is_writer: bool, is_terminal: bool | None = None
    ) -> None:
        self._total = total
        self._is_writer = is_writer
        self._bar: Any = None
        if is_writer and (sys.stderr.isatty() if is_terminal is None else is_terminal):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step done. Reads nothing from the device."""
        if self._bar is not None:
            self._bar.update(1)

    def log(self, record: StepRecord) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(f"{k} {v}" for k, v in _columns(record).items()))
        elif self._is_writer:
            width = len(str(self._total))
            columns = "  ".join(f"{k} {v:>{_WIDTHS[k]}}" for k, v in _columns(record).items())
            print(f"step {record.step:>{width}}/{self._total}  {columns}", flush=True)

    def write(self, text: str) -> None:
        """Text beside the bar, without breaking it."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._is_writer:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_WIDTHS = {"loss": 8, "lr": 9, "grad norm": 9, "tokens/s": 10, "memory": 11}


def _columns(record: StepRecord) -> dict[str, str]:
    return {
        "loss": _shown(record.loss, ".4f"),
        "lr": _shown(record.lr, ".2e"),
        "grad norm": _shown(record.grad_norm, ".3f"),
        "tokens/s": _shown(record.tokens_per_second, ",.0f"),
        "memory": _shown(record.memory_mb, ",.0f", " MB"),
    }


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def final_line(
    memory_mb: float | None, samples_per_second: float | None, tflops: float | None
) -> str:
    """The last line of a run, in the form of the upstream benchmark; an unknown value is n/a."""
    return (
        f"max memory usage:  {_shown(memory_mb, '.2f', ' MB')}, "
        f"throughput:  {_shown(samples_per_second, '.2f', ' samples/s')}, "
        f"TFLOPS/GPU:  {_shown(tflops, '.2f')}"
    )

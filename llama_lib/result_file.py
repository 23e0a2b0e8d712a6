"""The result of a benchmark as a file: what was run, on what, every measured step, and the rates.

Invariant: a file that `read` accepts is whole: every key of version 1 is there with its type, none
besides, so that no reader has to guess.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llama_lib.errors import UserError
from llama_lib.metrics import json_text

FORMAT = "llama_lib benchmark"
VERSION = 1
RANDOM_DATA = "random"


@dataclass(frozen=True)
class Model:
    """`name` is what -c or --model_path named, `parameters` counts tied weights once."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Hardware:
    """`device` is torch.cuda.get_device_name, or cpu; `count` that of all GPUs (CPU processes).

    `cpu`, `cores` and `memory_gib` (2**30 bytes) are of the first host.
    """

    device: str
    count: int
    cpu: str
    cores: int
    memory_gib: float


@dataclass(frozen=True)
class Steps:
    """`run` optimizer steps in all, the first `ignored` of them not measured; `seconds` of each
    measured step, in order and unrounded."""

    run: int
    ignored: int
    seconds: list[float]


@dataclass(frozen=True)
class Rates:
    """What follows from the measured steps; see `rates_of`."""

    tokens_per_second_per_gpu: float
    samples_per_second: float
    step_time_median_s: float
    step_time_p95_s: float
    step_time_spread: float


@dataclass(frozen=True)
class Peak:
    """The dense peak of one GPU in TFLOPS that `mfu` refers to, and who says so; None: unknown."""

    tflops: float | None
    source: str


@dataclass(frozen=True)
class Memory:
    """Highest use by one process, in 2**20 bytes; None where it cannot be told."""

    allocated: float | None
    reserved: float | None
    host: float | None


@dataclass(frozen=True)
class TimeShares:
    """Shares of the time since the first measured step began, their sum 1.

    Pauses are part of it, the last save too: saving is `save`, evaluation and samples are `other`.
    `communication` is None where it was not measured by itself: then it is part of the others.
    """

    data: float
    forward_backward: float
    optimizer: float
    communication: float | None
    save: float
    other: float


@dataclass(frozen=True)
class Loss:
    """Of the first and the last step run, in nats per token; None: not a finite number."""

    first: float | None
    last: float | None


@dataclass(frozen=True)
class Result:
    """One run of benchmark.py.

    Args:
        command: the command line.
        options: Options.to_dict() as resolved: max_length and mixed_precision are those run with.
        layout: Layout.describe().
        attention: the attention kernel that ran; `kernels`: of RMSNorm, rotary and SwiGLU.
        chunked_loss: logits and loss were computed a piece at a time; the option only asks for it.
        versions: package name to version.
        data: RANDOM_DATA, or what --dataset named.
        tokens_per_step: of all GPUs; `rows_per_step` likewise.
        tflops_per_gpu: by the names of flops.py's formulas: model, causal, hardware,
            colossalai_8n, megatron_2021. 1e12 FLOPs per second and GPU.
        mfu: the model formula's TFLOPS as a share of `peak`; None where that is unknown.
    """

    command: str
    model: Model
    options: dict[str, dict[str, Any]]
    layout: str
    attention: str
    kernels: str
    chunked_loss: bool
    versions: dict[str, str]
    hardware: Hardware
    data: str
    steps: Steps
    tokens_per_step: int
    rows_per_step: int
    rates: Rates
    tflops_per_gpu: dict[str, float]
    mfu: float | None
    peak: Peak
    memory_mb: Memory
    time_shares: TimeShares
    loss: Loss

    @property
    def sequence(self) -> int:
        """Tokens per row."""
        return int(self.options["model"]["max_length"])

    @property
    def precision(self) -> str:
        return str(self.options["training"]["mixed_precision"])

    @property
    def recompute(self) -> str:
        """none, selective or full; -g is full."""
        model = self.options["model"]
        return "full" if model["gradient_checkpoint"] else str(model["recompute"])

    def to_json(self) -> str:
        """The file's text. A number that is not finite becomes null."""
        whole = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json_text(whole, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "result") -> Result:
        """The result that a file's text holds.

        Args:
            name: what messages call the file.

        Raises:
            UserError: the text is no result of this version, with everything that is wrong.
        """
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise UserError(f"{name} is not JSON ({error}).") from None
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            raise UserError(f"{name} is no file that benchmark.py --output wrote.")
        if (version := whole.get("version")) != VERSION:
            raise UserError(
                f"{name} has version {version!r} of the format, expected {VERSION}; measure again."
            )
        inner = {key: value for key, value in whole.items() if key not in ("format", "version")}
        problems: list[str] = []
        found = _read(cls, inner, "", problems)
        if not problems:
            problems = _contradictions(found)
        if problems:
            raise UserError([f"{name}: {problem}" for problem in problems])
        return found


def rates_of(
    seconds: Sequence[float], tokens_per_step: int, rows_per_step: int, gpus: int
) -> Rates:
    """The rates of steps that took so many seconds each.

    Throughput is what the steps did over the time they took, i.e. of the mean step, so it can be
    multiplied up; median and 95th percentile (nearest rank: a step that happened) stand beside it.
    The spread is (longest - shortest) / median.
    """
    ordered = sorted(seconds)
    mean, median = statistics.fmean(ordered), statistics.median(ordered)
    return Rates(
        tokens_per_second_per_gpu=tokens_per_step / mean / gpus,
        samples_per_second=rows_per_step / mean,
        step_time_median_s=median,
        step_time_p95_s=ordered[math.ceil(0.95 * len(ordered)) - 1],
        step_time_spread=(ordered[-1] - ordered[0]) / median,
    )


def output_problems(path: str | Path) -> list[str]:
    """Why a result could not be written there, asked before the run. Leaves nothing behind."""
    target = Path(path)
    if target.is_dir():
        return [f"--output {path} is a folder, expected a file."]
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return [f"--output {path}: nothing can be written in {folder}."]
    return []


def write(result: Result, path: str | Path) -> None:
    """The whole file or none; folders are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_text(result.to_json(), encoding="utf-8")
    os.replace(part, target)


def read(path: str | Path) -> Result:
    """The result in a file.

    Raises:
        UserError: there is no such file, or it holds no result of this version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{path} cannot be read: {reason}.") from None
    return Result.from_json(text, str(path))


def _contradictions(result: Result) -> list[str]:
    """What the types do not show."""
    problems = []
    for section, name in (
        ("model", "max_length"),
        ("model", "gradient_checkpoint"),
        ("model", "recompute"),
        ("training", "mixed_precision"),
    ):
        if name not in result.options.get(section, {}):
            problems.append(f"options.{section}.{name} is missing.")
    shares = [share for share in asdict(result.time_shares).values() if share is not None]
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        problems.append(f"the time_shares add up to {sum(shares):.6f}, expected 1.")
    measured = result.steps.run - result.steps.ignored
    if not result.steps.seconds or len(result.steps.seconds) != measured:
        problems.append(
            f"steps.seconds has {len(result.steps.seconds)} steps, expected run - ignored = "
            f"{measured}, at least 1."
        )
    positive = {
        f"rates.{name}": rate
        for name, rate in asdict(result.rates).items()
        if name != "step_time_spread"
    }
    positive |= {f"steps.seconds[{n}]": each for n, each in enumerate(result.steps.seconds)}
    problems += [
        f"{name} is {number}, expected a number above 0."
        for name, number in positive.items()
        if not 0 < number < math.inf
    ]
    return problems


def _read(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value`, as JSON gave it, as a `kind`; what does not fit goes into `problems`."""
    if is_dataclass(kind):
        return _read_fields(kind, value, where, problems)
    if isinstance(kind, UnionType):
        if value is None:
            return None
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    outer, inner = get_origin(kind) or kind, get_args(kind)
    accepted = (int, float) if outer is float else outer
    is_flag = isinstance(value, bool) and outer is not bool  # to Python a bool is an int
    if outer is not Any and (is_flag or not isinstance(value, accepted)):
        shown = json.dumps(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        problems.append(f"{where} is {shown}, expected {_NAMES[outer]}.")
    elif outer is dict:
        return {
            key: _read(inner[1], each, f"{where}.{key}", problems) for key, each in value.items()
        }
    elif outer is list:
        return [_read(inner[0], each, f"{where}[{n}]", problems) for n, each in enumerate(value)]
    return float(value) if outer is float and isinstance(value, int) else value


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _read_fields(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where} is {json.dumps(value)[:40]}, expected an object.")
        return None
    prefix = f"{where}." if where else ""
    types, known = get_type_hints(kind), {each.name: each for each in fields(kind)}
    problems += [f"{prefix}{name} is unknown." for name in value if name not in known]
    read_fields, complete = {}, True
    for name, each in known.items():
        if name in value:
            read_fields[name] = _read(types[name], value[name], prefix + name, problems)
        elif each.default is MISSING:
            problems.append(f"{prefix}{name} is missing.")
            complete = False
    return kind(**read_fields) if complete else None

"""`python -m llama_lib plan`: what a model takes on given GPUs, and the fastest way to train it."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llama_lib.config import Options
from llama_lib.errors import UserError
from llama_lib.flops import peak_tflops
from llama_lib.models import Shape, model_shape
from llama_lib.option_readers import POSITIVE, TOKENS, Reader, integer
from llama_lib.option_tree import PLUGINS, PRECISIONS
from llama_lib.planner.advice import advice_lines, cheaper
from llama_lib.planner.command_line import launch_command
from llama_lib.planner.hardware import (
    GIB,
    Gpu,
    Machines,
    custom_gpu,
    gpu_of_memory,
    host_gpu,
    known_gpu,
    machines,
    of_host,
    unknown_gpu_message,
)
from llama_lib.planner.report import (
    fits_line,
    megabytes,
    memory_lines,
    selection,
    setting_lines,
    table,
    time_lines,
    warm_up_lines,
)
from llama_lib.planner.search import (
    Plan,
    Question,
    changed,
    excess,
    limits,
    search,
    step_tokens_of,
)

# Rows of the ranked table, beside the best of each plugin.
ROWS = 10
# Times the given GPUs up to which more of them are tried when nothing fits.
_MORE_GPUS = (2, 4, 8, 16, 32)
DATA = "YOUR_DATA"
# Tokens that hours are counted for where nobody says how many the run has.
TOKENS_SHOWN = 10**9


def main(argv: list[str]) -> int:
    """Print the plan; 0: something fits, 1: nothing does.

    Raises:
        UserError: the model or the GPU is unknown, or the numbers do not go together.
    """
    asked = _parser().parse_args(argv)
    shape = model_shape(asked.config)
    where = _machines(asked)
    question = _question(asked, shape, where)
    print("\n".join(setting_lines(shape, asked.config, asked.gpus, where)))
    print("\n".join(_step_lines(asked, question.step_tokens)))
    plans = search(question)
    if not plans:
        raise UserError(
            "no layout of these options is possible: leave out --tp, --pp, -p or -b, or give "
            "another number of --gpus."
        )
    best = plans[0]
    if best.fits:
        print("\n".join(["", *_lines_of_best(best, question, asked)]))
    print("\n".join(["", *_ranking(plans, question, asked)]))
    if best.fits:
        start = launch_command(
            best.options, asked.gpus, where.gpus_per_host, ["-c", asked.config], ["-d", DATA]
        )
        print(f"\nstart the {'best' if best.time else 'first'} with:\n{start}")
        return 0
    print("\n".join(["", *_nothing_fits(best, question, asked)]))
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib plan",
        description="Memory and time of training before it starts: every plugin and layout, ranked "
        "by predicted speed. Exit code 1: nothing fits.",
    )

    def add(*names: str, reader: Reader | None = None, **settings: Any) -> None:
        if reader is not None:
            settings = {"type": _typed(reader), "metavar": reader.metavar} | settings
        parser.add_argument(*names, **settings)

    one = integer(1)
    add("-c", "--config", default="7b", help="model: a name, a config.json, a folder or a hub id")
    add("--gpus", reader=one, help="GPUs of the run (default: those of this machine)")
    add("--gpus_per_host", reader=one, default=8, help="GPUs of one host (default 8)")
    add("--gpu", metavar="NAME", help="card, as a100-80gb, h100, h200 (default: this machine's)")
    add("--gpu_memory", reader=POSITIVE, metavar="GIB", help="GiB of one GPU (default: the card's)")
    add(
        "--host_memory",
        reader=POSITIVE,
        metavar="GIB",
        help="GiB of one host (default: not compared)",
    )
    add("--peak_tflops", reader=POSITIVE, help="dense 16-bit peak of a card the table lacks")
    add("--memory_bandwidth", reader=POSITIVE, metavar="GB/S", help="GB/s of such a card's memory")
    add(
        "--interconnect",
        reader=POSITIVE,
        metavar="GB/S",
        help="GB/s that one host sends to the others (default: of the vendor's server of the card)",
    )
    add("-l", "--max_length", reader=integer(2), help="tokens per row (default: at most 4096)")
    add("-x", "--mixed_precision", choices=PRECISIONS, help="default: bf16, fp16 without it")
    add("-p", "--plugin", choices=PLUGINS, help="this plugin only")
    add("-b", "--batch_size", reader=one, help="this batch only (default: the largest that fits)")
    add("--tp", reader=one, help="this tensor parallelism only")
    add("--pp", reader=one, help="this pipeline only")
    add("-g", "--gradient_checkpoint", action="store_true", help="--recompute full")
    add("--recompute", choices=("none", "selective", "full"), help="this way only")
    add("--tokens", reader=TOKENS, help="tokens of the run, to count hours for (default 1b)")
    add(
        "--global_batch_tokens",
        reader=TOKENS,
        help="tokens of a step, at most (default by the model's size: 0.5 Mi to 4 Mi)",
    )
    return parser


def _typed(reader: Reader) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return reader.read(text)
        except ValueError:
            message = f"got {text!r}, expected {reader.expected}"
            raise argparse.ArgumentTypeError(message) from None

    return read


def _machines(asked: argparse.Namespace) -> Machines:
    """The hosts that are asked about; fills in `asked.gpus`."""
    notes: list[str] = []
    gpu = _card(asked, notes)
    if asked.peak_tflops is not None:
        gpu = replace(gpu, tflops=asked.peak_tflops)
    if asked.memory_bandwidth is not None:
        gpu = replace(gpu, bandwidth=asked.memory_bandwidth)
    if gpu.tflops is None:
        raise UserError(unknown_gpu_message(gpu.name))
    if asked.gpus is None:
        here = host_gpu()
        if here is None:
            raise UserError("--gpus: there is no GPU here to count; say how many the run has.")
        asked.gpus = here.count
    if asked.gpus > asked.gpus_per_host and asked.gpus % asked.gpus_per_host:
        raise UserError(
            f"--gpus {asked.gpus} is no whole number of hosts of --gpus_per_host "
            f"{asked.gpus_per_host}; expected a multiple of it."
        )
    where = _hosts(asked, gpu, asked.gpus, tuple(notes))
    if where.network is None and where.spanning(asked.gpus) > 1:
        raise UserError(
            f"{asked.gpus} GPUs of {gpu.name} are on {where.spanning(asked.gpus)} hosts: give "
            "--interconnect, the GB/s that one host sends to the others (100 Gb/s are 12.5)."
        )
    return where


def _hosts(asked: argparse.Namespace, gpu: Gpu, gpus: int, notes: tuple[str, ...] = ()) -> Machines:
    """The hosts of so many GPUs."""
    per_host = min(gpus, asked.gpus_per_host)
    return machines(gpu, per_host, asked.gpu_memory, asked.interconnect, notes)


def _card(asked: argparse.Namespace, notes: list[str]) -> Gpu:
    if asked.gpu is not None:
        known = known_gpu(asked.gpu)
        if known is not None:
            return known
        if asked.peak_tflops is None or asked.gpu_memory is None:
            raise UserError(unknown_gpu_message(asked.gpu))
        return custom_gpu(asked.gpu, asked.gpu_memory, asked.peak_tflops, asked.memory_bandwidth)
    if asked.peak_tflops is not None and asked.gpu_memory is not None:
        name = f"GPU of {asked.gpu_memory:g} GiB"
        return custom_gpu(name, asked.gpu_memory, asked.peak_tflops, asked.memory_bandwidth)
    if asked.gpu_memory is None:
        here = host_gpu()
        if here is None:
            raise UserError(
                "there is no GPU here: say which cards the run has, with --gpu NAME (as h100) or "
                "--gpu_memory GiB."
            )
        return of_host(here)
    card = gpu_of_memory(asked.gpu_memory)
    if card is None:
        raise UserError(
            f"--gpu_memory {asked.gpu_memory:g}: no card of the table stands for it, so its speed "
            "is unknown; name the card with --gpu, or give --peak_tflops and --memory_bandwidth."
        )
    notes.append(
        f"no --gpu is given: speed and network are those of {card.name} (--gpu, --peak_tflops, "
        "--interconnect)"
    )
    return card


def _question(asked: argparse.Namespace, shape: Shape, where: Machines) -> Question:
    context = shape.max_position_embeddings
    length = asked.max_length or min(4096, context)
    known = peak_tflops(where.gpu.name, "fp16") is not None
    has_bf16 = peak_tflops(where.gpu.name, "bf16") is not None or not known
    precision = asked.mixed_precision or ("bf16" if has_bf16 else "fp16")
    problems = []
    if length > context:
        problems.append(
            f"--max_length {length} is more than the model's context of {context}; use at most "
            f"{context}."
        )
    if precision == "bf16" and not has_bf16:
        problems.append(f"-x bf16: {where.gpu.name} has no bf16 units; use -x fp16.")
    step_tokens = asked.global_batch_tokens or max(length, step_tokens_of(shape))
    if step_tokens < length:
        problems.append(f"--global_batch_tokens {step_tokens} is less than a row of {length}.")
    if asked.gradient_checkpoint and asked.recompute not in (None, "full"):
        problems.append(f"-g is --recompute full: got --recompute {asked.recompute} too.")
    if problems:
        raise UserError(problems)
    base = changed(
        Options(script="pretrain"),
        max_length=length,
        mixed_precision=precision,
        global_batch_tokens=step_tokens,
    )
    host_bytes = None if asked.host_memory is None else int(asked.host_memory * GIB)
    return Question(
        options=base,
        shape=shape,
        world_size=asked.gpus,
        machines=where,
        limit=limits(where, host_bytes),
        step_tokens=step_tokens,
        plugin=asked.plugin,
        tp=asked.tp,
        pp=asked.pp,
        batch_size=asked.batch_size,
        recompute="full" if asked.gradient_checkpoint else asked.recompute,
    )


def _step_lines(asked: argparse.Namespace, step_tokens: int) -> list[str]:
    """How long the steps are that plans are compared by, and what that does to the run."""
    why = "" if asked.global_batch_tokens else ", by the model's size"
    lines = [
        f"steps of {step_tokens:,} tokens, or as near as it comes out (--global_batch_tokens{why})"
    ]
    if asked.tokens is not None:
        warm_up = Options().training.warmup_steps
        lines += warm_up_lines(asked.tokens // step_tokens, warm_up, step_tokens)
    return lines


def _lines_of_best(best: Plan, question: Question, asked: argparse.Namespace) -> list[str]:
    rank = "not ranked by speed, first" if best.time is None else "best"
    return [
        f"{rank}: {best.job.layout.describe()}, --recompute {best.job.recompute}, "
        f"-b {best.job.batch_size}, {best.job.precision}, rows of {best.job.max_length}",
        *memory_lines(best.job, best.need, question.machines, question.limit),
        fits_line(best, question.limit),
        *time_lines(best, asked.tokens or TOKENS_SHOWN, question.machines),
    ]


def _ranking(plans: Sequence[Plan], question: Question, asked: argparse.Namespace) -> list[str]:
    shown = selection(plans, ROWS)
    return table(shown, asked.tokens or TOKENS_SHOWN, question.limit)


def _nothing_fits(nearest: Plan, question: Question, asked: argparse.Namespace) -> list[str]:
    """What comes nearest, what would make it fit, and how many GPUs would do."""
    limit, where = question.limit, question.machines
    lines = [
        f"nothing fits. Nearest: {nearest.job.layout.describe()}, --recompute "
        f"{nearest.job.recompute}, -b {nearest.job.batch_size}; it lacks "
        f"{megabytes(excess(nearest, limit))}.",
        *memory_lines(nearest.job, nearest.need, where, limit),
    ]
    free = replace(question, plugin=None, tp=None, pp=None, batch_size=None, recompute=None)
    if free != question and (others := search(free)) and others[0].fits:
        best = others[0]
        found = launch_command(
            best.options, asked.gpus, where.gpus_per_host, ["-c", asked.config], ["-d", DATA]
        )
        return [*lines, f"without -p, -b, --tp, --pp and --recompute this fits:\n{found}"]
    if advice := cheaper(nearest.job, limit.device, nearest.options, where, limit.host):
        lines += ["what would save memory:", *advice_lines(advice)]
    for times in _MORE_GPUS:
        number = asked.gpus * times
        if number > asked.gpus_per_host and number % asked.gpus_per_host:
            continue
        hosts = _hosts(asked, where.gpu, number)
        if hosts.network is None and hosts.spanning(number) > 1:
            break
        others = search(replace(free, world_size=number, machines=hosts))
        if others and others[0].fits:
            lines.append(f"{number} such GPUs would do: {others[0].job.layout.describe()}")
            break
    return lines + ["a shorter -l saves activations in proportion."]

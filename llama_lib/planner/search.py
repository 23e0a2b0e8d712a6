"""Which layouts fit, with which batch, and which is fastest.

Invariant: what is offered has passed the checks that the training scripts make of a layout, so no
command of a plan is refused by the program it is for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llama_lib.config import PLUGINS, Options
from llama_lib.errors import UserError
from llama_lib.layout import (
    BatchPlan,
    divisors,
    layout_of,
    layout_problems,
    plan_batches,
)
from llama_lib.models import Shape
from llama_lib.option_checks import UNLIMITED_ROWS, compile_problems, recompute_problems
from llama_lib.planner.hardware import GIB, Machines
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import Memory, memory
from llama_lib.planner.roofline import StepTime, optimizer_on_host, step_time

# Memory of a GPU that no tensor can have: the CUDA context with its libraries, NCCL's buffers and
# what the allocator loses between blocks. Chosen, not measured: 1 GiB and 4% of the card.
RESERVED_BYTES = GIB
RESERVED_SHARE = 0.04

# Tokens of a step that layouts are compared at: the batch of LLaMA (arXiv 2302.13971, table 2).
STEP_TOKENS = 2**22

# Share of those tokens that a batch has to reach by accumulation: 127 rows are not made of 70.
NEARLY = 0.95

# Rows of a pipeline's micro-batch that are tried: more of them leave the pipeline emptier.
_MICROBATCHES = (1, 2, 4, 8)
_RECOMPUTE = ("none", "selective", "full")
# Shares of (optimizer, weights) in host memory that are tried under gemini.
_OFFLOADS = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 1.0))
# A batch no search goes beyond where nothing else bounds it.
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Limits:
    """Bytes that the tensors of one GPU, and of one host, may take; None: not known."""

    device: int
    host: int | None
    shared: bool = False


def limits(machines: Machines, host_bytes: int | None) -> Limits:
    """What `machines` have for tensors.

    Args:
        host_bytes: memory of one host.
    """
    if machines.shared_memory:
        return Limits(machines.capacity, None, shared=True)
    device = int(machines.capacity * (1 - RESERVED_SHARE)) - RESERVED_BYTES
    return Limits(max(0, device), host_bytes)


def fits(job: Job, need: Memory, limit: Limits) -> bool:
    """Whether tensors of these sizes have room on GPU and host."""
    return lacking(job, need, limit) == 0


def lacking(job: Job, need: Memory, limit: Limits) -> int:
    """Bytes that a GPU and a host lack together."""
    if limit.shared:
        return max(0, shared_bytes(job, need) - limit.device)
    moved = evicted(need, limit)
    lacks = max(0, need.device_total - moved - limit.device)
    if limit.host is not None:
        lacks += max(0, need.host_total + _processes(job) * moved - limit.host)
    return lacks


def evicted(need: Memory, limit: Limits) -> int:
    """Bytes of weights that gemini_auto moves from a GPU to the host for want of room."""
    if limit.shared:
        return 0
    return min(need.evictable, max(0, need.device_total - limit.device))


def shared_bytes(job: Job, need: Memory) -> int:
    """Bytes of one host whose processes compute on its CPUs: nothing is copied to be pinned."""
    pinned = need.host.get("buffers", 0)
    return need.device_total * _processes(job) + need.host_total - pinned


def _processes(job: Job) -> int:
    return min(job.gpus_per_host, job.layout.world_size)


@dataclass(frozen=True)
class Plan:
    """One way to run: its options, what it takes, and whether that is there."""

    options: Options
    job: Job
    need: Memory
    time: StepTime | None
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        return 0.0 if self.time is None else self.time.tokens_per_second


def plan_of(
    options: Options, shape: Shape, world_size: int, machines: Machines, limit: Limits
) -> Plan:
    """The plan of options that `refusals` has nothing against."""
    job = job_of(options, shape, world_size, machines.gpus_per_host)
    need = memory(job)
    time = step_time(job, machines, evicted(need, limit))
    return Plan(options, job, need, time, fits(job, need, limit))


def refusals(options: Options, shape: Any, world_size: int) -> list[str]:
    """What the training scripts would say against layout and batch, on GPUs or without."""
    layout = layout_of(options, world_size)
    problems = layout_problems(options, world_size, shape)
    problems += recompute_problems(options, layout, has_gpu=True)
    problems += compile_problems(options, layout, has_gpu=True)
    context = shape.max_position_embeddings
    if options.model.max_length > context and "max_length" in options.typed:
        problems.append(
            f"--max_length {options.model.max_length} is more than the model's context of "
            f"{context}; use at most {context}."
        )
    if problems:
        return problems
    try:
        _batches(options, world_size)
    except UserError as error:
        return error.problems
    return []


def _batches(options: Options, world_size: int) -> BatchPlan:
    layout = layout_of(options, world_size)
    return plan_batches(options, layout, options.model.max_length, UNLIMITED_ROWS)


def changed(options: Options, **values: Any) -> Options:
    """A copy of the options with some of them, by name, set as if they had been typed."""
    copies = {name: replace(getattr(options, name)) for name in ("model", "parallel", "training")}
    for name, value in values.items():
        section = next(part for part in copies.values() if hasattr(part, name))
        setattr(section, name, value)
    return replace(options, **copies, typed=options.typed | frozenset(values))


def with_recompute(options: Options, mode: str) -> Options:
    """-g for full, as the upstream scripts call it."""
    return changed(
        options,
        gradient_checkpoint=mode == "full",
        recompute="none" if mode == "full" else mode,
    )


def largest(accepts: Callable[[int], bool], limit: int) -> int:
    """The largest number of 1 to `limit` that is accepted, all below it being so too; 0: none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if accepts(middle):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Question:
    """What is searched.

    Attributes:
        options: model, row length, precision and everything else that stays.
        step_tokens: tokens of an optimizer step, reached by accumulation as nearly as possible.
        plugin, tp, pp, batch_size, recompute: fixed where given.
    """

    options: Options
    shape: Shape
    world_size: int
    machines: Machines
    limit: Limits
    step_tokens: int = STEP_TOKENS
    plugin: str | None = None
    tp: int | None = None
    pp: int | None = None
    batch_size: int | None = None
    recompute: str | None = None


def largest_batch(options: Options, asked: Question) -> int:
    """Rows of the largest --batch_size that fits with these options; 0: not even one row.

    In a pipeline memory goes by the micro-batch: the batch is then as large as a step may be.
    """
    layout = layout_of(options, asked.world_size)
    most = max(1, min(_MOST_ROWS, asked.step_tokens // (options.model.max_length * layout.dp)))

    def accepts(rows: int) -> bool:
        tried = changed(options, batch_size=rows, accumulation_steps=1, global_batch_tokens=None)
        job = job_of(tried, asked.shape, asked.world_size, asked.machines.gpus_per_host)
        return fits(job, memory(job), asked.limit)

    if layout.pp == 1:
        return largest(accepts, most)
    micro = options.parallel.microbatch_size or 1
    rows = max(layout.pp, most // micro) * micro
    return rows if accepts(rows) else 0


def search(asked: Question) -> list[Plan]:
    """The best plan of every plugin, layout and way of recomputing, fastest first.

    Those that do not fit come last, each with its smallest batch, the nearest to fitting first.
    """
    found: list[Plan] = []
    too_large: set[Any] = set()
    for options in _candidates(asked):
        parallel = replace(options.parallel, microbatch_size=None)
        kind = (*vars(parallel).values(), options.recompute)
        if kind in too_large:
            continue  # a smaller micro-batch did not fit
        plan = _best_batch(options, asked)
        if plan is None:
            continue
        found.append(plan)
        if not plan.fits:
            too_large.add(kind)
    return sorted(found, key=lambda plan: _rank(plan, asked.limit))


def _rank(plan: Plan, limit: Limits) -> tuple[float, ...]:
    if not plan.fits:
        return 1, excess(plan, limit)
    moved = optimizer_on_host(plan.job)
    if plan.time is None:
        # Without a speed: what computes least again and moves least comes first.
        return 0, _RECOMPUTE.index(plan.job.recompute), moved, plan.need.device_total
    # A time that leaves something out is no promise: it comes after those that leave out less. Of
    # rates that three digits do not tell apart the one that leaves more memory comes first.
    rate = float(f"{plan.tokens_per_second:.3g}")
    return 0, len(plan.time.unknown), -rate, moved, plan.need.device_total


def excess(plan: Plan, limit: Limits) -> int:
    """Bytes that a GPU and a host lack together."""
    return lacking(plan.job, plan.need, limit)


def _candidates(asked: Question) -> Iterator[Options]:
    """Options of every layout that is not refused, without a batch yet."""
    world, shape = asked.world_size, asked.shape
    for plugin in PLUGINS:
        if asked.plugin not in (None, plugin):
            continue
        if plugin != "hybrid_parallel" and (asked.tp or 1) * (asked.pp or 1) > 1:
            continue
        for layout in _layouts(plugin, asked):
            for mode in _RECOMPUTE if asked.recompute is None else (asked.recompute,):
                options = with_recompute(changed(asked.options, plugin=plugin, **layout), mode)
                rows = layout.get("microbatch_size") or 1
                least = rows * max(1, layout.get("pp", 1))
                tried = changed(
                    options,
                    batch_size=asked.batch_size or least,
                    accumulation_steps=1,
                    global_batch_tokens=None,
                )
                if not refusals(tried, shape, world):
                    yield tried


def _layouts(plugin: str, asked: Question) -> Iterator[dict[str, Any]]:
    if plugin == "gemini":
        for optimizer, weights in _OFFLOADS:
            yield {"offload_optim_frac": optimizer, "offload_param_frac": weights}
    elif plugin != "hybrid_parallel":
        yield {}
    else:
        # A tensor group communicates in every layer: it stays within a host.
        together = min(asked.machines.gpus_per_host, asked.world_size)
        for tp in divisors(together) if asked.tp is None else [asked.tp]:
            # Stages of equal length: the others would wait for the longest.
            layers = divisors(asked.shape.num_hidden_layers)
            rest = [pp for pp in divisors(asked.world_size // tp) if pp in layers]
            for pp in rest if asked.pp is None else [asked.pp]:
                replicas = asked.world_size // (tp * pp)
                # The stage that layout_of chooses by itself is left to it.
                own = int(replicas > 1 and asked.options.training.mixed_precision != "fp32")
                for stage in (0, 1, 2) if replicas > 1 else (0,):
                    sizes = {"tp": tp, "pp": pp, "zero_stage": None if stage == own else stage}
                    if pp == 1:
                        yield sizes
                        continue
                    if stage == 2:
                        continue  # refused with a pipeline
                    for rows in _MICROBATCHES:
                        yield sizes | {"microbatch_size": rows}


def _best_batch(options: Options, asked: Question) -> Plan | None:
    """These options with the largest batch that fits, accumulated to a step; None: refused."""
    layout = layout_of(options, asked.world_size)
    in_step = max(1, asked.step_tokens // (layout.dp * options.model.max_length))
    rows = options.training.batch_size
    if asked.batch_size is None:
        rows = max(rows, largest_batch(options, asked))
        if layout.pp == 1:
            rows = _even(rows, in_step)
    options = changed(options, batch_size=rows, accumulation_steps=max(1, in_step // rows))
    if refusals(options, asked.shape, asked.world_size):
        return None
    return plan_of(options, asked.shape, asked.world_size, asked.machines, asked.limit)


def _even(most: int, in_step: int) -> int:
    """The largest batch of at most `most` rows that makes up nearly all rows of a step."""
    for rows in range(most, 0, -1):
        if in_step // rows * rows >= NEARLY * in_step:
            return rows
    return most


def flags(options: Options, world_size: int) -> list[str]:
    """The words of a command line that say what a plan chose."""
    parallel, training = options.parallel, options.training
    words = ["-p", parallel.plugin]
    for name in ("tp", "pp"):
        if getattr(parallel, name) > 1:
            words += [f"--{name}", str(getattr(parallel, name))]
    if parallel.sp_mode is not None:
        words += ["--sp", str(parallel.sp), "--sp_mode", parallel.sp_mode]
    if parallel.pp_style != "1f1b":
        words += ["--pp_style", parallel.pp_style]
        words += ["--num_model_chunks", str(parallel.num_model_chunks)]
    if parallel.zero_stage is not None:
        words += ["--zero_stage", str(parallel.zero_stage)]
    words += ["-b", str(training.batch_size)]
    if parallel.microbatch_size is not None:
        words += ["--microbatch_size", str(parallel.microbatch_size)]
    if training.global_batch_tokens is not None:
        words += ["--global_batch_tokens", str(training.global_batch_tokens)]
    elif training.accumulation_steps > 1:
        words += ["--accumulation_steps", str(training.accumulation_steps)]
    words += ["-l", str(options.model.max_length), "-x", training.mixed_precision]
    if options.recompute == "full":
        words.append("-g")
    elif options.recompute != "none":
        words += ["--recompute", options.recompute]
    if not options.model.chunked_loss:
        words.append("--no-chunked_loss")
    for name in ("offload_optim_frac", "offload_param_frac"):
        if getattr(parallel, name):
            words += [f"--{name}", str(getattr(parallel, name))]
    return words


def launch_command(
    options: Options, world_size: int, gpus_per_host: int, before: list[str], after: list[str]
) -> str:
    """How to start a plan: alone, on one host, or on several by a host file.

    Args:
        before, after: words of the script's command line before and after what the plan chose.
    """
    if world_size == 1:
        start = ["python"]
    elif world_size <= gpus_per_host:
        start = ["torchrun", "--standalone", "--nproc_per_node", str(world_size)]
    else:
        start = ["colossalai", "run", "--nproc_per_node", str(gpus_per_host)]
        start += ["--hostfile", "YOUR_HOST_FILE"]
    return " ".join([*start, f"{options.script}.py", *before, *flags(options, world_size), *after])

"""Which layouts fit, with which batch, and which is fastest.

Invariant: what is offered has passed the checks that the training scripts make of a layout, so no
command of a plan is refused by the program it is for.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llama_lib.config import Options
from llama_lib.flops import num_parameters
from llama_lib.layout import divisors, layout_of
from llama_lib.models import Shape
from llama_lib.option_checks import (
    compile_problems,
    model_problems,
    recompute_problems,
    setting_problems,
)
from llama_lib.option_tree import PLUGINS
from llama_lib.planner.hardware import GIB, Machines
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import Memory, memory, offloaded_share
from llama_lib.planner.roofline import StepTime, step_time

# Memory of a GPU that no tensor can have: the CUDA context with its libraries, NCCL's buffers and
# what the allocator loses between blocks. Chosen, not measured: 1 GiB and 4% of the card.
RESERVED_BYTES = GIB
RESERVED_SHARE = 0.04

# Tokens of a step by the model's parameters, up to so many; beyond them the batch of LLaMA (4 Mi,
# arXiv 2302.13971, table 2). Chosen: a small model is trained on fewer tokens, in enough steps. The
# models called 13B have 13.02e9 parameters.
_STEP_TOKENS = ((2e9, 2**19), (14e9, 2**20))
_MOST_STEP_TOKENS = 2**22

# Predicted rates that differ by less count as equal: predictions are not better than that.
EQUAL_RATES = 0.05
# A run that needs more than this share of the room may not get it: fragments, longer collectives.
# Chosen.
COMFORTABLE = 0.95

# Share of those tokens that a batch has to reach by accumulation: 127 rows are not made of 70.
NEARLY = 0.95

# Rows of a pipeline's micro-batch that are tried: more of them leave the pipeline emptier.
_MICROBATCHES = (1, 2, 4, 8)
_RECOMPUTE = ("none", "selective", "full")
# Shares of (optimizer, weights) in host memory that are tried under gemini.
_OFFLOADS = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 1.0))
# What an option of the one plugin, layout or schedule is elsewhere.
_OF_A_PLUGIN: dict[str, Any] = {
    "tp": 1,
    "pp": 1,
    "pp_style": "1f1b",
    "num_model_chunks": 1,
    "microbatch_size": None,
    "zero_stage": None,
    "offload_optim_frac": 0.0,
    "offload_param_frac": 0.0,
}
# A batch no search goes beyond where nothing else bounds it.
MOST_ROWS = 4096


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
        lacks += max(0, need.host_total + job.processes_per_host * moved - limit.host)
    return lacks


def evicted(need: Memory, limit: Limits) -> int:
    """Bytes of weights that gemini_auto moves from a GPU to the host for want of room."""
    if limit.shared:
        return 0
    return min(need.evictable, max(0, need.device_total - limit.device))


def shared_bytes(job: Job, need: Memory) -> int:
    """Bytes of one host whose processes compute on its CPUs: nothing is copied to be pinned."""
    pinned = need.host.get("buffers", 0)
    return need.device_total * job.processes_per_host + need.host_total - pinned


def is_tight(job: Job, need: Memory, limit: Limits) -> bool:
    """Whether tensors of these sizes take nearly all the room, or more than all of it."""
    return lacking(job, need, replace(limit, device=int(COMFORTABLE * limit.device))) > 0


@dataclass(frozen=True)
class Plan:
    """One way to run: its options, what it takes, and whether that is there."""

    options: Options
    job: Job
    need: Memory
    time: StepTime | None
    fits: bool
    tight: bool

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
    return Plan(options, job, need, time, fits(job, need, limit), is_tight(job, need, limit))


def step_tokens_of(shape: Shape) -> int:
    """Tokens of an optimizer step where nobody says how many."""
    count = num_parameters(shape)
    return next((tokens for most, tokens in _STEP_TOKENS if count < most), _MOST_STEP_TOKENS)


def refusals(options: Options, shape: Any, world_size: int, has_gpu: bool = True) -> list[str]:
    """What the training scripts would say against these options.

    Args:
        has_gpu: whether the run computes on GPUs.
    """
    layout = layout_of(options, world_size)
    problems = setting_problems(options, has_gpu) + model_problems(options, shape, world_size)
    problems += recompute_problems(options, layout, has_gpu)
    return problems + compile_problems(options, layout, has_gpu)


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


def largest(accepts: Callable[[int], bool], limit: int, above: int = 0) -> int:
    """The largest number over `above`, of at most `limit`, that is accepted, all of them below it
    being so too; `above`: none."""
    low, high = above, limit
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
        step_tokens: tokens of an optimizer step, reached by accumulation as nearly as possible;
            plans say it as --global_batch_tokens where `options` do, else as --accumulation_steps.
        plugin, tp, pp, batch_size, recompute: fixed where given.
    """

    options: Options
    shape: Shape
    world_size: int
    machines: Machines
    limit: Limits
    step_tokens: int
    plugin: str | None = None
    tp: int | None = None
    pp: int | None = None
    batch_size: int | None = None
    recompute: str | None = None


def largest_batch(job: Job, limit: Limits) -> int:
    """Rows of the largest --batch_size that fits, everything else, accumulation too, being this
    job's; 0: not even one row. Not for pipelines, whose memory goes by the micro-batch."""
    return largest(lambda rows: _rows_fit(job, rows, job.accumulation, limit), MOST_ROWS)


def _rows_fit(job: Job, rows: int, accumulation: int, limit: Limits) -> bool:
    tried = replace(job, batch_size=rows, microbatch_size=rows, accumulation=accumulation)
    return fits(tried, memory(tried), limit)


def search(asked: Question) -> list[Plan]:
    """The best plans of every plugin, layout and way of recomputing, as `ranked` orders them."""
    found: list[Plan] = []
    too_large: set[Any] = set()
    for options in _candidates(asked):
        parallel = replace(options.parallel, microbatch_size=None)
        kind = (*vars(parallel).values(), options.recompute)
        if kind in too_large:
            continue  # a smaller micro-batch did not fit
        plans = _best_batches(options, asked)
        found += plans
        if plans and not plans[0].fits:
            too_large.add(kind)
    return ranked(found, asked.limit)


def ranked(plans: Iterable[Plan], limit: Limits) -> list[Plan]:
    """The fastest plans first; those that do not fit last, the nearest to fitting before others.

    Rates within EQUAL_RATES of the fastest count as equal to it; then what can go wrong decides.
    """
    plans = list(plans)
    # A time that leaves something out is no promise: it comes after those that leave out less.
    left = sorted(
        (plan for plan in plans if plan.fits),
        key=lambda plan: (_left_out(plan), -plan.tokens_per_second),
    )
    order: list[Plan] = []
    while left:
        fastest = left[0]
        least = (1 - EQUAL_RATES) * fastest.tokens_per_second
        equal = [
            plan
            for plan in left
            if _left_out(plan) == _left_out(fastest) and plan.tokens_per_second >= least
        ]
        order += sorted(equal, key=_preference)
        left = left[len(equal) :]
    lacks = [plan for plan in plans if not plan.fits]
    return order + sorted(lacks, key=lambda plan: excess(plan, limit))


def _left_out(plan: Plan) -> int:
    return 0 if plan.time is None else len(plan.time.unknown)


def _preference(plan: Plan) -> tuple[float, ...]:
    """Order of plans that are equally fast, or of unknown speed."""
    # Without a speed: what computes least again comes first.
    again = 0 if plan.time is not None else _RECOMPUTE.index(plan.job.recompute)
    return (
        again,
        offloaded_share(plan.job),
        plan.tight,
        plan.job.layout.plugin != "zero2",
        plan.need.device_total,
    )


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
                # What belongs to one plugin would have the others refused.
                chosen = _OF_A_PLUGIN | layout
                options = with_recompute(changed(asked.options, plugin=plugin, **chosen), mode)
                rows = layout.get("microbatch_size") or 1
                least = rows * max(1, layout.get("pp", 1))
                tried = changed(
                    options,
                    batch_size=asked.batch_size or least,
                    accumulation_steps=1,
                    global_batch_tokens=None,
                )
                if not refusals(tried, shape, world, not asked.machines.shared_memory):
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
                # Alone, or sharing all but the weights, it is zero2 with more copies.
                is_zero2 = tp == pp == 1 and asked.plugin is None
                for stage in (0, 1, 2) if replicas > 1 else (0,):
                    if is_zero2 and (stage == 2 or replicas == 1):
                        continue
                    sizes = {"tp": tp, "pp": pp, "zero_stage": None if stage == own else stage}
                    if pp == 1:
                        yield sizes
                        continue
                    if stage == 2:
                        continue  # refused with a pipeline
                    for rows in _MICROBATCHES:
                        yield sizes | {"microbatch_size": rows}


def _best_batches(options: Options, asked: Question) -> list[Plan]:
    """These options with the largest batch that fits, accumulated to a step, and, if that leaves
    little room, with the largest that leaves some; nothing: refused."""
    plan = _with_batch(options, asked, asked.limit)
    if plan is None:
        return []
    if not (plan.fits and plan.tight) or asked.batch_size is not None or plan.job.layout.pp > 1:
        return [plan]
    room = replace(asked.limit, device=int(COMFORTABLE * asked.limit.device))
    smaller = _with_batch(options, asked, room)
    return [plan] if smaller is None or smaller.tight else [plan, smaller]


def _with_batch(options: Options, asked: Question, limit: Limits) -> Plan | None:
    """The plan with the largest batch that fits in `limit`; None: refused."""
    layout = layout_of(options, asked.world_size)
    of_a_row = layout.dp * options.model.max_length
    in_step = max(1, asked.step_tokens // of_a_row)
    rows = options.training.batch_size
    if asked.batch_size is None:
        rows = max(rows, _rows_of_a_step(options, asked, in_step, limit))
    steps = max(1, in_step // rows)
    in_tokens = asked.options.training.global_batch_tokens is not None
    options = changed(
        options,
        batch_size=rows,
        accumulation_steps=steps,
        global_batch_tokens=rows * steps * of_a_row if in_tokens else None,
    )
    has_gpu = not asked.machines.shared_memory
    if refusals(options, asked.shape, asked.world_size, has_gpu):
        return None
    return plan_of(options, asked.shape, asked.world_size, asked.machines, asked.limit)


def _rows_of_a_step(options: Options, asked: Question, in_step: int, limit: Limits) -> int:
    """Rows of the largest batch that fits and of which a whole number is nearly the rows of a
    step; 0: not even one row fits.

    Gradients of earlier micro-steps need room, so a step of one is tried first. In a pipeline
    memory goes by the micro-batch: the batch is then as large as a step may be.
    """
    job = job_of(options, asked.shape, asked.world_size, asked.machines.gpus_per_host)
    if job.layout.pp > 1:
        stages = job.layout.pp
        return max(stages, in_step // job.microbatch_size) * job.microbatch_size
    least = math.ceil(NEARLY * in_step)
    most = min(MOST_ROWS, in_step)
    if least <= most:
        rows = largest(lambda rows: _rows_fit(job, rows, 1, limit), most, above=least - 1)
        if rows >= least:
            return rows
    # Two stand for any number above one.
    half = min(MOST_ROWS, in_step // 2)
    return _even(largest(lambda rows: _rows_fit(job, rows, 2, limit), half), in_step)


def _even(most: int, in_step: int) -> int:
    """The largest batch of at most `most` rows that makes up nearly all rows of a step."""
    for rows in range(most, 0, -1):
        if in_step // rows * rows >= NEARLY * in_step:
            return rows
    return most

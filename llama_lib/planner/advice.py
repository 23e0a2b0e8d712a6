"""What to change when memory does not suffice, the cheapest change first.

Invariant: a change that is proposed passes the checks of the training scripts and needs less
memory where it lacks; none of them changes what is learnt but by rounding.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_lib.config import Options
from llama_lib.errors import UserError
from llama_lib.layout import divisors
from llama_lib.option_tree import ModelOptions, ParallelOptions, TrainingOptions
from llama_lib.planner.hardware import Machines, host_gpu, machines, of_host
from llama_lib.planner.job import Job, job_of
from llama_lib.planner.memory import Memory, memory
from llama_lib.planner.report import megabytes
from llama_lib.planner.roofline import step_time
from llama_lib.planner.search import (
    Limits,
    changed,
    evicted,
    lacking,
    limits,
    refusals,
    shared_bytes,
    with_recompute,
)

SHOWN = 3


@dataclass(frozen=True)
class Advice:
    """One change.

    Attributes:
        change: what to add to, or put in place on, the command line.
        saved: bytes of one GPU that it frees.
        price: what it costs, in words, and the predicted step time where that is known.
        suffices: whether the run then fits by the plan.
        slowdown: predicted seconds of the changed step over those of the step now; None: unknown.
        options: the command line with the change.
    """

    change: str
    saved: int
    price: str
    suffices: bool
    slowdown: float | None
    options: Options


def options_of(job: Job) -> Options:
    """Options that make this job, for callers that have none."""
    layout, shape = job.layout, job.shape
    hybrid = layout.plugin == "hybrid_parallel"
    model = ModelOptions(
        max_length=job.max_length,
        gradient_checkpoint=job.recompute == "full",
        recompute="none" if job.recompute == "full" else job.recompute,
        chunked_loss=job.chunked_loss,
    )
    if job.lora_parameters:
        # All linear layers of a block have adapters: the rank follows from their number.
        model.lora_rank = 1
        options = Options(model=model)
        one = job_of(options, shape, 1, 1).lora_parameters
        model.lora_rank = max(1, round(job.lora_parameters / one))
    parallel = ParallelOptions(
        plugin=layout.plugin,
        tp=layout.tp,
        pp=layout.pp,
        sp=layout.sequence_axis,
        sp_mode=layout.sp_mode,
        zero_stage=layout.zero_stage if hybrid else None,
        pp_style="1f1b" if job.model_chunks == 1 else "interleaved",
        num_model_chunks=job.model_chunks,
        microbatch_size=job.microbatch_size if layout.pp > 1 else None,
        offload_optim_frac=job.offload_optim_frac,
        offload_param_frac=job.offload_param_frac,
    )
    training = TrainingOptions(
        batch_size=job.batch_size,
        accumulation_steps=job.accumulation,
        mixed_precision=job.precision,
    )
    typed = frozenset({"max_length", "mixed_precision"})
    return Options(model=model, parallel=parallel, training=training, typed=typed)


def change_words(before: Options, after: Options) -> str:
    """What has to follow on the command line of `before` to make `after` of it.

    A flag that comes again holds, and what the two have in common is not said.
    """
    words = []
    for section in ("parallel", "training", "model"):
        old, new = asdict(getattr(before, section)), asdict(getattr(after, section))
        for name, value in new.items():
            if value == old[name] or name in ("gradient_checkpoint", "recompute"):
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words.append(f"{_SHORT.get(name, f'--{name}')} {_word(value)}")
    if before.recompute != after.recompute:
        # -g and --recompute do not go together on one command line.
        given = before.model.recompute != "none" or "recompute" in before.typed
        full = after.recompute == "full" and not given
        words.append("-g" if full else f"--recompute {after.recompute}")
    return " ".join(words)


_SHORT = {"plugin": "-p", "batch_size": "-b"}


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _in_steps(options: Options, accumulation: int, **values: Any) -> Options:
    """The options with so many micro-steps; --global_batch_tokens, if given, makes them by itself
    and stays."""
    if options.training.global_batch_tokens is None:
        values["accumulation_steps"] = accumulation
    return changed(options, **values)


def _changes(options: Options, job: Job, shared: bool) -> Iterator[tuple[str, Options]]:
    """(price in words, options) of every change there is; not all of them are legal.

    Args:
        shared: the processes are on CPUs, where there is no other memory to move things to.
    """
    layout, model = job.layout, options.model
    if not model.chunked_loss:
        yield "none to speak of", changed(options, chunked_loss=True)
    if not job.flash and job.accumulation % layout.sequence_axis == 0:
        yield (
            "rows are no longer split, scores no longer kept",
            _in_steps(options, job.accumulation // layout.sequence_axis, sp_mode=None, sp=1),
        )
    if job.recompute == "none":
        yield "norms, rotary and SwiGLU once more", with_recompute(options, "selective")
    if job.recompute != "full":
        yield (
            "the layers' forward pass once more, a third more arithmetic",
            with_recompute(options, "full"),
        )
    yield from _smaller_batches(options, job)
    yield from _other_plugins(options, job, shared)
    if layout.plugin == "gemini" and not shared:
        yield from _more_on_the_host(options, job)
    if options.parallel.sp_mode is None and not job.lora_parameters:
        yield from _larger_groups(options, job, shared)


def _more_on_the_host(options: Options, job: Job) -> Iterator[tuple[str, Options]]:
    for share in (0.5, 1.0):
        if job.offload_optim_frac < share:
            yield (
                "the host updates part of the weights, gradients and weights cross PCI Express",
                changed(options, offload_optim_frac=share),
            )
    if job.offload_param_frac < 1:
        yield (
            "the host updates all weights, which cross PCI Express in every pass",
            changed(options, offload_optim_frac=1.0, offload_param_frac=1.0),
        )


def _larger_groups(options: Options, job: Job, shared: bool) -> Iterator[tuple[str, Options]]:
    """More processes to one replica: tensor parallelism, stages, or gemini instead of both."""
    layout = job.layout
    on_device = {"offload_optim_frac": 0.0, "offload_param_frac": 0.0}
    # A tensor group communicates in every layer: it stays within a host.
    for tp in divisors(min(job.gpus_per_host, layout.world_size)):
        # Fewer replicas take as many more micro-steps for the same global batch.
        if tp > layout.tp and job.accumulation * tp % layout.tp == 0:
            yield (
                f"{layout.world_size // tp // layout.pp} replica(s) instead of {layout.dp}, two "
                "all-reduces a layer in each pass",
                _in_steps(
                    options,
                    job.accumulation * tp // layout.tp,
                    plugin="hybrid_parallel",
                    tp=tp,
                    **on_device,
                ),
            )
    if layout.plugin != "hybrid_parallel":
        return
    # Stage 2 is refused with a pipeline.
    stage = None if options.parallel.zero_stage == 2 else options.parallel.zero_stage
    for pp in divisors(job.shape.num_hidden_layers):
        if pp > layout.pp and job.accumulation * pp % layout.pp == 0:
            yield (
                f"{layout.world_size // layout.tp // pp} replica(s) instead of {layout.dp}, "
                "stages wait at the ends of a step",
                _in_steps(options, job.accumulation * pp // layout.pp, pp=pp, zero_stage=stage),
            )
    # The same rows in a step, one at a time: gemini has as many replicas as processes.
    steps, rest = divmod(job.tokens_per_step, job.max_length * layout.world_size)
    if rest:
        return
    for share in (0.0,) if shared else (0.0, 1.0):
        price = "; the host updates the weights" if share else ""
        yield (
            f"weights are gathered in every pass{price}",
            _in_steps(
                options,
                steps,
                plugin="gemini",
                tp=1,
                pp=1,
                pp_style="1f1b",
                num_model_chunks=1,
                microbatch_size=None,
                zero_stage=None,
                batch_size=1,
                offload_optim_frac=share,
            ),
        )


def _smaller_batches(options: Options, job: Job) -> Iterator[tuple[str, Options]]:
    """Fewer rows at a time with as many more micro-steps: the same global batch."""
    if job.layout.pp > 1:
        for rows in divisors(job.microbatch_size)[:-1]:
            yield "smaller products, more of them", changed(options, microbatch_size=rows)
        return
    for rows in divisors(job.batch_size)[:-1]:
        steps = job.accumulation * job.batch_size // rows
        yield (
            "the same global batch in smaller pieces",
            _in_steps(options, steps, batch_size=rows),
        )


def _other_plugins(options: Options, job: Job, shared: bool) -> Iterator[tuple[str, Options]]:
    plugin = job.layout.plugin
    if plugin == "zero2" and not shared:
        yield (
            "the host updates the weights, gradients and weights cross PCI Express",
            changed(options, plugin="zero2_cpu"),
        )
    if plugin.startswith("zero2") and not job.lora_parameters:
        yield "weights are gathered in every pass", changed(options, plugin="gemini")
    if plugin == "gemini" and not shared:
        yield (
            "the host updates the weights; weights move there as memory demands",
            changed(options, plugin="gemini_auto", offload_optim_frac=0.0, offload_param_frac=0.0),
        )


def cheaper(
    job: Job,
    device_bytes: int,
    options: Options | None = None,
    where: Machines | None = None,
    host_bytes: int | None = None,
) -> list[Advice]:
    """The cheapest changes with which the run fits by the plan, cheapest first, at most three.

    Where fewer than three suffice, those follow that save most.

    Args:
        device_bytes: what the tensors of one GPU may take (CPU processes: those of the host).
        options: the run's; None: made from the job.
        where: the machines, to predict times; None: prices are in words, the order is by them.
        host_bytes: what the tensors of one host may take; None: not known.
    """
    base = options_of(job) if options is None else options
    limit = Limits(device_bytes, host_bytes, where is not None and where.shared_memory)
    need = memory(job)
    now = None if where is None else step_time(job, where)
    found = []
    world = job.layout.world_size
    for order, (price, tried) in enumerate(_changes(base, job, limit.shared)):
        if refusals(tried, job.shape, world, has_gpu=not limit.shared):
            continue
        try:
            other = job_of(tried, job.shape, world, job.gpus_per_host)
        except UserError:
            continue
        then = memory(other)
        saved = _size(job, need, limit) - _size(other, then, limit)
        lacks = lacking(other, then, limit)
        if saved <= 0 and lacks >= lacking(job, need, limit):
            continue
        slowdown = None
        if now is not None and where is not None:
            time = step_time(other, where, evicted(then, limit))
            if time is not None:
                slowdown = now.tokens_per_second / time.tokens_per_second
                price += f"; predicted time per token {slowdown - 1:+.0%}"
        change = change_words(base, tried)
        found.append((Advice(change, saved, price, lacks == 0, slowdown, tried), order))
    enough = [pair for pair in found if pair[0].suffices]
    # Below a percent a prediction says nothing; then the order of the changes decides.
    enough.sort(key=lambda pair: (round(pair[0].slowdown or 0.0, 2), pair[1]))
    others = [pair for pair in found if not pair[0].suffices]
    others.sort(key=lambda pair: -pair[0].saved)
    return _one_of_a_kind([advice for advice, _ in enough + others])[:SHOWN]


def _size(job: Job, need: Memory, limit: Limits) -> int:
    if limit.shared:
        return shared_bytes(job, need)
    return need.device_total - evicted(need, limit)


def _one_of_a_kind(found: list[Advice]) -> list[Advice]:
    """Of changes to the same thing, as two batch sizes, the first."""
    kinds: dict[str, Advice] = {}
    for advice in found:
        words = advice.change.split()
        kind = " ".join(words[:2]) if words[0] == "-p" else words[0]
        kinds.setdefault(kind, advice)
    return list(kinds.values())


def advice_lines(found: list[Advice]) -> list[str]:
    """One line for each change, numbered."""
    lines = []
    for number, advice in enumerate(found, 1):
        enough = "" if advice.suffices else "; not enough alone"
        lines.append(
            f"  {number}) {advice.change}: saves {megabytes(advice.saved)}{enough}; price: "
            f"{advice.price}"
        )
    return lines


def offload_warning(job: Job) -> str | None:
    """A line where memory is moved to the host while activations, which never are, outweigh it."""
    need = memory(job).device
    activations = need.get("activations", 0) + need.get("logits", 0)
    moved = job.offload_optim_frac > 0 or job.layout.plugin in ("zero2_cpu", "gemini_auto")
    if not moved or job.recompute == "full" or 2 * activations < sum(need.values()):
        return None
    return (
        f"offloading moves weights and optimizer state only; activations and logits take "
        f"{megabytes(activations)} of {megabytes(sum(need.values()))}: add -g"
    )


def needless_offload(job: Job, limit: Limits, options: Options, where: Machines) -> str | None:
    """A line where the run moves to the host what would fit on the GPU."""
    plugin = job.layout.plugin
    if plugin in ("zero2_cpu", "gemini_auto"):
        change = "-p zero2" if plugin == "zero2_cpu" else "-p gemini"
        tried = changed(options, plugin=change.split()[1])
    elif job.offload_optim_frac:
        change = "--offload_optim_frac 0"
        tried = changed(options, offload_optim_frac=0.0, offload_param_frac=0.0)
    else:
        return None
    other = job_of(tried, job.shape, job.layout.world_size, job.gpus_per_host)
    need = memory(other)
    if limit.shared or lacking(other, need, limit):
        return None
    spare = megabytes(limit.device - need.device_total)
    line = f"offloading is not needed: {change} fits too, with {spare} to spare"
    now, then = step_time(job, where), step_time(other, where)
    if now is None or then is None:
        return line
    return f"{line}; predicted step {then.seconds / now.seconds - 1:+.0%}"


def out_of_memory_text(
    job: Job,
    peak_bytes: int | None,
    capacity: int,
    options: Options | None = None,
    where: Machines | None = None,
) -> str:
    """What to say of a run that ran out of memory: plan and peak by kind, and what to change.

    Args:
        peak_bytes: highest allocation measured on the GPU, or of one CPU process; None: not
            measured.
        capacity: bytes of one GPU; where processes compute on CPUs, of the host.
        options: the run's; None: made from the job.
        where: its machines; None: those of this one, if its GPU is known.
    """
    need = memory(job)
    if where is None and (gpu := host_gpu()) is not None:
        where = machines(of_host(gpu), job.gpus_per_host)
    room, planned, together = capacity, need.device_total, 1
    one, whose = "GPU", "on a GPU"
    if where is not None:
        room = limits(replace(where, capacity=capacity), None).device
    if where is not None and where.shared_memory:
        together = job.processes_per_host
        planned = shared_bytes(job, need) // together
        one, whose = "process", f"in this host for its {together} process(es)"
    measured = "not measured" if peak_bytes is None else megabytes(peak_bytes)
    lines = [
        f"out of memory: measured peak {measured}, planned {megabytes(planned)}, of "
        f"{megabytes(capacity)} {whose}; planned for one {one}:"
    ]
    lines += [f"  {kind:<12}{megabytes(size):>14}" for kind, size in need.device.items() if size]
    if (warning := offload_warning(job)) is not None:
        lines.append(warning)
    # The plan said it would fit, and it did not: what it missed has to be saved too.
    missed = max(0, (peak_bytes or 0) - planned) * together
    found = cheaper(job, room - missed, options, where)
    if not found:
        more = "more memory" if one == "process" else "more GPUs"
        lines.append(f"no change of layout saves memory here: use {more}, or shorter rows (-l)")
    else:
        lines += ["the cheapest changes:", *advice_lines(found)]
    return "\n".join(lines)

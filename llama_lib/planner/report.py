"""Plans as text: bytes by kind, a ranked table, and what stands behind the numbers.

Invariant: MB are 2**20 bytes; a time that could not be predicted is shown as n/a, never as 0.
"""

import math
from collections.abc import Sequence

from llama_lib.flops import num_parameters
from llama_lib.models import Shape
from llama_lib.planner.hardware import Machines
from llama_lib.planner.job import Job
from llama_lib.planner.memory import Memory
from llama_lib.planner.roofline import FALLBACK_FAMILY, StepTime, fitted
from llama_lib.planner.search import (
    COMFORTABLE,
    MOST_ROWS,
    RESERVED_BYTES,
    RESERVED_SHARE,
    Limits,
    Plan,
    evicted,
    excess,
    largest_batch,
    shared_bytes,
)

MIB = 2**20
NOT_KNOWN = "n/a"


def megabytes(number: float) -> str:
    return f"{number / MIB:,.0f} MB"


def tokens_text(number: float) -> str:
    """1.4T for 1.4e12: the units of --max_tokens."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:g}{unit}"
    return f"{number:g}"


def plain(number: float) -> str:
    """Three digits of a number, more before the point, without an exponent: 1,750 or 0.012."""
    if number >= 100 or number == 0:
        return f"{number:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(number)))
    return f"{number:.{digits}f}"


def hours_text(hours: float) -> str:
    if hours < 0.01:
        return "under 0.01"
    return f"{hours:.2f}" if hours < 10 else plain(hours)


def memory_lines(job: Job, need: Memory, machines: Machines, limit: Limits) -> list[str]:
    """What one GPU and one host have to hold, by kind, and whether there is room."""
    host = dict(need.host)
    if limit.shared:
        host.pop("buffers", None)  # copies that are pinned for a GPU to read
    kinds = list(dict.fromkeys([*need.device, *host]))
    one = "process" if limit.shared else "GPU"
    rows = [(kind, need.device.get(kind, 0), host.get(kind, 0)) for kind in kinds]
    rows = [row for row in rows if row[1] or row[2]]
    rows.append(("peak", need.device_total, sum(host.values())))
    lines = [f"{'memory':<12}{f'one {one}':>14}{'one host':>14}   (each kind at its largest;"]
    lines[0] += f" the peak is at the {need.moment})"
    lines += [f"{k:<12}{megabytes(d):>14}{megabytes(h):>14}" for k, d, h in rows]
    if moved := evicted(need, limit):
        lines.append(f"gemini_auto moves {megabytes(moved)} of weights to the host and back")
    if limit.shared:
        lines.append(
            f"room: {megabytes(machines.capacity)} in this host for "
            f"{megabytes(shared_bytes(job, need))} of its processes together"
        )
        return lines
    lines.append(
        f"room: {megabytes(limit.device)} on a GPU, of {megabytes(machines.capacity)}: "
        f"{megabytes(RESERVED_BYTES)} and {RESERVED_SHARE:.0%} are left to CUDA and the allocator"
    )
    if limit.host is not None:
        lines.append(f"      {megabytes(limit.host)} in a host")
    elif need.host_total:
        lines.append("      memory of a host: not known, give --host_memory to have it compared")
    return lines


def fits_line(plan: Plan, limit: Limits) -> str:
    """Fits or not, and the largest batch that does."""
    if plan.job.layout.pp > 1:
        micro = plan.job.microbatch_size
        rows = f"in a pipeline memory goes by --microbatch_size, here {micro}, not by -b"
    else:
        largest = largest_batch(plan.job, limit)
        more = " or more" if largest == MOST_ROWS else ""
        rows = f"the largest batch that fits is -b {largest}{more}" if largest else "nor does -b 1"
        if plan.job.accumulation > 1:
            rows += f" (--accumulation_steps {plan.job.accumulation})"
    if plan.fits:
        return f"fits{', tight' * plan.tight}; {rows}"
    return f"does not fit: {megabytes(excess(plan, limit))} too much; {rows}"


def time_lines(plan: Plan, tokens: int, machines: Machines) -> list[str]:
    """Seconds of a step by part, the rate, and hours for so many tokens."""
    time = plan.time
    if time is None:
        return [f"time: {NOT_KNOWN} ({no_time_because(plan.job, machines)})"]
    parts = sorted(time.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(
        f"{name} {seconds / time.seconds:.0%}"
        for name, seconds in parts
        if seconds / time.seconds >= 0.005
    )
    lines = [
        f"predicted step of {time.tokens:,} tokens: {plain(time.seconds)} s ({shares})",
        f"predicted rate: {time.tokens_per_second:,.0f} tokens/s, "
        f"{time.tokens_per_second / time.num_gpus:,.0f} per GPU; "
        f"{hours_text(time.hours(tokens))} hours for {tokens_text(tokens)} tokens",
    ]
    return lines + unknown_lines(time, machines)


def no_time_because(job: Job, machines: Machines) -> str:
    if machines.shared_memory:
        return "no times for a CPU"
    if job.precision == "fp32":
        return "times are predicted for 16 bits only"
    return f"speed of '{machines.gpu.name}' unknown, pass --peak_tflops"


def warm_up_lines(steps: int, warm_up: int, step_tokens: int) -> list[str]:
    """What to say of a run that ends before its learning rate is up; nothing of others."""
    if steps >= warm_up:
        return []
    return [
        f"{steps:,} steps of {step_tokens:,} tokens are fewer than the {warm_up:,} of warm-up: "
        "fewer tokens a step (--global_batch_tokens), or fewer --warmup_steps"
    ]


def unknown_lines(time: StepTime, machines: Machines) -> list[str]:
    """What the prediction leaves out, or takes from another generation of cards."""
    lines = []
    if time.unknown:
        lines.append(f"left out of the time, because not known: {', '.join(time.unknown)}")
    if not fitted(machines.gpu.family):
        lines.append(
            f"no published run of this project's engine on {machines.gpu.name} or its "
            f"generation: efficiencies are those of {FALLBACK_FAMILY.capitalize()}"
        )
    return lines


def setting_lines(shape: Shape, name: str, world_size: int, machines: Machines) -> list[str]:
    """Model, cards, links."""
    gpu, hosts = machines.gpu, machines.spanning(world_size)
    lines = [
        f"model {name}: {num_parameters(shape):,} parameters",
        f"{world_size} x {gpu.name}, {megabytes(machines.capacity)} each, on {hosts} host(s)",
    ]
    if gpu.tflops is not None:
        numbers = [f"peak {gpu.tflops:g} TFLOPS"]
        for label, rate in (("memory", gpu.bandwidth), ("link", gpu.link), ("PCIe", gpu.pcie)):
            if rate is not None:
                numbers.append(f"{label} {rate:g} GB/s")
        if hosts > 1 and machines.network is not None:
            numbers.append(f"network {machines.network:g} GB/s a host")
        lines.append(", ".join(numbers) + " (one direction)")
    return lines + list(machines.notes)


_HEADER = (
    "",
    "plugin",
    "dp x tp x pp",
    "zero",
    "recompute",
    "-b",
    "accum.",
    "offload",
    "GPU MB",
    "host MB",
    "fits",
    "step s",
    "tokens/s",
    "hours",
)


def table(plans: Sequence[Plan], tokens: int, limit: Limits) -> list[str]:
    """The plans in their order; those that do not fit say what they lack."""
    rows = [_HEADER]
    for number, plan in enumerate(plans, 1):
        job, layout, time = plan.job, plan.job.layout, plan.time
        batch = str(job.batch_size)
        if layout.pp > 1:
            batch += f"/{job.microbatch_size}"
        offload = NOT_KNOWN
        if layout.plugin == "gemini":
            offload = f"{job.offload_optim_frac:g}, {job.offload_param_frac:g}"
        fitting = f"lacks {excess(plan, limit) / MIB:,.0f} MB"
        if plan.fits:
            fitting = "tight" if plan.tight else "yes"
        rates = ("-",) * 3
        if plan.fits and time is not None:
            rates = (
                plain(time.seconds),
                f"{time.tokens_per_second:,.0f}",
                hours_text(time.hours(tokens)),
            )
        elif plan.fits:
            rates = (NOT_KNOWN,) * 3
        rows.append(
            (
                str(number),
                layout.plugin,
                f"{layout.dp} x {layout.tp} x {layout.pp}",
                str(layout.zero_stage),
                job.recompute,
                batch,
                str(job.accumulation),
                "-" if offload == NOT_KNOWN else offload,
                f"{(plan.need.device_total - evicted(plan.need, limit)) / MIB:,.0f}",
                f"{plan.need.host_total / MIB:,.0f}",
                fitting,
                *rates,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    left = {1, 2, 4, 10}
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return lines + _legend(plans)


def _legend(plans: Sequence[Plan]) -> list[str]:
    """What the cells of these plans mean that do not say it."""
    notes = []
    for plan in plans:
        if plan.job.layout.pp > 1:
            shown = f"{plan.job.batch_size}/{plan.job.microbatch_size}"
            notes.append(f"-b {shown}: rows of -b, cut into micro-batches of --microbatch_size")
            break
    if any(plan.job.layout.plugin == "gemini" for plan in plans):
        notes.append("offload: --offload_optim_frac, --offload_param_frac")
    if any(plan.fits and plan.tight for plan in plans):
        notes.append(f"tight: takes more than {COMFORTABLE:.0%} of the room")
    return ["; ".join(notes)] if notes else []


def selection(plans: Sequence[Plan], rows: int) -> list[Plan]:
    """The first `rows` of one kind each, and of every plugin its best, in the same order.

    A kind is a plugin with its layout; a slower variant of the same kind is left out.
    """
    kinds: dict[tuple[str, int, int, int], Plan] = {}
    for plan in plans:
        layout = plan.job.layout
        kinds.setdefault((layout.plugin, layout.tp, layout.pp, layout.zero_stage), plan)
    best = list(kinds.values())
    first = {plan.job.layout.plugin: plan for plan in reversed(best)}
    return [
        plan
        for number, plan in enumerate(best)
        if number < rows or plan is first[plan.job.layout.plugin]
    ]

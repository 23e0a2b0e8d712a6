"""`--dry_run` of the training scripts: memory, time and layout of a run, in seconds.

Invariant: imports neither torch nor transformers, reads neither data nor weights, fetches and
writes nothing; what it refuses the run would refuse too.
"""

import os
from dataclasses import replace
from pathlib import Path

from llama_lib.checkpoint.manifest import (
    Manifest,
    check_load_argument,
    refuse_occupied,
    size_problems,
    step_directories,
)
from llama_lib.config import Options
from llama_lib.data.entries import parse_entries
from llama_lib.data.opening import is_tokenised
from llama_lib.data.sources import is_on_hub, locate
from llama_lib.errors import RunError, UserError
from llama_lib.inference import ADAPTER, base_of, model_folder
from llama_lib.layout import layout_of, plan_batches
from llama_lib.models import Shape, model_shape
from llama_lib.option_checks import (
    UNLIMITED_ROWS,
    chat_problems,
    compile_problems,
    kernel_problems,
    model_problems,
    recompute_problems,
    setting_problems,
)
from llama_lib.planner.advice import advice_lines, cheaper, needless_offload, offload_warning
from llama_lib.planner.command_line import flags
from llama_lib.planner.hardware import (
    HostGpu,
    Machines,
    cpu_host,
    host_gpu,
    host_memory,
    machines,
    of_host,
)
from llama_lib.planner.report import (
    fits_line,
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
    limits,
    plan_of,
    search,
)
from llama_lib.run_data import bend_data_defaults, data_option_problems, is_random

# Tokens that hours are counted for where no option says how many the run has.
TOKENS = 10**9
# Rows of the table of other layouts.
ROWS = 5
LAST_LINE = "--check reads data and weights too, and shows the run as it would start."


def dry_run(options: Options) -> int:
    """Print the plan of a run, on rank 0 only.

    Returns:
        1 if the run does not fit the GPU of this machine, else 0: without a GPU here it may be
        meant for another machine.

    Raises:
        UserError: everything wrong with the options that shows without torch and without data.
    """
    gpu = host_gpu()
    options, notes = _as_it_would_run(options, gpu)
    has_gpu = gpu is not None
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout_of(options, world_size)
    problems = setting_problems(options, has_gpu)
    problems += recompute_problems(options, layout, has_gpu)
    problems += kernel_problems(options, has_gpu)
    problems += compile_problems(options, layout, has_gpu)
    problems += data_option_problems(options)
    if options.script == "finetune":
        problems += chat_problems(options)
    problems += _problems_of_load(options)
    problems += missing_data(options)
    shape = None
    name = options.model.config
    try:
        name = model_name(options)
        shape = model_shape(name)
        options, line = _fitting_length(options, shape)
        notes += line
        problems = model_problems(options, shape, world_size) + problems
    except UserError as error:
        problems = error.problems + problems
    if problems or shape is None:
        raise UserError(list(dict.fromkeys(problems)))
    if int(os.environ.get("RANK", "0")):
        return 0
    per_host = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))
    where = _machines_here(options, gpu, per_host)
    notes += _occupied(options)
    limit = limits(where, host_memory())
    plan = plan_of(options, shape, world_size, where, limit)
    lines = [*notes, *setting_lines(shape, name, world_size, where)]
    question = Question(options, shape, world_size, where, limit, plan.job.tokens_per_step)
    lines += _lines_of(plan, question)
    lines += ["", *_others(plan, question), "", LAST_LINE]
    print("\n".join(lines))
    return int(gpu is not None and not plan.fits)


# -- options ---------------------------------------------------------------------------------------


def _as_it_would_run(options: Options, gpu: HostGpu | None) -> tuple[Options, list[str]]:
    """The options with the defaults that bend, and a line for each that did."""
    notes = []
    copy = replace(options, data=replace(options.data), model=replace(options.model))
    copy.training = replace(options.training)
    if copy.script == "finetune":
        # Conversations that share a row are isolated from each other, always.
        copy.model.document_mask = not copy.data.no_packing
    if gpu is None:
        if "mixed_precision" not in copy.typed:
            notes.append("--mixed_precision is bf16: without a GPU fp16 is some 200 times slower")
            copy.training.mixed_precision = "bf16"
        notes.append("no GPU here: this is the plan of processes on the CPU of this host")
    return copy, notes + bend_data_defaults(copy)


def _fitting_length(options: Options, shape: Shape) -> tuple[Options, list[str]]:
    """An untyped --max_length is at most the model's context."""
    context = shape.max_position_embeddings
    if "max_length" in options.typed:
        return options, []
    shorter = changed(options, max_length=min(options.model.max_length, context))
    if shorter.model.max_length == options.model.max_length:
        return shorter, []
    return shorter, [f"--max_length is {context}, the model's context (default 4096)"]


def _problems_of_load(options: Options) -> list[str]:
    try:
        if options.checkpoint.load is not None:
            check_load_argument(options.checkpoint.load, options.checkpoint.save_dir)
    except UserError as error:
        return error.problems
    return []


def _occupied(options: Options) -> list[str]:
    """What would be refused about --save_dir: a note, because a dry run writes nothing."""
    checkpoint = options.checkpoint
    try:
        refuse_occupied(checkpoint.save_dir, checkpoint.load)
    except UserError as error:
        return [f"without --dry_run this is refused: {problem}" for problem in error.problems]
    return []


def missing_data(options: Options) -> list[str]:
    """Local files and folders of -d and --eval_data that are not there; the hub is not asked."""
    cache_dir = Path(options.data.cache_dir).expanduser()
    chats = options.script == "finetune"
    problems: list[str] = []
    if is_random(options):
        return problems
    for words in (options.data.dataset, options.data.eval_data or []):
        try:
            entries = parse_entries(words)
        except UserError:
            continue  # data_option_problems says it
        for entry in entries:
            if entry.name == "sample" or is_on_hub(entry.name):
                continue
            try:
                if not is_tokenised(entry.name):
                    locate(entry.name, cache_dir, conversations=chats)
            except UserError as error:
                problems += error.problems
    return problems


# -- model -----------------------------------------------------------------------------------------


def model_name(options: Options) -> str:
    """What the run's shape is read from: a table name, a folder, or a hub id.

    Raises:
        UserError: fine-tuning without a model, or a folder that holds none.
    """
    source = options.model.model_path
    if source is None and options.script == "finetune":
        checkpoint = _checkpoint(options)
        if not (checkpoint / ADAPTER).is_dir():
            return str(model_folder(str(checkpoint)))
        # The adapters know which model they belong to.
        source = base_of(checkpoint / ADAPTER)
    if source is None:
        return options.model.config
    path = Path(source).expanduser()
    if path.is_dir():
        return str(model_folder(source))
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"--model_path {source}: no such folder.")
    return source


def _checkpoint(options: Options) -> Path:
    """The checkpoint that --load names; only sizes are compared, nothing is hashed."""
    load, save_dir = options.checkpoint.load, options.checkpoint.save_dir
    if load is None:
        raise UserError(
            "fine-tuning starts from a model: give --model_path FOLDER (a Hugging Face folder, a "
            "hub id or a checkpoint of pretrain.py), or --load to continue a run."
        )
    if load != "auto":
        check_load_argument(load, save_dir)
        return Path(load)
    for directory in step_directories(save_dir):
        try:
            if not size_problems(directory, Manifest.read(directory)):
                return directory
        except RunError:
            continue
    raise UserError(
        f"--load auto: there is no good checkpoint in --save_dir {save_dir} yet; name the model to "
        "start from with --model_path."
    )


# -- plan ------------------------------------------------------------------------------------------


def _machines_here(options: Options, gpu: HostGpu | None, per_host: int) -> Machines:
    """This machine `per_host` processes at a time, and as many of the kind as the run needs."""
    if gpu is None:
        return cpu_host(host_memory(), per_host)
    card = of_host(gpu)
    if options.report.peak_tflops is not None:
        card = replace(card, tflops=options.report.peak_tflops)
    return machines(card, per_host)


def _lines_of(plan: Plan, question: Question) -> list[str]:
    options, job, limit = plan.options, plan.job, question.limit
    layout = job.layout
    batches = plan_batches(options, layout, job.max_length, UNLIMITED_ROWS)
    # Fine-tuning has a warm-up of its own, a share of its steps, where none is typed.
    own = options.script == "finetune" and "warmup_steps" not in options.typed
    warm_up = 0 if own else batches.warmup_steps
    attention = "fused" if job.flash else "ColossalAI's own, which keeps all scores"
    lines = [
        f"{layout.describe()}; {job.precision}, recompute {job.recompute}, chunked loss "
        f"{'on' if job.chunked_loss else 'off'}, attention {attention}",
        batches.describe()[0],
        *warm_up_lines(batches.num_steps, warm_up, batches.tokens_per_step),
    ]
    if job.lora_parameters:
        lines.append(f"adapters of rank {options.model.lora_rank}: {job.lora_parameters:,} trained")
    lines += ["", *memory_lines(job, plan.need, question.machines, limit)]
    lines.append(fits_line(plan, limit))
    lines += time_lines(plan, _tokens(options), question.machines)
    hints = (
        offload_warning(job),
        needless_offload(job, limit, options, question.machines),
    )
    return lines + [hint for hint in hints if hint is not None]


def _tokens(options: Options) -> int:
    return options.training.max_tokens or TOKENS


def _others(plan: Plan, question: Question) -> list[str]:
    """What would make the run fit, or layouts that fit too, as fast as they are predicted to be."""
    lines = []
    if not plan.fits:
        limit = question.limit
        changes = cheaper(plan.job, limit.device, plan.options, question.machines, limit.host)
        if changes:
            lines += ["the cheapest changes:", *advice_lines(changes)]
    if plan.job.lora_parameters or plan.options.model.document_mask or plan.job.layout.sp_mode:
        return lines  # layouts for these are few, and the checks above name them
    tokens_per_step = plan.job.tokens_per_step
    fitting = [other for other in search(question) if other.fits]
    shown = selection(fitting, ROWS)[:ROWS]
    if not shown:
        return [*lines, "no layout fits: more GPUs are needed, or a smaller model"]
    lines += [
        f"layouts that fit, at {tokens_per_step:,} tokens a step or as near as it comes out:",
        *table(shown, _tokens(plan.options), question.limit),
        f"the first of them: {' '.join(flags(shown[0].options, question.world_size))}",
    ]
    return lines

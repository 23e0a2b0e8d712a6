"""Everything decided and checked before a process group, a model or a GPU is touched.

Invariant: a user's mistake ends here, all mistakes of one configuration in one message, and every
value that bends from what the documentation promises says so in one line.
"""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_lib import private
from llama_lib.checkpoint.manifest import (
    check_load_argument,
    refuse_occupied,
    step_directories,
)
from llama_lib.checkpoint.tensors import open_weights
from llama_lib.config import Options
from llama_lib.data.tokenizer import vocabulary_size
from llama_lib.data.training_data import TrainingData
from llama_lib.errors import UserError
from llama_lib.launch import has_accelerator, network_problems, world_size
from llama_lib.layout import BatchPlan, Layout, layout_of, plan_batches
from llama_lib.memory_check import plan_line, planned_job
from llama_lib.models import model_config
from llama_lib.option_checks import (
    UNLIMITED_ROWS,
    chat_problems,
    compile_problems,
    kernel_problems,
    model_problems,
    recompute_problems,
    setting_problems,
)
from llama_lib.run_chat import Chat, open_chat
from llama_lib.run_data import (
    bend_data_defaults,
    data_option_problems,
    ignored_data_settings,
    is_chosen,
    local_data_problems,
    open_data,
)
from llama_lib.starting_model import saved_script, starting_model
from llama_lib.versions import check_versions

# Share of warm-up of the upstream fine-tuning script.
WARMUP_SHARE = 0.03


@dataclass
class Run:
    """A checked run, ready to start.

    `model_folder` holds the weights training starts from on this machine, if any; `chat` is what
    fine-tuning adds.
    """

    options: Options
    config: Any
    layout: Layout
    plan: BatchPlan
    data: TrainingData
    tokenizer: Any
    model_folder: Path | None
    chat: Chat | None = None
    notes: list[str] = field(default_factory=list)

    def describe(self, num_rows: int | None = None) -> list[str]:
        """What a reader of the log needs to know about the run, formulas included.

        Args:
            num_rows: rows of the whole run, if it is not the plan's: some were done before.
        """
        from llama_lib.flops import num_parameters

        options = self.options
        model = self.model_folder or options.model.config
        words = " ".join(options.data.dataset)
        return [
            f"model {model}: {num_parameters(self.config):,} parameters, "
            f"{options.training.mixed_precision}",
            self.layout.describe(),
            *self._describe_tokenizer(),
            *(self.chat.lines if self.chat else []),
            f"data {words}: {self.data.lines[0]}",
            *(f"  {line}" for line in self.data.lines[1:]),
            *self.plan.describe(num_rows),
            *self._describe_repetitions(num_rows),
            plan_line(planned_job(options, self.config, self.layout.world_size), has_accelerator()),
        ]

    def _describe_tokenizer(self) -> list[str]:
        if self.tokenizer is None:
            return []
        size = vocabulary_size(self.tokenizer)
        return [f"tokenizer: {size:,} ids, hash {self.data.tokenizer_hash[:16]}"]

    def _describe_repetitions(self, num_rows: int | None) -> list[str]:
        if self.data.repetitions is None:
            return []
        passes = self.data.repetitions(num_rows or self.plan.num_steps * self.plan.global_batch)
        return [f"  {label}: {times:.3g} passes in this run" for label, times in passes.items()]


def preflight(options: Options) -> Run:
    """Check the options, prepare the data and plan the run.

    Every process calls this before the process group exists; one per host prepares the data.

    Raises:
        UserError: everything that is wrong with the configuration, in one message.
    """
    notes = check_versions(options.report.allow_untested_versions)
    if "config" in options.typed and options.model.model_path and options.script != "finetune":
        notes.append("--config is ignored: --model_path brings the shape of its weights")
    if options.script == "finetune":
        # Conversations that share a row are isolated from each other, always.
        options.model.document_mask = not options.data.no_packing
    problems = _setting_problems(options)
    folder = None
    try:
        folder = starting_model(options)
        config = model_config(options.model.config if folder is None else str(folder))
        notes += _bend_defaults(options, config)
        if folder is not None and options.model.model_path is not None:
            # A checkpoint given to --load is verified as a whole when the run starts.
            problems += _weight_problems(folder, config)
        problems = model_problems(options, config, world_size()) + problems
    except UserError as error:
        problems = error.problems + problems
    if problems:
        raise UserError(list(dict.fromkeys(problems + local_data_problems(options))))
    if options.script == "finetune":
        assert folder is not None
        data, tokenizer, chat = open_chat(options, config, folder)
        notes += chat.notes
    else:
        data, tokenizer = open_data(options, config, folder)
        chat = None
    notes += ignored_data_settings(options, data.held_out)
    notes += _open_folders(options)
    if options.report.check:
        refused = _problems_of(_check_save_dir, options)
        notes += [f"without --check this is refused: {problem}" for problem in refused]
    if options.report.check and (options.checkpoint.load or options.data.skip_steps):
        notes.append("this is the plan of a fresh run: --load and --skip_steps act when it starts")
    layout = layout_of(options, world_size())
    rows = UNLIMITED_ROWS
    if data.num_rows is not None:
        rows = data.num_rows(options.training.num_epochs)
    plan = plan_batches(options, layout, options.model.max_length, rows)
    if options.script == "finetune":
        plan, line = _short_warmup(options, plan)
        notes += line
    _set_attention(options, config)
    return Run(options, config, layout, plan, data, tokenizer, folder, chat, notes)


def _short_warmup(options: Options, plan: BatchPlan) -> tuple[BatchPlan, list[str]]:
    """The default of pre-training is longer than most fine-tuning: 3% of the steps instead."""
    if is_chosen(options, "warmup_steps"):
        return plan, []
    steps = math.ceil(WARMUP_SHARE * plan.num_steps)
    options.training.warmup_steps = steps
    line = f"--warmup_steps is {steps}: {WARMUP_SHARE:.0%} of the steps (default of pretrain 2000)"
    return replace(plan, warmup_steps=steps), [line]


def _bend_defaults(options: Options, config: Any) -> list[str]:
    """Adapt the two defaults that cannot hold everywhere; a typed value is never changed."""
    notes = []
    context = config.max_position_embeddings
    if "max_length" not in options.typed and options.model.max_length > context:
        notes.append(f"--max_length is {context}, the model's context (default 4096)")
        options.model.max_length = context
    if "mixed_precision" not in options.typed and not has_accelerator():
        notes.append("--mixed_precision is bf16: without a GPU fp16 is some 200 times slower")
        options.training.mixed_precision = "bf16"
    notes += bend_data_defaults(options)
    if not has_accelerator():
        notes.append("no GPU: ColossalAI runs on CPU processes over gloo")
    return notes


def _weight_problems(folder: Path, config: Any) -> list[str]:
    """Tensors of --model_path that the model lacks or has in another shape (headers only)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return _problems_of(open_weights, folder, expected, "--model_path")


def _setting_problems(options: Options) -> list[str]:
    """What is wrong whatever the model and the data are."""
    gpu = has_accelerator()
    layout = layout_of(options, world_size())
    problems = network_problems() + setting_problems(options, gpu)
    problems += recompute_problems(options, layout, gpu)
    problems += kernel_problems(options, gpu) + compile_problems(options, layout, gpu)
    problems += data_option_problems(options)
    if options.script == "finetune":
        problems += chat_problems(options)
    problems += _folder_problems(options)
    problems += _problems_of(_check_load, options)
    if not options.report.check:
        problems += _problems_of(_check_save_dir, options)
    return problems


def _problems_of(check: Callable[..., Any], *args: Any) -> list[str]:
    try:
        check(*args)
    except UserError as error:
        return error.problems
    return []


def _check_load(options: Options) -> None:
    if options.checkpoint.load is not None:
        check_load_argument(options.checkpoint.load, options.checkpoint.save_dir)


def _check_save_dir(options: Options) -> None:
    checkpoint = options.checkpoint
    try:
        refuse_occupied(checkpoint.save_dir, checkpoint.load)
    except UserError as error:
        newest = step_directories(checkpoint.save_dir)[0]
        script = saved_script(newest)
        if script in (None, options.script):
            raise
        raise UserError(
            f"--save_dir {checkpoint.save_dir} holds checkpoints of {script}.py; choose another "
            "one, as in -o other."
        ) from error


def _folder_problems(options: Options) -> list[str]:
    """Folders the run writes to that it may not write to; nothing is left behind by asking."""
    if options.report.check:
        return []
    problems = []
    for flag, folder in (
        ("--save_dir", options.checkpoint.save_dir),
        ("--tensorboard_dir", options.report.tensorboard_dir),
    ):
        path = Path(folder).absolute()
        existing = next(part for part in (path, *path.parents) if os.path.exists(part))
        try:
            # As root every mode passes access(); a read-only file system still fails the write.
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            problems.append(
                f"{flag} {folder} cannot be written to ({error.strerror}); choose another folder."
            )
    return problems


def _open_folders(options: Options) -> list[str]:
    """A warning for every folder of this run that everyone may write to."""
    report = options.report
    folders = {"--save_dir": options.checkpoint.save_dir, "--cache_dir": options.data.cache_dir}
    if report.tensorboard_dir != options.checkpoint.save_dir:
        folders["--tensorboard_dir"] = report.tensorboard_dir
    return private.open_folders(folders)


def _set_attention(options: Options, config: Any) -> None:
    """SDPA everywhere but where ColossalAI's own attention takes over (-a, sequence parallel)."""
    config._attn_implementation = "eager" if options.parallel.sp_mode else "sdpa"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

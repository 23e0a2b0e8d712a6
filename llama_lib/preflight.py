"""Everything decided and checked before a process group, a model or a GPU is touched.

Invariant: a user's mistake ends here, all mistakes of one configuration in one message, and every
value that bends from what the documentation promises says so in one line.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lib.checkpoint.manifest import check_load_argument, refuse_occupied
from llama_lib.checkpoint.tensors import open_weights
from llama_lib.config import Options
from llama_lib.data.once import once
from llama_lib.data.tokenizer import vocabulary_size
from llama_lib.data.training_data import TrainingData
from llama_lib.errors import UserError
from llama_lib.launch import has_accelerator, network_problems, world_size
from llama_lib.layout import BatchPlan, Layout, layout_of, layout_problems, plan_batches
from llama_lib.models import model_config
from llama_lib.run_data import (
    bend_data_defaults,
    data_option_problems,
    ignored_data_settings,
    local_data_problems,
    open_data,
)
from llama_lib.versions import check_versions

# More rows than any run takes: the plan is then made of --max_steps and --max_tokens alone.
UNLIMITED_ROWS = 2**62


@dataclass
class Run:
    """A checked run, ready to start.

    `model_folder` holds the weights of --model_path on this machine, if given.
    """

    options: Options
    config: Any
    layout: Layout
    plan: BatchPlan
    data: TrainingData
    tokenizer: Any
    model_folder: Path | None
    notes: list[str] = field(default_factory=list)

    def describe(self, num_rows: int | None = None) -> list[str]:
        """What a reader of the log needs to know about the run, formulas included.

        Args:
            num_rows: rows of the whole run, if it is not the plan's: some were done before.
        """
        from llama_lib.flops import num_parameters

        options = self.options
        model = options.model.model_path or options.model.config
        words = " ".join(options.data.dataset)
        return [
            f"model {model}: {num_parameters(self.config):,} parameters, "
            f"{options.training.mixed_precision}, attention {self._attention()}",
            self.layout.describe(),
            f"tokenizer: {vocabulary_size(self.tokenizer):,} ids, hash "
            f"{self.data.tokenizer_hash[:16]}",
            f"data {words}: {self.data.lines[0]}",
            *(f"  {line}" for line in self.data.lines[1:]),
            *self.plan.describe(num_rows),
            *self._describe_repetitions(num_rows),
        ]

    def _attention(self) -> str:
        if not self.options.model.document_mask:
            return self.config._attn_implementation
        import torch

        from llama_lib.document_attention import document_kernel

        device = torch.device("cuda" if has_accelerator() else "cpu")
        half = self.options.training.mixed_precision != "fp32"
        kernel = document_kernel(device, torch.bfloat16 if half else torch.float32)
        return f"within documents ({kernel})"

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
    source = options.model.model_path
    if source is not None and "config" in options.typed and options.script == "pretrain":
        notes.append("--config is ignored: --model_path brings the shape of its weights")
    problems = _setting_problems(options)
    try:
        model_folder = None if source is None else local_model(source, options.data.cache_dir)
        config = model_config(options.model.config if model_folder is None else str(model_folder))
        notes += _bend_defaults(options, config)
        if model_folder is not None:
            problems += _weight_problems(model_folder, config)
        problems = _model_problems(options, config) + problems
    except UserError as error:
        problems = error.problems + problems
    if problems:
        raise UserError(problems + local_data_problems(options))
    data, tokenizer = open_data(options, config, model_folder)
    notes += ignored_data_settings(options, data.held_out)
    if options.report.dry_run and (options.checkpoint.load or options.data.skip_steps):
        notes.append("this is the plan of a fresh run: --load and --skip_steps act when it starts")
    layout = layout_of(options, world_size())
    rows = UNLIMITED_ROWS
    if data.num_rows is not None:
        rows = data.num_rows(options.training.num_epochs)
    plan = plan_batches(options, layout, options.model.max_length, rows)
    _set_attention(options, config)
    return Run(options, config, layout, plan, data, tokenizer, model_folder, notes)


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


def _model_problems(options: Options, config: Any) -> list[str]:
    """What does not fit the model: layout, row length, global batch."""
    problems = layout_problems(options, world_size(), config)
    context = config.max_position_embeddings
    if options.model.max_length > context:
        problems.append(
            f"--max_length {options.model.max_length} is more than the model's context of "
            f"{context}; use at most {context}."
        )
    parts = layout_of(options, world_size()).sp
    if options.parallel.sp_mode and options.model.max_length % max(1, parts):
        problems.append(
            f"--max_length {options.model.max_length} is not divisible into {parts} parts "
            f"(--sp_mode {options.parallel.sp_mode})."
        )
    if options.model.flash_attention and config.model_type != "llama":
        problems.append(
            f"-a with model type {config.model_type} is not tested (ColossalAI's kernel knows no "
            "sliding window); leave out -a."
        )
    if not problems:
        # With data beyond any limit only the numbers themselves can be wrong: they are refused
        # here, not after hours of tokenising.
        layout = layout_of(options, world_size())
        problems += _problems_of(
            plan_batches, options, layout, options.model.max_length, UNLIMITED_ROWS
        )
    return problems


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
    problems = network_problems()
    gemini = options.parallel.plugin.startswith("gemini")
    if gemini and options.training.mixed_precision == "fp32" and has_accelerator():
        # On a CPU llama_lib.host adds it, and it passes the truth test.
        problems.append(
            f"-p {options.parallel.plugin} has no fp32 in ColossalAI; use -x bf16, or -p zero2."
        )
    if options.model.flash_attention and not has_accelerator():
        problems.append(
            "-a asks for ColossalAI's flash attention kernel, which needs a GPU; without -a "
            "attention is torch's SDPA."
        )
    if options.parallel.microbatch_size and options.parallel.plugin != "hybrid_parallel":
        problems.append("--microbatch_size belongs to -p hybrid_parallel with --pp above 1.")
    if options.training.seed >= 2**32:
        problems.append(
            f"--seed {options.training.seed} is too large: numpy takes seeds below 2^32 = {2**32}."
        )
    problems += data_option_problems(options)
    problems += _folder_problems(options)
    problems += _problems_of(_check_load, options)
    return problems + _problems_of(_check_save_dir, options)


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
    if not options.report.dry_run:
        refuse_occupied(options.checkpoint.save_dir, options.checkpoint.load)


def _folder_problems(options: Options) -> list[str]:
    """Folders the run writes to that it may not write to; nothing is left behind by asking."""
    if options.report.dry_run:
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


def local_model(name: str, cache_dir: str) -> Path:
    """The folder of a local path or hub id; one process per host downloads."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model_path {name}: no such folder.")
    from huggingface_hub import snapshot_download

    try:
        with once(Path(cache_dir).expanduser(), f"model {name}", "download"):
            return Path(
                snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*"])
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_path {name}: not a folder here, and the hub gives no such model "
            f"({str(error).splitlines()[0]})."
        ) from None


def _set_attention(options: Options, config: Any) -> None:
    """SDPA everywhere but where ColossalAI's own attention takes over (-a, sequence parallel)."""
    config._attn_implementation = "eager" if options.parallel.sp_mode else "sdpa"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

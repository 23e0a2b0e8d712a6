"""What is wrong with a run's options, as far as it shows without torch.

Invariant: nothing here imports torch or transformers; `--dry_run` and the start of a run say the
same of the same options.
"""

import importlib.util
import os
import shutil
from typing import Any

from llama_lib.config import Options
from llama_lib.errors import UserError
from llama_lib.layout import Layout, layout_of, layout_problems, plan_batches

# Linear layers of a block of Llama and Mistral, in their order.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# More rows than any run takes: only the numbers of a batch themselves can then be wrong.
UNLIMITED_ROWS = 2**62


def setting_problems(options: Options, has_gpu: bool) -> list[str]:
    """What is wrong whatever the model and the data are.

    Args:
        has_gpu: whether the run computes on GPUs.
    """
    problems = []
    gemini = options.parallel.plugin.startswith("gemini")
    if gemini and options.training.mixed_precision == "fp32" and has_gpu:
        # On a CPU llama_lib.host adds it, and it passes the truth test.
        problems.append(
            f"-p {options.parallel.plugin} has no fp32 in ColossalAI; use -x bf16, or -p zero2."
        )
    if options.model.flash_attention and not has_gpu:
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
    return problems


def recompute_problems(options: Options, layout: Layout, has_gpu: bool) -> list[str]:
    """Why this run cannot recompute as it asks to; each with what it can."""
    if options.recompute != "selective":
        return []
    problems = []
    if layout.sp_mode == "split_gather":
        problems.append(
            "--recompute selective with --sp_mode split_gather would compute a matrix product of "
            "every layer twice; use --recompute full or none."
        )
    if not has_gpu:
        return problems
    # What is kept is known by the operations of torch's SDPA; these kernels are others, and no GPU
    # was there to try.
    if options.model.document_mask:
        problems.append(
            "--recompute selective with isolated documents is not tested on a GPU, where their "
            "attention is not torch's SDPA; use --recompute full or none."
        )
    if options.model.flash_attention and importlib.util.find_spec("flash_attn"):
        problems.append(
            "--recompute selective with -a is not tested with the flash-attn package; leave out -a "
            "(torch's SDPA has a flash kernel too), or use --recompute full or none."
        )
    return problems


def kernel_problems(options: Options, has_gpu: bool) -> list[str]:
    """Why a typed --kernels cannot be had."""
    if options.model.kernels != "liger":
        return []
    instead = "use --kernels auto or torch"
    problems = []
    if not has_gpu:
        problems.append(f"--kernels liger needs an NVIDIA GPU (Triton); {instead}.")
    elif importlib.util.find_spec("liger_kernel") is None:
        problems.append(
            "--kernels liger needs the package liger_kernel, which is not installed; "
            f"pip install liger-kernel, or {instead}."
        )
    if options.model.compile:
        problems.append(
            "--kernels liger with --compile is not tested: the compiler fuses these operations "
            f"itself; leave out --compile, or {instead}."
        )
    return problems


def compile_problems(options: Options, layout: Layout, has_gpu: bool) -> list[str]:
    """Why --compile cannot work here; each with what can."""
    if not options.model.compile:
        return []
    problems = []
    if layout.plugin.startswith("gemini"):
        problems.append(
            f"--compile with -p {layout.plugin}: torch.compile cannot keep the tensors gemini "
            "makes of the weights; use -p zero2, zero2_cpu or hybrid_parallel."
        )
    if layout.tp > 1 or layout.sp_mode is not None:
        problems.append(
            "--compile with --tp above 1 or --sp_mode: torch.compile cannot follow ColossalAI's "
            "collectives and cuts every layer into pieces; use --tp 1 without --sp_mode."
        )
    if options.recompute == "selective":
        problems.append(
            "--compile with --recompute selective: inside a compiled layer no product can be told "
            "from what is cheap; use --recompute none or full."
        )
    if options.model.flash_attention:
        problems.append("--compile with -a is not tested; leave out -a (attention is SDPA then).")
    if options.model.document_mask and has_gpu:
        problems.append(
            "--compile with isolated documents is not tested on a GPU, where their attention is "
            "compiled by itself; leave out --compile."
        )
    if options.model.lora_rank:
        problems.append("--compile with --lora_rank is not tested; leave out --compile.")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        problems.append(
            f"--compile needs a C++ compiler; got no {compiler}. Install one, set CXX, or leave "
            "out --compile."
        )
    return problems


def chat_problems(options: Options) -> list[str]:
    """What is wrong with the options of fine-tuning, whatever the model and the data are."""
    problems = []
    if options.report.sample_interval and not options.report.sample_prompts:
        problems.append("--sample_interval needs something to answer: give --sample_prompts TEXT.")
    if options.data.min_length > options.model.max_length:
        problems.append(
            f"--min_length {options.data.min_length} is more than --max_length "
            f"{options.model.max_length}: no conversation would be left."
        )
    return problems


def model_problems(options: Options, shape: Any, world_size: int) -> list[str]:
    """What does not fit the model: layout, adapters, row length, global batch.

    Args:
        shape: a `models.Shape` or the model's transformers config.
    """
    layout = layout_of(options, world_size)
    problems = layout_problems(options, world_size, shape)
    problems += adapter_problems(options, layout)
    context = shape.max_position_embeddings
    length = options.model.max_length
    if length > context:
        problems.append(
            f"--max_length {length} is more than the model's context of {context}; use at most "
            f"{context}."
        )
    if options.parallel.sp_mode and length % max(1, layout.sp):
        problems.append(
            f"--max_length {length} is not divisible into {layout.sp} parts "
            f"(--sp_mode {options.parallel.sp_mode})."
        )
    if options.model.flash_attention and shape.model_type != "llama":
        problems.append(
            f"-a with model type {shape.model_type} is not tested (ColossalAI's kernel knows no "
            "sliding window); leave out -a."
        )
    if not problems:
        # Refused here, not after hours of tokenising.
        try:
            plan_batches(options, layout, length, UNLIMITED_ROWS)
        except UserError as error:
            problems += error.problems
    return problems


def adapter_problems(options: Options, layout: Layout) -> list[str]:
    """What cannot work about adapters, each with what can."""
    model = options.model
    if not model.lora_rank:
        if model.merge_lora:
            return ["--merge_lora has no adapters to merge: give --lora_rank too, or leave it out."]
        return []
    problems = []
    if layout.plugin.startswith("gemini"):
        problems.append(
            f"--lora_rank with -p {layout.plugin}: ColossalAI's gemini has no adapters; use -p "
            "zero2, zero2_cpu or hybrid_parallel."
        )
    sizes = {"tp": layout.tp, "pp": layout.pp, "sp": layout.sp}
    for name, size in sizes.items():
        if size > 1 and not (name == "sp" and layout.sp_mode == "split_gather"):
            problems.append(
                f"--lora_rank with --{name} {size}: ColossalAI has adapters without tensor, "
                f"pipeline and sequence parallelism only; use --{name} 1."
            )
    unknown = [name for name in model.lora_targets if name not in LINEAR_LAYERS]
    if unknown:
        problems.append(
            f"--lora_targets {' '.join(unknown)}: no linear layer in the model's blocks; valid: "
            f"{', '.join(LINEAR_LAYERS)}."
        )
    if not model.lora_targets:
        problems.append(
            f"--lora_targets: got no layer, expected some of {', '.join(LINEAR_LAYERS)}."
        )
    return problems

"""How processes are arranged and how a global batch is cut.

Invariant: every combination that reaches ColossalAI has passed `layout_problems`, so what this
project has not tested is refused here, by name, before anything expensive starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_lib.config import Options
from llama_lib.errors import UserError

# Sequence-parallel modes that pass the truth test. "ring" is 0.4% off in gradient norm and
# "ring_attn" needs flash-attn, which cannot be tested without a GPU.
SEQUENCE_MODES = ("all_to_all", "split_gather")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes; `dp` replicas read different data, all other ranks share it."""

    plugin: str
    world_size: int
    tp: int = 1
    pp: int = 1
    sp: int = 1
    sp_mode: str | None = None
    zero_stage: int = 0
    model_chunks: int = 1

    @property
    def sequence_axis(self) -> int:
        """Processes that sequence parallelism takes for itself (split_gather shares tp's)."""
        return self.sp if self.sp_mode == "all_to_all" else 1

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.sequence_axis)

    def describe(self) -> str:
        parts = [f"dp {self.dp}", f"tp {self.tp}", f"pp {self.pp}"]
        if self.model_chunks > 1:
            parts[-1] += f" of {self.model_chunks} parts each (interleaved)"
        if self.sp_mode:
            parts.append(f"sp {self.sp} ({self.sp_mode})")
        if self.plugin == "hybrid_parallel":
            parts.append(f"zero {self.zero_stage}")
        return f"{self.plugin}: {self.world_size} process(es) = " + ", ".join(parts)


def layout_of(options: Options, world_size: int) -> Layout:
    """The layout the options ask for; call `layout_problems` before using it."""
    parallel = options.parallel
    sp_mode = parallel.sp_mode
    sp = parallel.sp
    if sp_mode == "split_gather":
        sp = parallel.tp
    if parallel.zero_stage is not None:
        zero_stage = parallel.zero_stage
    elif parallel.plugin == "hybrid_parallel":
        # Sharding the optimizer costs nothing when there are replicas to share it with; ColossalAI
        # has no fp32 working precision under its hybrid ZeRO optimizer.
        replicas = world_size // max(1, parallel.tp * parallel.pp)
        zero_stage = 1 if replicas > 1 and options.training.mixed_precision != "fp32" else 0
    else:
        zero_stage = {"zero2": 2, "zero2_cpu": 2}.get(parallel.plugin, 3)
    return Layout(
        parallel.plugin,
        world_size,
        parallel.tp,
        parallel.pp,
        sp,
        sp_mode,
        zero_stage,
        parallel.num_model_chunks,
    )


def divisors(number: int, limit: int | None = None) -> list[int]:
    """All divisors of `number`, those above `limit` left out."""
    return [d for d in range(1, number + 1) if number % d == 0 and (limit is None or d <= limit)]


def _shared(*numbers: int) -> list[int]:
    common = set(divisors(numbers[0]))
    for number in numbers[1:]:
        common &= set(divisors(number))
    return sorted(common)


def chunked_loss_problems(layout: Layout) -> list[str]:
    """Why this layout cannot compute logits and loss a piece at a time; none: it can."""
    problems = []
    if layout.tp > 1:
        problems.append("--chunked_loss with --tp above 1: each process has a part of the logits.")
    if layout.pp > 1:
        problems.append("--chunked_loss with --pp above 1: the schedule takes the loss of logits.")
    return problems


def layout_problems(options: Options, world_size: int, config: Any) -> list[str]:
    """Everything about the parallel layout that cannot work, each with the values that can.

    Args:
        config: the model's transformers config (read: heads, layers, vocabulary, tied embeddings).
    """
    parallel, training = options.parallel, options.training
    layout = layout_of(options, world_size)
    problems = []
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads

    if parallel.plugin != "hybrid_parallel":
        for name in ("tp", "pp", "sp"):
            if (size := getattr(parallel, name)) != 1:
                problems.append(
                    f"--{name} {size} needs -p hybrid_parallel; got -p {parallel.plugin}. "
                    + (
                        "ColossalAI's gemini with tensor parallelism miscounts the gradient norm."
                        if name == "tp" and parallel.plugin.startswith("gemini")
                        else "Use -p hybrid_parallel."
                    )
                )
        if parallel.sp_mode is not None:
            problems.append(f"--sp_mode {parallel.sp_mode} needs -p hybrid_parallel.")
        if parallel.pp_style != "1f1b":
            problems.append(f"--pp_style {parallel.pp_style} needs -p hybrid_parallel.")
        if parallel.num_model_chunks != 1:
            problems.append(
                f"--num_model_chunks {parallel.num_model_chunks} needs -p hybrid_parallel."
            )
        if parallel.zero_stage is not None:
            problems.append(
                f"--zero_stage belongs to hybrid_parallel; {parallel.plugin} fixes its own."
            )
    if not parallel.plugin.startswith("gemini"):
        for name in ("offload_optim_frac", "offload_param_frac"):
            if getattr(parallel, name) > 0:
                problems.append(
                    f"--{name} belongs to -p gemini; {parallel.plugin} has no such setting"
                    + (
                        " (zero2_cpu offloads the optimizer)."
                        if "zero2" in parallel.plugin
                        else "."
                    )
                )
    elif parallel.plugin == "gemini_auto" and (
        parallel.offload_optim_frac > 0 or parallel.offload_param_frac > 0
    ):
        problems.append(
            "gemini_auto chooses what to offload by itself; use -p gemini for fractions."
        )
    if parallel.offload_param_frac > 0 and parallel.offload_optim_frac < 1:
        problems.append(
            "--offload_param_frac needs --offload_optim_frac 1.0 (ColossalAI offloads parameters "
            f"only after the whole optimizer); got {parallel.offload_optim_frac}."
        )

    if parallel.plugin == "hybrid_parallel":
        problems += _hybrid_problems(options, layout, config, heads, kv_heads)
    if options.model.chunked_loss and "chunked_loss" in options.flags:
        problems += chunked_loss_problems(layout)
    if options.model.document_mask:
        problems += _document_problems(options, layout, config)
    if layout.dp < 1 or layout.dp * layout.tp * layout.pp * layout.sequence_axis != world_size:
        group = layout.tp * layout.pp * layout.sequence_axis
        problems.append(
            f"{world_size} process(es) cannot be divided into groups of tp {layout.tp} x pp "
            f"{layout.pp} x sp {layout.sequence_axis} = {group}; valid numbers of processes are "
            f"multiples of {group}, or choose tp x pp x sp among {divisors(world_size)}."
        )
    if training.batch_size < 1:
        problems.append(f"--batch_size must be at least 1; got {training.batch_size}.")
    return problems


def _hybrid_problems(
    options: Options, layout: Layout, config: Any, heads: int, kv_heads: int
) -> list[str]:
    parallel, training = options.parallel, options.training
    problems = []
    layers = config.num_hidden_layers
    if heads % layout.tp or kv_heads % layout.tp:
        problems.append(
            f"--tp {layout.tp} does not divide the model's {heads} attention heads and {kv_heads} "
            f"key-value heads; valid values: {_shared(heads, kv_heads)}."
        )
    if layout.pp > layers:
        problems.append(
            f"--pp {layout.pp} is more than the model's {layers} layers; "
            f"valid values: 1 to {layers}."
        )
    if parallel.sp_mode is None and parallel.sp > 1:
        problems.append(
            f"--sp {parallel.sp} needs --sp_mode; valid values: {', '.join(SEQUENCE_MODES)}."
        )
    if parallel.sp_mode is not None and parallel.sp_mode not in SEQUENCE_MODES:
        problems.append(
            f"--sp_mode {parallel.sp_mode} is refused: ring is 0.4% off in gradient norm and "
            f"ring_attn needs flash-attn, untested here; valid values: {', '.join(SEQUENCE_MODES)}."
        )
    if parallel.sp_mode == "split_gather":
        if layout.tp == 1:
            problems.append(
                "--sp_mode split_gather splits over the tensor group; give --tp 2 or more."
            )
        if parallel.sp not in (1, layout.tp):
            problems.append(
                f"--sp_mode split_gather takes its size from --tp {layout.tp}; "
                f"got --sp {parallel.sp}."
            )
    if parallel.sp_mode == "all_to_all":
        if layout.sp == 1:
            problems.append("--sp_mode all_to_all needs --sp 2 or more.")
        if layout.tp > 1:
            problems.append("--sp_mode all_to_all with --tp above 1 is not tested; use --tp 1.")
        if heads % layout.sp or kv_heads % layout.sp:
            problems.append(
                f"--sp {layout.sp} does not divide the model's {heads} attention heads and "
                f"{kv_heads} key-value heads; valid values: {_shared(heads, kv_heads)}."
            )
    if parallel.sp_mode is not None and layout.pp > 1:
        problems.append("sequence parallelism with --pp above 1 is not tested; use --pp 1.")
    if parallel.sp_mode is not None and options.model.flash_attention:
        problems.append("-a with sequence parallelism is not tested; leave out -a or --sp_mode.")
    if layout.zero_stage not in (0, 1, 2):
        problems.append(f"--zero_stage must be 0, 1 or 2; got {layout.zero_stage}.")
    if layout.zero_stage == 2 and layout.pp > 1:
        problems.append("--zero_stage 2 cannot be used with --pp above 1; valid values: 0, 1.")
    if layout.zero_stage > 0 and training.mixed_precision == "fp32":
        problems.append(
            f"--zero_stage {layout.zero_stage} needs -x bf16 or fp16 under hybrid_parallel; "
            "with -x fp32 use --zero_stage 0, or -p zero2."
        )
    problems += _interleaving_problems(options, layout, layers)
    if layout.pp > 1:
        micro = parallel.microbatch_size or 1
        if training.batch_size % micro:
            problems.append(
                f"--batch_size {training.batch_size} is not divisible by --microbatch_size "
                f"{micro}; valid values: {divisors(training.batch_size)}."
            )
    elif parallel.microbatch_size is not None:
        problems.append("--microbatch_size belongs to --pp above 1.")
    if getattr(config, "tie_word_embeddings", False) and (layout.tp > 1 or layout.pp > 1):
        problems.append("a model with tied embeddings is not tested under --tp or --pp above 1.")
    if config.model_type != "llama" and (layout.tp > 1 or layout.pp > 1 or layout.sp_mode):
        problems.append(f"model type {config.model_type} is not tested under --tp, --pp or --sp.")
    return problems


def _interleaving_problems(options: Options, layout: Layout, layers: int) -> list[str]:
    chunks = options.parallel.num_model_chunks
    if options.parallel.pp_style == "1f1b":
        if chunks == 1:
            return []
        return [f"--num_model_chunks {chunks} belongs to --pp_style interleaved."]
    if layout.pp == 1:
        return ["--pp_style interleaved needs --pp 2 or more."]
    largest = layers // layout.pp
    if largest < 2:
        return [
            f"--pp_style interleaved gives each of {layout.pp} stages two layers or more, and the "
            f"model has {layers}; use --pp_style 1f1b or a smaller --pp."
        ]
    if not 2 <= chunks <= largest:
        return [
            f"--pp_style interleaved needs --num_model_chunks, on {layers} layers and {layout.pp} "
            f"stages 2 to {largest}; got {chunks}."
        ]
    return []


def _document_problems(options: Options, layout: Layout, config: Any) -> list[str]:
    """What does not go with rows whose documents are isolated from each other."""
    if options.script == "finetune":  # there packing asks for them
        subject, without = "packed conversations", "give --no_packing"
    else:
        subject, without = "--document_mask", "leave out --document_mask"
    problems = []
    if options.parallel.sp_mode is not None:
        problems.append(
            f"{subject} with sequence parallelism is not tested; leave out --sp_mode, or {without}."
        )
    if options.model.flash_attention:
        problems.append(
            f"-a with {subject}: ColossalAI's kernel is causal over the whole row; leave out -a, "
            f"the mask chooses its own kernel, or {without}."
        )
    if config.model_type not in ("llama", "mistral"):
        problems.append(
            f"{subject} with model type {config.model_type} is not tested; expected llama or "
            f"mistral; {without}."
        )
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window and options.model.max_length > window:
        problems.append(
            f"{subject} with --max_length {options.model.max_length}: rows may not be longer than "
            f"the model's sliding window of {window}, which the mask knows nothing of; use "
            f"--max_length {window} at most, or {without}."
        )
    if getattr(config, "attention_dropout", 0.0) > 0:
        problems.append(
            f"{subject} with attention_dropout above 0 is not tested; set it to 0 in the model's "
            f"config.json, or {without}."
        )
    return problems


@dataclass(frozen=True)
class BatchPlan:
    """How many samples a step takes and how many steps the run has.

    `global_batch` = batch_size x dp x accumulation (samples); `tokens_per_step` counts input ids.
    """

    batch_size: int
    dp: int
    accumulation: int
    max_length: int
    num_steps: int
    dropped_rows: int
    warmup_steps: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.dp * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.max_length

    def describe(self, num_rows: int | None = None) -> list[str]:
        """The lines shown before the first step, formulas included.

        Args:
            num_rows: rows of the whole run, if some were done in batches of another size.
        """
        if num_rows is None:
            num_rows = self.num_steps * self.global_batch
        lines = [
            f"global batch = batch_size {self.batch_size} x dp {self.dp} x accumulation "
            f"{self.accumulation} = {self.global_batch} rows x {self.max_length} = "
            f"{self.tokens_per_step:,} tokens per step",
            f"{self.num_steps:,} steps = {num_rows * self.max_length:,} tokens",
        ]
        if self.dropped_rows:
            lines.append(f"{self.dropped_rows} row(s) at the end do not fill a batch: dropped")
        share = min(1.0, self.warmup_steps / self.num_steps)
        line = f"warm-up {self.warmup_steps:,} steps = {share:.0%} of the run"
        shorter = max(1, self.num_steps // 50)  # 2%, the share of the original recipe
        if share > 0.1 and shorter < self.warmup_steps:
            line += f" (more than 10%: consider --warmup_steps {shorter:,})"
        return lines + [line]


def accumulation_of(options: Options, dp: int, max_length: int) -> int | str:
    """Micro-steps per optimizer step, or the message that says why there is no such number."""
    training = options.training
    tokens = training.global_batch_tokens
    if tokens is None:
        return training.accumulation_steps
    micro = training.batch_size * dp * max_length
    if tokens < micro or tokens % micro:
        below, above = tokens // micro * micro, (tokens // micro + 1) * micro
        nearest = f"{above}" if below == 0 else f"{below} or {above}"
        return (
            f"--global_batch_tokens {tokens} is not a multiple of batch_size "
            f"{training.batch_size} x dp {dp} x max_length {max_length} = {micro}; "
            f"nearest valid: {nearest}."
        )
    return tokens // micro


def plan_batches(options: Options, layout: Layout, max_length: int, total_rows: int) -> BatchPlan:
    """Cut `total_rows` rows (all epochs together) into steps; shorter limits win.

    Raises:
        UserError: the numbers do not fit, or there is not one full batch.
    """
    accumulation = accumulation_of(options, layout.dp, max_length)
    if isinstance(accumulation, str):
        raise UserError(accumulation)
    training = options.training
    micro_batches = training.batch_size * accumulation // (options.parallel.microbatch_size or 1)
    if layout.pp > 1 and micro_batches < layout.pp:
        raise UserError(
            f"a pipeline of {layout.pp} stages needs at least {layout.pp} micro-batches per step; "
            f"got {micro_batches} = batch_size {training.batch_size} x accumulation {accumulation} "
            f"/ microbatch_size {options.parallel.microbatch_size or 1}; raise --batch_size or "
            "--accumulation_steps."
        )
    if options.parallel.pp_style == "interleaved" and micro_batches % layout.pp:
        raise UserError(
            f"an interleaved pipeline of {layout.pp} stages needs a multiple of {layout.pp} "
            f"micro-batches per step; got {micro_batches} = batch_size {training.batch_size} x "
            f"accumulation {accumulation} / microbatch_size "
            f"{options.parallel.microbatch_size or 1}; choose another --batch_size or "
            "--accumulation_steps, or --pp_style 1f1b."
        )
    global_batch = training.batch_size * layout.dp * accumulation
    num_steps = total_rows // global_batch
    dropped = total_rows - num_steps * global_batch
    if num_steps == 0:
        raise UserError(
            f"the data gives {total_rows} row(s) of {max_length} tokens, less than one global "
            f"batch of {global_batch}; use more data or epochs, a smaller --max_length, "
            "--batch_size or --accumulation_steps."
        )
    limits: Sequence[int | None] = (
        training.max_steps,
        None if training.max_tokens is None else training.max_tokens // (global_batch * max_length),
    )
    for limit in limits:
        if limit is not None and limit < num_steps:
            num_steps, dropped = limit, 0
    if num_steps == 0:
        raise UserError(
            f"--max_tokens {training.max_tokens} is less than one step of "
            f"{global_batch * max_length} tokens."
        )
    return BatchPlan(
        training.batch_size,
        layout.dp,
        accumulation,
        max_length,
        num_steps,
        dropped,
        training.warmup_steps,
    )

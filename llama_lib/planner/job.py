"""What the planner has to know of a run.

Invariant: a `Job` is what the run would do with the same options; two equal jobs take the same
memory and the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_lib.config import Options
from llama_lib.errors import UserError
from llama_lib.layout import Layout, accumulation_of, chunked_loss_problems, layout_of
from llama_lib.models import Shape

# Logits that exist at a time with --chunked_loss, in elements: tokens times vocabulary. 256 MiB of
# fp32 on a GPU, small beside a layer's activations; products of 2,000 tokens run at full speed.
CHUNK_ELEMENTS = 2**26

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Job:
    """One run on GPUs (or CPU processes) of one kind.

    Attributes:
        batch_size: rows per replica and micro-step, as --batch_size.
        accumulation: micro-steps per optimizer step.
        microbatch_size: rows of one forward pass: --microbatch_size in a pipeline, else batch_size.
        max_length: tokens per row.
        precision: fp16, bf16 or fp32.
        recompute: none, selective or full.
        flash: the attention kernel keeps no scores for the backward pass.
        chunked_loss: logits exist a chunk of tokens at a time, not whole.
        offload_optim_frac, offload_param_frac: gemini's shares in host memory, 0 to 1.
        gpus_per_host: processes that share one host's memory.
        lora_parameters: parameters of the adapters; 0: the whole model is trained.
    """

    shape: Shape
    layout: Layout
    batch_size: int
    accumulation: int
    microbatch_size: int
    max_length: int
    precision: str
    recompute: str = "none"
    flash: bool = True
    chunked_loss: bool = True
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    gpus_per_host: int = 8
    lora_parameters: int = 0

    @property
    def model_chunks(self) -> int:
        """Parts of the model on each pipeline stage: 1, or more when interleaved."""
        return self.layout.model_chunks

    @property
    def element(self) -> int:
        """Bytes of a number in the working precision."""
        return BYTES[self.precision]

    @property
    def processes_per_host(self) -> int:
        """Processes that share a host; of the first one, which is full."""
        return min(self.gpus_per_host, self.layout.world_size)

    @property
    def micro_batches(self) -> int:
        """Forward passes of one replica per optimizer step."""
        return self.batch_size * self.accumulation // self.microbatch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.layout.dp * self.max_length


def job_of(options: Options, shape: Shape, world_size: int, gpus_per_host: int) -> Job:
    """The job of a run's options; `layout_problems` must have passed them.

    Args:
        world_size: processes of the run, one for each GPU.

    Raises:
        UserError: --global_batch_tokens is not a whole number of micro-steps.
    """
    layout = layout_of(options, world_size)
    model, parallel, training = options.model, options.parallel, options.training
    max_length = model.max_length
    if "max_length" not in options.typed:
        max_length = min(max_length, shape.max_position_embeddings)  # as preflight bends it
    accumulation = accumulation_of(options, layout.dp, max_length)
    if isinstance(accumulation, str):
        raise UserError(accumulation)
    microbatch_size = (parallel.microbatch_size or 1) if layout.pp > 1 else training.batch_size
    return Job(
        shape=shape,
        layout=layout,
        batch_size=training.batch_size,
        accumulation=accumulation,
        microbatch_size=microbatch_size,
        max_length=max_length,
        precision=training.mixed_precision,
        recompute=options.recompute,
        flash=keeps_no_scores(options),
        chunked_loss=loss_is_chunked(options, layout),
        offload_optim_frac=parallel.offload_optim_frac,
        offload_param_frac=parallel.offload_param_frac,
        gpus_per_host=min(gpus_per_host, world_size),
        lora_parameters=lora_parameters(options, shape),
    )


def keeps_no_scores(options: Options) -> bool:
    """Whether attention is a fused kernel: SDPA, FlexAttention or ColossalAI's flash attention.

    Sequence parallelism without -a uses ColossalAI's own attention, which keeps all scores.
    """
    return options.parallel.sp_mode is None or options.model.flash_attention


def loss_is_chunked(options: Options, layout: Layout) -> bool:
    """Whether --chunked_loss holds in this layout."""
    return options.model.chunked_loss and not chunked_loss_problems(layout)


def lora_parameters(options: Options, shape: Shape) -> int:
    """Parameters of the adapters the options ask for: rank * (inputs + outputs) of each layer."""
    rank = options.model.lora_rank
    if not rank:
        return 0
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    widths = {
        "q_proj": hidden + query,
        "k_proj": hidden + key,
        "v_proj": hidden + key,
        "o_proj": query + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    targets = [name for name in options.model.lora_targets if name in widths]
    return rank * shape.num_hidden_layers * sum(widths[name] for name in targets)

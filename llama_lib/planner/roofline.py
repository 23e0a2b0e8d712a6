"""How long a step takes: arithmetic, memory traffic, interconnect, pipeline and host, one by one.

Invariant: a time is made of the job's counts, data sheet rates and the constants below alone; none
of them belongs to one row, so what the published rows deviate by is what a prediction may.

What is taken to overlap is what the engine overlaps: gradients are reduced during the backward
pass (not in a pipeline); gemini gathers weights when they are needed (it is built without
prefetch), zero2 and hybrid_parallel gather the updated weights after the step; of tensor
parallelism the five all-reduces of a layer's backward pass run beside its weight gradients, the
two of its forward pass beside nothing; a stage of a pipeline waits for what it sends and receives.

Not in the model: waiting for data, kernels too small to fill a GPU (models below some 500M
parameters), stragglers, and what rank 0 does alone.
"""

from dataclasses import dataclass, field

from llama_lib.flops import matmul_parameters, num_parameters
from llama_lib.planner.hardware import Machines
from llama_lib.planner.job import Job
from llama_lib.planner.memory import offloaded_share, stage_layers, weights_return

# Share of the dense peak that the matrix products of a layer reach, beside their memory traffic,
# which is counted apart. One number for each generation, fitted to ColossalAI's published rows
# (tests/planner/test_roofline.py lists them all): four on A100 and A800, two on H200, two on B200.
# Those runs recomputed every layer, counted as this project does it: without its last product.
# Large square products alone reach 0.87 on A100 and 0.80 on H100 (ml-engineering's table).
LINEAR_SHARE = {"ampere": 0.66, "hopper": 0.565, "blackwell": 0.53}

# Share of the peak that the attention kernel reaches on the scores a causal mask leaves:
# FlashAttention-2 (arXiv 2307.08691, figure 5: 170 to 200 of 312 on an A100 at 4k); on Hopper 35%
# (FlashAttention-3, arXiv 2407.08608, section 1); Blackwell has no published number: as many
# FLOPS as on Hopper.
ATTENTION_SHARE = {"ampere": 0.58, "hopper": 0.35, "blackwell": 0.35 * 989.4 / 2250}

# Generations without a published row take the numbers of this one; the plan says so.
FALLBACK_FAMILY = "ampere"

# The attention kernel's backward pass computes the scores again: 5 products instead of 2.
ATTENTION_BACKWARD = 2.5

# Share of the data sheet's rate that long element-wise kernels get from device memory, collectives
# from links and copies from PCI Express. Chosen; not measured.
MEMORY_SHARE = 0.8
LINK_SHARE = 0.8

# Bytes that element-wise kernels move per number and forward pass, for torch's own kernels in 16
# bits, counted from transformers' modeling_llama: a norm casts, squares, averages, scales, casts
# back and multiplies (36), a residual reads twice and writes (6), each twice a layer; rotation of
# queries and keys (18); SwiGLU reads, writes, reads twice and writes (10). Backward passes take
# twice as much.
NORM_BYTES = 2 * 36 + 2 * 6
ROTARY_BYTES = 18
SWIGLU_BYTES = 10
BACKWARD_TRAFFIC = 2
# Casting logits to fp32, softmax and loss, and back: per logit, both passes.
LOGIT_BYTES = 30
# Scores of eager attention: product, mask, softmax in fp32 and casts; per score, forward.
SCORE_BYTES = 22

# An AdamW step reads and writes master weight, two moments and the working weight, reads the
# gradient, and the norm and the clipping pass over the gradient before it.
UPDATE_BYTES = 40
# Parameters per second that one host updates with a vectorised AdamW: 2.57 s for 10B (ZeRO-Offload,
# arXiv 2101.06840, table 4).
HOST_UPDATE_RATE = 3.9e9

GIGA = 1e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they are spent on, and the tokens it trains.

    `parts`: matmul, attention, memory (element-wise kernels), network (collectives that nothing
    hides, messages between stages), bubble (pipeline stages that wait), optimizer, offload (PCI
    Express and the host's update).
    """

    parts: dict[str, float]
    tokens: int
    num_gpus: int
    unknown: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.seconds

    def hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 3600


def fitted(family: str) -> bool:
    """Whether the efficiencies of a generation come from published rows."""
    return family in LINEAR_SHARE


def step_time(job: Job, machines: Machines, evicted: int = 0) -> StepTime | None:
    """The predicted time of one step; None where the card's peak is unknown, and for fp32.

    A rate that is unknown leaves its part out, and `unknown` names it.

    Args:
        evicted: bytes of weights on a GPU that gemini_auto moves to the host and back in each pass.
    """
    if machines.gpu.tflops is None or job.precision == "fp32":
        return None
    layout = job.layout
    work = _Stage(job, machines)
    forward_backward = {
        "matmul": work.matmul,
        "attention": work.attention,
        "memory": work.memory,
        "network": work.tensor_parallel,
    }
    micro_batches = job.micro_batches
    parts = {name: seconds * micro_batches for name, seconds in forward_backward.items()}
    # Interleaved, a stage waits for parts of the model that are so much shorter.
    parts["bubble"] = (layout.pp - 1) * sum(forward_backward.values()) / job.model_chunks
    backward = work.backward * micro_batches
    parts["network"] += _exchange(job, machines, backward) + _messages(job, machines)
    parts["optimizer"], parts["offload"] = _update(job, machines, evicted)
    return StepTime(parts, job.tokens_per_step, layout.world_size, _unknown(job, machines))


class _Stage:
    """Seconds of forward and backward of one micro-batch on the busiest pipeline stage."""

    def __init__(self, job: Job, machines: Machines) -> None:
        shape, layout, gpu = job.shape, job.layout, machines.gpu
        family = gpu.family if fitted(gpu.family) else FALLBACK_FAMILY
        assert gpu.tflops is not None
        peak = gpu.tflops * 1e12
        layers, head = _busiest_stage(job)
        # split_gather shares out the tokens of the tensor group, which its matmuls share anyway.
        tokens = job.microbatch_size * job.max_length / layout.sequence_axis
        full = job.recompute == "full"
        recomputed = 0.0 if job.recompute == "none" else 1.0

        # Frozen weights have no gradients of their own: adapters save one product of three.
        layer_parameters = matmul_parameters(shape) - shape.vocab_size * shape.hidden_size
        # Recomputing a layer stops before its last product, down_proj's, which no gradient needs.
        last = shape.hidden_size * shape.intermediate_size * shape.num_hidden_layers
        again = (1 - last / layer_parameters) if full else 0.0
        once = 2 if job.lora_parameters else 3
        passes = once + again
        linear = 2 * layer_parameters * layers / shape.num_hidden_layers * passes
        linear += 2 * shape.vocab_size * shape.hidden_size * head * once
        linear += 6 * job.lora_parameters * layers / shape.num_hidden_layers
        self.matmul = linear * tokens / layout.tp / (peak * LINEAR_SHARE[family])

        width = shape.num_attention_heads * shape.head_dim
        scores = 4 * width * job.max_length * (0.5 if job.flash else 1.0)
        attention = scores * layers * (1 + ATTENTION_BACKWARD + full)
        share = ATTENTION_SHARE if job.flash else LINEAR_SHARE
        self.attention = attention * tokens / layout.tp / (peak * share[family])

        traffic = _traffic(job, layers) * (1 + BACKWARD_TRAFFIC + recomputed)
        traffic += LOGIT_BYTES * shape.vocab_size * head / layout.tp
        self.memory = _seconds(traffic * tokens, gpu.bandwidth, MEMORY_SHARE)

        # What of the three products' time is the weight gradients', beside which tp communicates.
        gradients = self.matmul / passes
        self.tensor_parallel = _tensor_parallel(job, machines, layers, tokens, gradients)
        self.tensor_parallel += _sequence_parallel(job, machines, layers, tokens)
        whole = self.matmul + self.attention + self.memory
        self.backward = whole * (passes - 1) / passes


def _busiest_stage(job: Job) -> tuple[int, int]:
    """(layers, heads) of the stage with most work; the last stage has the head."""
    shape = job.shape
    layers = stage_layers(shape.num_hidden_layers, job.layout.pp, job.model_chunks)
    head = shape.vocab_size * shape.hidden_size
    of_a_layer = (matmul_parameters(shape) - head) / shape.num_hidden_layers
    work: list[float] = [count * of_a_layer for count in layers]
    work[-1] += head
    busiest = work.index(max(work))
    return layers[busiest], int(busiest == job.layout.pp - 1)


def _traffic(job: Job, layers: float) -> float:
    """Bytes per token that element-wise kernels of these layers move in one forward pass."""
    shape, layout = job.shape, job.layout
    heads = shape.num_attention_heads + shape.num_key_value_heads
    # Norms and residuals see every feature of a token on each rank of the tensor group, unless
    # that shares out the tokens.
    whole: float = NORM_BYTES * shape.hidden_size
    if layout.sp_mode == "split_gather":
        whole /= layout.tp
    shared: float = ROTARY_BYTES * heads * shape.head_dim + SWIGLU_BYTES * shape.intermediate_size
    if not job.flash:
        shared += SCORE_BYTES * shape.num_attention_heads * job.max_length
    return layers * (whole + shared / layout.tp) * job.element / 2


def _seconds(volume: float, rate: float | None, share: float) -> float:
    return 0.0 if rate is None else volume / (rate * GIGA * share)


def collective(machines: Machines, volume: float, stride: int, size: int) -> float:
    """Seconds of an all-gather or reduce-scatter over every `stride`-th of stride * size ranks.

    Each member ends up with, or starts from, `volume` bytes. NCCL's rings enter a host once, so its
    members share what comes over the network; members of other groups on the host take their part
    of the rate.
    """
    if size == 1:
        return 0.0
    per_host = machines.gpus_per_host
    together = max(1, min(size, per_host // stride))
    inside = _seconds(volume * (size - 1) / size, machines.gpu.link, LINK_SHARE)
    hosts = -(-size // together)
    if hosts == 1:
        return inside
    share_of_host = min(1.0, together / min(per_host, stride * size))
    network = None if machines.network is None else machines.network * share_of_host
    across = _seconds(volume * (hosts - 1) / hosts, network, LINK_SHARE)
    return max(across, inside if together > 1 else 0.0)


def _tensor_parallel(
    job: Job, machines: Machines, layers: float, tokens: float, weight_gradients: float
) -> float:
    """All-reduces that nothing hides: two in a forward pass, and what five in the backward pass
    (one each for the inputs of q, k, v, gate and up) take longer than the weight gradients."""
    tp = job.layout.tp
    if tp == 1:
        return 0.0
    volume = tokens * job.shape.hidden_size * job.element
    one = 2 * collective(machines, volume, 1, tp) * layers
    forward = 2 * one * (2 if job.recompute == "full" else 1)
    return forward + max(0.0, 5 * one - weight_gradients)


def _sequence_parallel(job: Job, machines: Machines, layers: float, tokens: float) -> float:
    """All-to-all of queries, keys, values and outputs, in both passes."""
    shape, size = job.shape, job.layout.sequence_axis
    if size == 1:
        return 0.0
    heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
    volume = tokens * heads * shape.head_dim * job.element
    return 2 * layers * collective(machines, volume, 1, size)


def _messages(job: Job, machines: Machines) -> float:
    """Seconds in which a stage hands on its outputs and their gradients; it waits for them.

    Neighbouring stages are tp ranks apart. Where a replica is on more than one host the slowest of
    them sets the pace, each rank with its part of the host's network.
    """
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    rate = machines.gpu.link
    if layout.tp * layout.pp > machines.gpus_per_host:
        network = machines.network
        rate = None if network is None else network / machines.gpus_per_host
    volume = job.microbatch_size * job.max_length * job.shape.hidden_size * job.element
    return 2 * job.micro_batches * job.model_chunks * _seconds(volume, rate, LINK_SHARE)


def _exchange(job: Job, machines: Machines, backward: float) -> float:
    """Seconds of exchanging gradients and weights among replicas that the backward pass leaves.

    Args:
        backward: seconds of all backward passes of a step.
    """
    layout = job.layout
    replicas = layout.dp * layout.sequence_axis
    parameters = num_parameters(job.shape) / (layout.tp * layout.pp)
    trained = job.lora_parameters or parameters
    stride = layout.tp * layout.pp
    once = collective(machines, trained * job.element, stride, replicas)
    if layout.plugin.startswith("gemini"):
        gathers = 2 if job.recompute == "none" else 3
        reduced = job.accumulation * once
        gathered = job.accumulation * gathers * once
    elif layout.zero_stage == 2:
        # Gradients are partitioned, so every micro-step reduces its own.
        reduced, gathered = job.accumulation * once, once
    elif layout.zero_stage == 1:
        # ColossalAI's stage 1 reduces all gradients to all ranks, once a step.
        reduced, gathered = 2 * once, once
    else:
        reduced, gathered = 2 * once, 0.0
    # Without partitioned gradients only the last micro-step reduces.
    partitioned = layout.plugin.startswith("gemini") or layout.zero_stage == 2
    beside = backward if partitioned else backward / max(1, job.accumulation)
    hidden = 0.0 if layout.pp > 1 else min(reduced, beside)
    return gathered + reduced - hidden


def _update(job: Job, machines: Machines, evicted: int) -> tuple[float, float]:
    """(seconds of the update on the GPU, of moving to and updating on the host)."""
    layout, gpu = job.layout, machines.gpu
    replicas = layout.dp * layout.sequence_axis if layout.zero_stage else 1
    per_rank = num_parameters(job.shape) / (layout.tp * layout.pp)
    own = (job.lora_parameters or per_rank) / replicas
    on_host = offloaded_share(job)
    update = _seconds(own * (1 - on_host) * UPDATE_BYTES, gpu.bandwidth, MEMORY_SHARE)
    # Gradients down, every micro-step; new weights up.
    moved = own * on_host * job.element * (job.accumulation + 1)
    # Down and up again each time that the weights are gathered.
    gathers = 2 if job.recompute == "none" else 3
    leaving = per_rank / replicas * weights_return(job) * job.element + evicted
    moved += leaving * 2 * gathers * job.accumulation
    host = _seconds(moved, gpu.pcie, LINK_SHARE)
    processes = min(machines.gpus_per_host, layout.world_size)
    host += own * on_host * processes / HOST_UPDATE_RATE
    return update, host


def _unknown(job: Job, machines: Machines) -> tuple[str, ...]:
    """Rates of this run's way that are not known: their part of the time is left out."""
    gpu, layout = machines.gpu, job.layout
    missing = []
    if gpu.bandwidth is None:
        missing.append("memory bandwidth of the GPU")
    if gpu.link is None and layout.world_size > 1 and machines.gpus_per_host > 1:
        missing.append("links between the GPUs of a host")
    if machines.network is None and machines.spanning(layout.world_size) > 1:
        missing.append("network between hosts")
    if gpu.pcie is None and offloaded_share(job):
        missing.append("way from the GPU to host memory")
    return tuple(missing)

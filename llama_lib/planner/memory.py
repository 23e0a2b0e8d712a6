"""Bytes of a run per GPU and per host, by what they hold.

Invariant: what ColossalAI 0.5.0 allocates, as its code says and as tests/distributed/
test_plan_memory.py finds it in living engines; nothing is rounded up, no reserve is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_lib.models import Shape, padded_vocabulary
from llama_lib.planner.activations import (
    layer_bytes,
    loss_peak_bytes,
    micro_batch_bytes,
    recomputed_bytes,
)
from llama_lib.planner.chunks import gemini_chunks
from llama_lib.planner.job import Job

KINDS = ("weights", "gradients", "master", "optimizer", "activations", "logits", "buffers")

# ColossalAI's reduce_bucket_size_in_m and zero_bucket_size_in_m, in elements.
ZERO_BUCKET = 12 * 2**20
MASTER = 4  # bytes of an fp32 number
MOMENTS = 8  # AdamW's two, fp32

# The three moments of a step at which memory can be at its highest.
LOSS = "loss"
END_OF_BACKWARD = "end of the backward pass"
STEP = "optimizer step"

Bytes = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU and of one host; of a pipeline the stage that needs most.

    Attributes:
        device: bytes of one GPU by kind (`KINDS`), each kind at its own largest.
        host: bytes of one host's memory by kind, all its processes together; the processes'
            own memory (interpreter, libraries, data) left out.
        moments: bytes of one GPU by kind at each moment of a step; not everything is there at
            once, so `device_total` is the largest sum of one moment.
        evictable: bytes of `device` that gemini_auto moves to the host where the GPU is too small.
        stage: the pipeline stage this is.
    """

    device: Bytes
    host: Bytes
    moments: dict[str, Bytes] = field(default_factory=dict)
    evictable: int = 0
    stage: int = 0

    @property
    def device_total(self) -> int:
        """The peak of one GPU."""
        return sum(self.moments[self.moment].values())

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def memory(job: Job) -> Memory:
    """What a run takes in its second and later steps."""
    stages = [stage_memory(job, stage) for stage in range(job.layout.pp)]
    return max(stages, key=lambda each: each.device_total)


# -- parameters ------------------------------------------------------------------------------------


def stage_layers(layers: int, stages: int, chunks: int = 1) -> list[int]:
    """Decoder layers of each pipeline stage; ColossalAI gives the middle ones what is left over.

    Args:
        chunks: parts of the model on each stage; stage s has parts s, s + stages, ...
    """
    parts = stages * chunks
    counts = [layers // parts] * parts
    rest = layers % parts
    first = parts // 2 - rest // 2
    for part in range(first, first + rest):
        counts[part] += 1
    return [sum(counts[stage::stages]) for stage in range(stages)]


def passes_in_flight(job: Job, stage: int) -> int:
    """Forward passes of one part of the model that a stage has done ahead of their backward pass,
    the one under way included, at the most."""
    layout, chunks = job.layout, job.model_chunks
    if layout.pp == 1:
        return 1
    ahead = layout.pp - stage - 1
    if chunks > 1:  # interleaved
        ahead = 2 * ahead + (chunks - 1) * layout.pp
    return min(ahead + 1, job.micro_batches * chunks)


def local_parameters(job: Job, stage: int = 0) -> tuple[int, ...]:
    """Elements of every parameter of one process, in the model's order."""
    shape, layout = job.shape, job.layout
    first, last = stage == 0, stage == layout.pp - 1
    embedding, head = _embedding(shape, job), _head(shape, job)
    layer = _layer_parameters(shape, layout.tp)
    count = stage_layers(shape.num_hidden_layers, layout.pp, job.model_chunks)[stage]
    return (
        *((embedding,) if first else ()),
        *(layer * count),
        *((shape.hidden_size,) if last else ()),
        *((head,) if last and not shape.tie_word_embeddings else ()),
    )


def _embedding(shape: Shape, job: Job) -> int:
    rows = shape.vocab_size
    if job.layout.plugin == "hybrid_parallel":
        tp = job.layout.tp
        # A whole embedding is padded for the sake of the head only, when the two are one.
        if tp > 1 or shape.tie_word_embeddings:
            rows = padded_vocabulary(rows, tp) // tp
    return rows * shape.hidden_size


def _head(shape: Shape, job: Job) -> int:
    rows = shape.vocab_size
    if job.layout.plugin == "hybrid_parallel":
        rows = padded_vocabulary(rows, job.layout.tp) // job.layout.tp
    return rows * shape.hidden_size


def _layer_parameters(shape: Shape, tp: int) -> tuple[int, ...]:
    """A decoder layer: norms and the biases of row-parallel layers are whole on every rank."""
    hidden, inner = shape.hidden_size, shape.intermediate_size // tp
    query = shape.num_attention_heads * shape.head_dim // tp
    key = shape.num_key_value_heads * shape.head_dim // tp
    sizes: list[int] = []
    for weight, bias, has_bias in (
        (hidden * query, query, shape.attention_bias),
        (hidden * key, key, shape.attention_bias),
        (hidden * key, key, shape.attention_bias),
        (query * hidden, hidden, shape.attention_bias),
        (hidden * inner, inner, shape.mlp_bias),
        (hidden * inner, inner, shape.mlp_bias),
        (inner * hidden, hidden, shape.mlp_bias),
    ):
        sizes += [weight, bias] if has_bias else [weight]
    return (*sizes, hidden, hidden)


# -- plugins ---------------------------------------------------------------------------------------


@dataclass
class _States:
    """What a plugin keeps of the model on one process.

    `device` is there at all times, and so is `host`, which all processes of a host have together;
    the others come on top at their moment. `gradients` are those of the micro-batches before, which
    exist beside the activations of the next one.
    """

    device: Bytes
    host: Bytes
    gradients: int
    at_loss: Bytes
    at_end: Bytes
    at_step: Bytes
    evictable: int = 0


def _zero_states(job: Job, sizes: tuple[int, ...], stage: int, offloaded: bool) -> _States:
    """LowLevelZeroOptimizer: whole weights, fp32 master weights and moments in equal parts.

    Every trained parameter is padded to a multiple of the ranks. Stage 1 keeps the gradients of all
    parts, stage 2 the own one; the step makes fp32 copies of the own part.
    """
    ranks = job.layout.dp * job.layout.sequence_axis
    element = job.element
    frozen, trained = _trained(job, sizes)
    shards = [-(-size // ranks) for size in trained]
    own, padded = sum(shards), sum(shards) * ranks
    gradients = element * (own if stage == 2 else padded)
    master, moments = MASTER * own, MOMENTS * own
    copies = 0 if element == MASTER and not offloaded else MASTER * own
    largest = max(trained)
    bucket = max(min(ZERO_BUCKET, sum(trained)), largest)
    # A full bucket beside its flat copy and the part that is kept of it; the whole gradients are
    # there already in stage 1.
    reducing = element * bucket * (2 if stage == 2 else 1) + element * bucket // ranks
    gathering = element * min(ZERO_BUCKET, own) * (2 + ranks)
    norm = 8 * max(shards)  # one gradient at a time in fp64
    device = {"weights": element * (frozen + padded)}
    host: Bytes = {}
    buckets = 0
    if job.layout.plugin == "hybrid_parallel" and ranks == job.layout.pp == 1:
        buckets = element * sum(trained)  # the plugin wraps a single replica in torch's DDP
    if offloaded:
        processes = job.processes_per_host
        host = {"master": master, "optimizer": moments, "gradients": copies}
        host = {kind: processes * count for kind, count in host.items()}
        copies = 0
    else:
        device |= {"master": master, "optimizer": moments}
    return _States(
        device,
        host,
        gradients,
        at_loss={"buffers": buckets},
        at_end={"gradients": gradients, "buffers": buckets + reducing},
        # The fp32 copies are gone when the new weights are gathered.
        at_step={
            "gradients": gradients + copies,
            "buffers": buckets + max(norm, gathering - copies),
        },
    )


def _whole_states(job: Job, sizes: tuple[int, ...]) -> _States:
    """hybrid_parallel with ZeRO stage 0: everything whole on every data-parallel rank."""
    element = job.element
    frozen, trained = _trained(job, sizes)
    count = sum(trained)
    # torch's DDP keeps buckets as large as all gradients beside them; pipelines go without it.
    buckets = element * count if job.layout.pp == 1 else 0
    device = {"weights": element * (frozen + count), "optimizer": MOMENTS * count}
    if element != MASTER:
        device["master"] = MASTER * count
    gradients = element * count
    norm = 8 * max(trained)
    return _States(
        device,
        {},
        gradients,
        at_loss={"buffers": buckets},
        at_end={"gradients": gradients, "buffers": buckets},
        # The fp32 copies take the place of the gradients, parameter by parameter.
        at_step={"gradients": MASTER * count, "buffers": buckets + norm},
    )


def _gemini_states(job: Job, sizes: tuple[int, ...]) -> _States:
    """Gemini: every rank a part of each chunk, once in the working precision, once in fp32.

    Without accumulation the working chunk of a weight becomes that of its gradient, so gradients
    take no memory of their own; with accumulation they have chunks of their own.
    """
    element, ranks = job.element, job.layout.world_size
    chunks = gemini_chunks(job.shape, sizes, ranks)
    counts = [(chunk.size, chunk.parameters) for chunk in chunks]
    parts = [chunk.size // ranks for chunk in chunks]
    # AdamW's moments are made for the used elements; the first rank has the fewest unused ones.
    used = [min(part, chunk.used) for part, chunk in zip(parts, chunks, strict=True)]
    away = _offloaded_chunks(job, counts)
    here = [not gone for gone in away]
    whole, stay, leave = sum(parts), _of(parts, here), _of(parts, away)
    accumulating = job.accumulation > 1
    largest = max(chunk.size for chunk in chunks)
    # The chunk in use and the one being reduced are whole; so is one weight's gradient.
    gathered = element * (2 * largest + max(sizes))
    weights_leave = _weights_are_evicted(job, counts)
    weights = 0 if weights_leave else element * whole
    # The working parts of offloaded chunks are on the host from the gradient's reduction until the
    # next forward pass takes the weights from the fp32 ones.
    after = element * stay
    device = {"master": MASTER * stay, "optimizer": MOMENTS * _of(used, here)}
    gradients = element * stay if accumulating else 0
    processes = job.processes_per_host
    on_host = [min(processes * part, c.used) for part, c in zip(parts, chunks, strict=True)]
    host = {
        "weights": processes * element * leave if accumulating else 0,
        "gradients": processes * element * leave,
        "master": processes * MASTER * leave,
        "optimizer": MOMENTS * _of(on_host, away),
        # With a GPU the plugin pins a host copy of every chunk, offloaded or not.
        "buffers": processes * (element * (2 if accumulating else 1) + MASTER) * stay,
    }
    return _States(
        device,
        host,
        gradients,
        at_loss={"weights": weights, "buffers": gathered},
        at_end={"weights": after, "gradients": gradients, "buffers": gathered},
        at_step={"weights": after, "gradients": gradients},
        evictable=weights if job.layout.plugin == "gemini_auto" else 0,
    )


def _of(numbers: list[int], chosen: list[bool]) -> int:
    return sum(number for number, taken in zip(numbers, chosen, strict=True) if taken)


def _offloaded_chunks(job: Job, chunks: list[tuple[int, int]]) -> list[bool]:
    """Of each chunk (size, parameters), whether its fp32 weights and moments are on the host.

    gemini's share is of a sum that counts a chunk once for each of its parameters, so more is
    offloaded than the fraction says; it goes through the chunks in no particular order.
    """
    if job.layout.plugin == "gemini_auto":
        return [True] * len(chunks)
    wanted = job.offload_optim_frac * sum(size * count for size, count in chunks)
    away, gone = [], 0
    for size, _ in chunks:
        away.append(gone < wanted)
        gone += size if gone < wanted else 0
    return away


def _weights_are_evicted(job: Job, chunks: list[tuple[int, int]]) -> bool:
    """Whether the weights' parts return to the host after each use.

    ColossalAI does so when the few chunks in use are more than the share that may stay; of shares
    below one nearly all of the weights come to the GPU in the first pass and stay there.
    """
    kept = (1 - job.offload_param_frac) * sum(size * count for size, count in chunks)
    return job.offload_param_frac > 0 and kept < max(size for size, _ in chunks)


def _chunk_counts(job: Job) -> list[tuple[int, int]]:
    chunks = gemini_chunks(job.shape, local_parameters(job), job.layout.world_size)
    return [(chunk.size, chunk.parameters) for chunk in chunks]


def offloaded_share(job: Job) -> float:
    """Share of master weights and moments that is in host memory, 0 to 1."""
    if job.layout.plugin in ("zero2_cpu", "gemini_auto"):
        return 1.0
    if job.layout.plugin != "gemini" or not job.offload_optim_frac:
        return 0.0
    counts = _chunk_counts(job)
    sizes = [size for size, _ in counts]
    return _of(sizes, _offloaded_chunks(job, counts)) / sum(sizes)


def weights_return(job: Job) -> bool:
    """Whether gemini moves the weights back to the host after each use."""
    return job.offload_param_frac > 0 and _weights_are_evicted(job, _chunk_counts(job))


def _trained(job: Job, sizes: tuple[int, ...]) -> tuple[int, list[int]]:
    """Frozen elements, and the sizes of the trained parameters (adapters: all as one)."""
    if job.lora_parameters:
        return sum(sizes), [job.lora_parameters]
    return 0, list(sizes)


def _states(job: Job, stage: int) -> _States:
    sizes = local_parameters(job, stage)
    plugin = job.layout.plugin
    if plugin.startswith("gemini"):
        return _gemini_states(job, sizes)
    if plugin in ("zero2", "zero2_cpu"):
        return _zero_states(job, sizes, 2, offloaded=plugin == "zero2_cpu")
    if job.layout.zero_stage == 0:
        return _whole_states(job, sizes)
    return _zero_states(job, sizes, job.layout.zero_stage, offloaded=False)


# -- a step ----------------------------------------------------------------------------------------


def stage_memory(job: Job, stage: int) -> Memory:
    """`memory` of one stage of a pipeline, counted from 0."""
    layout = job.layout
    states = _states(job, stage)
    layers = stage_layers(job.shape.num_hidden_layers, layout.pp, job.model_chunks)[stage]
    first, last = stage == 0, stage == layout.pp - 1
    # Of several parts one holds the embedding and one the head: counted as if each did.
    saved = passes_in_flight(job, stage) * micro_batch_bytes(job, layers, first, last)
    saved //= job.model_chunks
    logits = loss_peak_bytes(job) if last else 0
    recomputed = recomputed_bytes(job)
    mask = 0
    if layout.sp_mode is not None and not job.flash:
        mask = job.element * job.max_length**2  # additive, and the same for all rows
    loss = {
        # Recomputation begins when the logits are gone: the larger of the two counts.
        "activations": saved + max(0, recomputed - logits),
        "logits": logits,
        "gradients": states.gradients if job.micro_batches > 1 else 0,
    }
    end = {"activations": layer_bytes(job) + recomputed}
    moments = {
        LOSS: _sum(states.device, states.at_loss, loss, {"buffers": mask}),
        END_OF_BACKWARD: _sum(states.device, states.at_end, end, {"buffers": mask}),
        STEP: _sum(states.device, states.at_step, {"buffers": mask}),
    }
    return Memory(
        device={kind: max(moment[kind] for moment in moments.values()) for kind in KINDS},
        host={kind: states.host.get(kind, 0) for kind in KINDS},
        moments=moments,
        evictable=states.evictable,
        stage=stage,
    )


def _sum(*parts: Bytes) -> Bytes:
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in KINDS}

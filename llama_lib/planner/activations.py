"""Bytes that one forward pass keeps for its backward pass, by part of the model.

Invariant: every term is one tensor that autograd saves, each storage counted once, weights left
out. All terms are measured on the CPU by saved-tensor hooks (tests/planner/test_activations.py);
the fused attention kernels of CUDA keep the same tensors (query, key, value, output and the
logarithm of the softmax's sum; aten's backward signatures), beside a few bytes of random state.

Not modelled: the masks of --document_mask; what adapters keep between their two matrices (rank
numbers a token and linear layer; every linear layer is taken to have one); that fused RMSNorm,
rotary and SwiGLU kernels keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_lib.models import padded_vocabulary
from llama_lib.planner.job import CHUNK_ELEMENTS, Job


@dataclass(frozen=True)
class Sizes:
    """Sizes of one micro-batch on one process, after tensor and sequence parallelism.

    Attributes:
        tokens: tokens of the residual stream between attention and MLP.
        gathered: tokens inside attention and MLP (split_gather gathers them there).
        query, key: numbers per token of all local heads and of all local key-value heads.
        heads: local attention heads.
        inner: local width of the MLP.
        scores: elements of the local attention scores.
        vocabulary: local rows of the output head.
        head_tokens: tokens the output head sees.
    """

    tokens: int
    gathered: int
    query: int
    key: int
    heads: int
    hidden: int
    inner: int
    scores: int
    vocabulary: int
    head_tokens: int
    element: int


def sizes_of(job: Job) -> Sizes:
    """What ColossalAI divides by tp and sp, and what it keeps whole (norms, the hidden width)."""
    shape, layout = job.shape, job.layout
    rows, length = job.microbatch_size, job.max_length
    tokens = rows * length
    tp, sequence = layout.tp, layout.sequence_axis
    split = layout.sp_mode == "split_gather"
    # Under all_to_all attention has all tokens of a part of the heads, outside it is the reverse.
    heads = shape.num_attention_heads // tp
    vocabulary = shape.vocab_size
    if layout.plugin == "hybrid_parallel":
        # tp leaves the padding out of the logits again, on the last rank.
        vocabulary = padded_vocabulary(vocabulary, tp) // tp if tp > 1 else vocabulary
    return Sizes(
        tokens=tokens // (tp if split else sequence),
        gathered=tokens // sequence,
        query=heads * shape.head_dim,
        key=shape.num_key_value_heads // tp * shape.head_dim,
        heads=heads,
        hidden=shape.hidden_size,
        inner=shape.intermediate_size // tp,
        scores=rows * heads // sequence * length * length,
        vocabulary=vocabulary,
        head_tokens=tokens // sequence,
        element=job.element,
    )


def _norm(sizes: Sizes, trained: bool) -> int:
    """RMSNorm as transformers writes it, without its output: the fp32 input and the inverse root
    of its mean square, and, for the weight's gradient, the normalised input."""
    normalised = sizes.element * sizes.hidden if trained else 0
    return sizes.tokens * (4 * sizes.hidden + 4 + normalised)


def _attention(job: Job, sizes: Sizes) -> int:
    """Query, key and value as the kernel takes them (key and value repeated for every head), its
    output as it leaves it and as the output projection takes it, and what the kernel adds."""
    one = sizes.element * sizes.gathered * sizes.query
    if job.flash:
        return 5 * one + 4 * sizes.gathered * sizes.heads
    # ColossalAI's own attention: the softmax in fp32, and cast for the product with the values.
    scores = sizes.scores * (4 if job.precision == "fp32" else 4 + sizes.element)
    return 4 * one + scores


def _products(job: Job) -> int:
    """What selective recomputation keeps: the results of a layer's matrix products, the last one
    left out, and those of its attention kernel (llama_lib/recompute.py)."""
    sizes = sizes_of(job)
    linear = sizes.query + 2 * sizes.key + 2 * sizes.inner
    narrow = sizes.tokens * sizes.hidden
    if job.lora_parameters:
        # Every layer's own product and its adapter's: of down_proj the adapter's is the last one.
        linear, narrow = 2 * linear, 3 * narrow
    wide = sizes.gathered * (linear + sizes.query)
    attention = 4 * sizes.gathered * sizes.heads if job.flash else sizes.element * sizes.scores
    return sizes.element * (wide + narrow) + attention


def _whole_layer(job: Job) -> int:
    """Everything a decoder layer saves when nothing is recomputed."""
    sizes = sizes_of(job)
    outputs = 2 * sizes.element * sizes.tokens * sizes.hidden  # of both norms
    trained = job.lora_parameters == 0
    # gate, up, silu(gate) and their product
    swiglu = 4 * sizes.element * sizes.gathered * sizes.inner
    return 2 * _norm(sizes, trained) + outputs + _attention(job, sizes) + swiglu


def _layer_input(job: Job) -> int:
    sizes = sizes_of(job)
    return sizes.element * sizes.tokens * sizes.hidden


def layer_bytes(job: Job) -> int:
    """What one decoder layer keeps of one micro-batch until its backward pass."""
    if job.recompute == "full":
        return _layer_input(job)
    if job.recompute == "selective":
        return _layer_input(job) + _products(job)
    return _whole_layer(job)


def recomputed_bytes(job: Job) -> int:
    """What recomputing one layer adds to `layer_bytes` while that layer's backward pass runs."""
    if job.recompute == "none":
        return 0
    whole = _whole_layer(job)
    if job.recompute == "full":
        return whole
    sizes = sizes_of(job)
    # gate, up and the kernel's results are what is saved again; query, key and value come out of
    # the rotary embedding as other tensors.
    again = sizes.element * sizes.gathered * (2 * sizes.inner + sizes.query)
    again += 4 * sizes.gathered * sizes.heads if job.flash else 0
    return whole - again


def embedding_bytes(job: Job) -> int:
    """The ids, which say where the embedding's gradient goes."""
    return 8 * job.microbatch_size * job.max_length


def rotary_bytes(job: Job) -> int:
    """Cosines and sines of a row, which all layers share."""
    return 2 * job.element * job.max_length // job.layout.sequence_axis * job.shape.head_dim


def final_norm_bytes(job: Job) -> int:
    """The norm after the last layer; its output too, for the head's gradient, unless the head is
    frozen, or the loss is chunked and that gradient is made in the forward pass."""
    sizes = sizes_of(job)
    norm = _norm(sizes, job.lora_parameters == 0)
    if job.chunked_loss or job.lora_parameters:
        return norm
    return norm + sizes.element * sizes.head_tokens * sizes.hidden


def micro_batch_bytes(job: Job, layers: int, first: bool = True, last: bool = True) -> int:
    """All that a pipeline stage of so many layers keeps of one micro-batch, the loss left out.

    Args:
        first, last: whether the stage has the embedding, and the final norm and the head.
    """
    kept = layers * layer_bytes(job) + rotary_bytes(job)
    kept += embedding_bytes(job) if first else 0
    kept += final_norm_bytes(job) if last else 0
    if job.layout.pp > 1:
        # The schedule holds what a stage received and what it sent until the backward pass.
        kept += _layer_input(job) * ((not first) + (not last))
    return kept


def loss_saved_bytes(job: Job) -> int:
    """What the loss keeps for the backward pass: the fp32 log-softmax of every logit; chunked, the
    gradients of the hidden states and, in fp32 if there is more than one chunk, of the head."""
    sizes = sizes_of(job)
    if not job.chunked_loss:
        return 4 * sizes.head_tokens * sizes.vocabulary
    hidden = sizes.element * sizes.head_tokens * sizes.hidden
    if job.lora_parameters:  # a frozen head
        return hidden
    each = 4 if sizes.head_tokens > _chunk_tokens(sizes) else sizes.element
    return hidden + each * sizes.vocabulary * sizes.hidden


def loss_peak_bytes(job: Job) -> int:
    """Most bytes of logits and loss at one time, what is saved included.

    Chunked: as on a GPU. On a CPU llama_lib/chunked_loss.py makes fp32 numbers of 2**18 logits at a
    time instead of a whole chunk's, so it takes less: by 255 MiB at most.
    """
    sizes = sizes_of(job)
    logits = sizes.head_tokens * sizes.vocabulary
    if not job.chunked_loss:
        if job.layout.tp > 1:
            # Forward pass: the logits, their fp32 copy and the exponentials.
            return logits * (8 + (0 if job.precision == "fp32" else sizes.element))
        # Backward pass: log-softmax, its gradient and that of the logits, all fp32.
        return 12 * logits
    saved = loss_saved_bytes(job)
    product = 0 if job.lora_parameters else sizes.element * sizes.vocabulary * sizes.hidden
    chunk = min(sizes.head_tokens, _chunk_tokens(sizes)) * sizes.vocabulary
    # Forward pass: a chunk's logits, their log-softmax in fp32, and one product for the head.
    # Backward pass: what is saved times the loss's own gradient, and the head's part cast.
    return max(saved + product + chunk * (sizes.element + 4), 2 * saved + product)


def _chunk_tokens(sizes: Sizes) -> int:
    return max(1, CHUNK_ELEMENTS // sizes.vocabulary)

"""Causal attention in bf16 on the CPU, by matrix products of a block of queries at a time.

torch's own CPU kernel (scaled_dot_product_attention) computes bf16 products slower than its plain
matrix product does. Forward and backward on one core of an EPYC with avx512_bf16, rows x heads x
length x head size: 4 x 8 x 512 x 64 58 ms instead of 101, 2 x 8 (2 key-value heads) x 1024 x 64 54
instead of 126, 1 x 4 x 2048 x 128 127 instead of 198. In fp32 they are even, so fp32 stays with
torch's.

Invariant: of a layer query, key and value are kept for the backward pass and nothing else; scores
exist for one block of queries at a time and are rounded to bf16, as in transformers' eager
attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

NAME = "llama_lib_host"
BLOCK = 128


def _blocks(query: Tensor) -> Iterator[tuple[int, int]]:
    length = query.shape[2]
    return ((first, min(first + BLOCK, length)) for first in range(0, length, BLOCK))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[rows * key-value heads, heads of each, length, size] and twice [the same, length, size]."""
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    return (
        query.reshape(rows * shared, heads // shared, length, size),
        key.reshape(rows * shared, length, size),
        value.reshape(rows * shared, length, size),
    )


def _hidden(like: Tensor) -> Tensor:
    """What is added to a block's scores with its own keys: a token does not see later ones."""
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


def _shares(query: Tensor, key: Tensor, first: int, last: int, hidden: Tensor) -> Tensor:
    """What the queries first .. last - 1 take of every key before `last`.

    Args:
        query: grouped and scaled.

    Returns:
        [groups, heads of each * (last - first), last]; rows sum to one.
    """
    groups, heads, _, size = query.shape
    count = last - first
    block = query[:, :, first:last].reshape(groups, heads * count, size)
    scores = torch.bmm(block, key[:, :last].transpose(1, 2))
    scores.view(groups, heads, count, last)[..., first:].add_(hidden[:count, :count])
    return torch.softmax(scores, -1)


@torch.library.custom_op("llama_lib::causal_attention", mutates_args=())
def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of whole rows.

    Args:
        query: [rows, heads, length, size]; `key` and `value` with the key-value heads.

    Returns:
        As `query`, in memory too: what follows lays heads side by side, as they were before.
    """
    groups, keys, values = _grouped(query * scale, key, value)
    output = torch.empty_like(query)
    hidden = _hidden(groups)
    for first, last in _blocks(query):
        part = output[:, :, first:last]
        shares = _shares(groups, keys, first, last, hidden)
        part.copy_(torch.bmm(shares, values[:, :last]).view(part.shape))
    return output


@torch.library.custom_op("llama_lib::causal_attention_backward", mutates_args=())
def causal_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. The shares are computed again, the same to the bit."""
    groups, keys, values = _grouped(query * scale, key, value)
    gradients = gradient.reshape(groups.shape)
    of_query = torch.empty_like(query)
    # Blocks add up in fp32.
    of_key = torch.zeros_like(keys, dtype=torch.float32)
    of_value = torch.zeros_like(values, dtype=torch.float32)
    hidden = _hidden(groups)
    number, _, _, size = groups.shape
    for first, last in _blocks(query):
        shares = _shares(groups, keys, first, last, hidden)
        block = groups[:, :, first:last].reshape(number, -1, size)
        of_output = gradients[:, :, first:last].reshape(number, -1, size)
        of_value[:, :last] += torch.bmm(shares.transpose(1, 2), of_output)
        of_shares = torch.bmm(of_output, values[:, :last].transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        part = of_query[:, :, first:last]
        part.copy_(torch.bmm(of_scores, keys[:, :last]).view(part.shape))
        of_key[:, :last] += torch.bmm(of_scores.transpose(1, 2), block)
    return (
        of_query.mul_(scale),
        torch.empty_like(key).copy_(of_key.view(key.shape)),
        torch.empty_like(value).copy_(of_value.view(value.shape)),
    )


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query)


@causal_attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *causal_attention_backward(gradient, *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_keep)


# Counted like every attention kernel: whole scores, nothing for what a kernel computes twice.
@register_flop_formula(torch.ops.llama_lib.causal_attention)
def _forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, length, size = query
    return 4 * rows * heads * length * length * size


@register_flop_formula(torch.ops.llama_lib.causal_attention_backward)
def _backward_flops(gradient: Any, query: Any, *_: Any, **__: Any) -> int:
    return 2 * _forward_flops(query, None, None)


def host_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it.

    Returns:
        [rows, length, heads, size] and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None


def serves(config: Any, device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether a model of this configuration can train with it, and is faster so.

    Args:
        length: tokens of a row; a sliding window must not be shorter.
    """
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and config.model_type in ("llama", "mistral")
        and (window is None or window >= length)
        and not getattr(config, "attention_dropout", 0.0)
    )


def use_host_attention(model: Any) -> None:
    """Make a transformers Llama or Mistral use it, for whole rows without a mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, host_attention)
    model.config._attn_implementation = NAME
    # transformers would build a mask of its own for a name it does not know.
    model.model._update_causal_mask = lambda *_args, **_kwargs: None

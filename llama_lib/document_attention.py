"""Attention inside the documents of a packed row (--document_mask, packed conversations).

Invariant: a token sees itself and the earlier tokens of its own document and nothing else, whatever
the kernel; the kernel follows from the device and the precision alone and has a name.

`documents` is int32 [rows, length] everywhere: in each row the documents are numbered in their
order, so the numbers never fall. A mask is built once per micro-batch, in a pipeline once in every
stage; every layer, and every recomputation of a layer, is handed the same one.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llama_lib.devices import on_device

NAME = "llama_lib_documents"

# Tokens of FlexAttention's blocks: the default of torch's own masks.
BLOCK = 128


class DocumentMask(Protocol):
    """The documents of one micro-batch in the form one kernel takes them."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of [rows, heads, length, head_dim] as [rows, length, heads, head_dim].

        `key` and `value` have the key-value heads.
        """


@dataclass(frozen=True)
class DenseMask:
    """torch's SDPA with `allowed`, bool [rows, 1, length, length]: needs length^2 bytes a row."""

    allowed: Tensor

    @classmethod
    def of(cls, documents: Tensor, device: torch.device) -> "DenseMask":
        documents = on_device(documents, device)
        same = documents[:, None, :, None] == documents[:, None, None, :]
        return cls(same.tril())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        from transformers.models.llama.modeling_llama import repeat_kv

        groups = query.shape[1] // key.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            attn_mask=self.allowed,
            scale=scaling,
        )
        return output.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class FlexMask:
    """torch's FlexAttention, which skips every block of tokens that share no document."""

    blocks: BlockMask

    @classmethod
    def of(cls, documents: Tensor, device: torch.device) -> "FlexMask":
        return cls(block_mask(on_device(documents, device)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        output = compiled_flex_attention()(
            query,
            key,
            value,
            block_mask=self.blocks,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2).contiguous()


@functools.cache
def compiled_flex_attention() -> Callable[..., Any]:
    """Uncompiled, FlexAttention would compute every score and mask it afterwards."""
    return torch.compile(flex_attention, dynamic=False)


def block_mask(documents: Tensor) -> BlockMask:
    """What torch's create_block_mask gives for these documents, from the ends of the blocks alone.

    torch's looks at every pair of tokens: a gigabyte for a row of 32,768.
    """
    length = documents.shape[1]
    first = torch.arange(0, length, BLOCK, device=documents.device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    # Numbers never fall: blocks share a document if the later one's first token has the number of
    # the earlier one's last, and are one document if the ends farthest apart have one number.
    shares = documents[:, first, None] == documents[:, None, last]
    whole = documents[:, last, None] == documents[:, None, first]
    later = first[:, None] > first
    # Rows past the end of the last block are no token's: torch counts such a block as partial.
    full = whole & later & (first + BLOCK <= length)[:, None]
    partial = ((shares & later) | (first[:, None] == first)) & ~full

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[row, query] == documents[row, key]) & (query >= key)

    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK, mask_mod, seq_lengths=(length, length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which first) of the key blocks that are true for each query block, one head."""
    blocks = blocks[:, None].int()
    which = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), which.int()


@dataclass(frozen=True)
class VarlenMask:
    """flash-attn's kernel for sequences of different lengths laid end to end.

    `ends` holds 0 and the end of every document, int32, all rows of the micro-batch in one line.
    """

    ends: Tensor
    longest: int

    @classmethod
    def of(cls, documents: Tensor, device: torch.device) -> "VarlenMask":
        # On the host, where `documents` comes from: counting on the device would wait for it.
        ends = document_ends(documents)
        return cls(on_device(ends, device), int(ends.diff().max()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        rows, _, length, _ = query.shape
        line = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
        output = flash_attn_varlen_func(
            *line,
            cu_seqlens_q=self.ends,
            cu_seqlens_k=self.ends,
            max_seqlen_q=self.longest,
            max_seqlen_k=self.longest,
            softmax_scale=scaling,
            causal=True,
        )
        return output.unflatten(0, (rows, length))


def document_ends(documents: Tensor) -> Tensor:
    """0 and the end of every document in the rows laid end to end, int32; a row ends its last."""
    starts = _starts(documents).flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([documents.numel()])]).int()


def document_positions(documents: Tensor) -> Tensor:
    """Position of every token in its own document, int64 [rows, length]."""
    index = torch.arange(documents.shape[1], device=documents.device)
    return index - torch.where(_starts(documents), index, 0).cummax(dim=1).values


def _starts(documents: Tensor) -> Tensor:
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts


KERNELS: dict[str, Callable[[Tensor, torch.device], DocumentMask]] = {
    "sdpa_block_mask": DenseMask.of,
    "flash_attn_varlen": VarlenMask.of,
    "flex_attention": FlexMask.of,
}


def document_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel that serves a document mask on `device` in `dtype`."""
    if device.type == "cpu":
        return "sdpa_block_mask"
    # flash-attn computes in half precision only.
    if dtype != torch.float32 and _has_flash_attn():
        return "flash_attn_varlen"
    return "flex_attention"


@functools.cache
def _has_flash_attn() -> bool:
    """Tried, not looked for: a build for another torch is there and cannot be imported."""
    try:
        importlib.import_module("flash_attn")
    except ImportError:
        return False
    return True


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DocumentMask | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it; without a mask it is its causal SDPA."""
    if attention_mask is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    return attention_mask.attend(query, key, value, scaling), None


def use_document_attention(model: Any) -> None:
    """Make a transformers Llama or Mistral take a `DocumentMask`, documents or None as its mask.

    Nothing here knows of Mistral's sliding window: rows must not be longer.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    model.config._attn_implementation = NAME
    # transformers and ColossalAI's own forward both ask this for the layers' mask.
    model.model._update_causal_mask = _layers_mask


def _layers_mask(
    attention_mask: DocumentMask | Tensor | None, hidden: Tensor, *_args: Any, **_kwargs: Any
) -> DocumentMask | None:
    """The mask of one forward pass of the model, or of one stage of a pipeline.

    A pipeline cuts rows into micro-batches by itself, which it can do with tensors only: there
    every stage is handed the documents. They are on the device by then, so flash-attn's ends are
    counted where the host has to wait for them.
    """
    if not isinstance(attention_mask, Tensor):
        return attention_mask
    assert attention_mask.dtype == torch.int32, "documents, not a mask of padding"
    return KERNELS[document_kernel(hidden.device, hidden.dtype)](attention_mask, hidden.device)

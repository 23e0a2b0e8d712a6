"""ColossalAI's flash attention kernel behind transformers' attention interface (`-a`).

Invariant: rows are whole and attention is causal; a missing kernel is an error, never another one.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from llama_lib.errors import UserError

NAME = "colossalai_flash"


def flash_kernel() -> str:
    """Name of the kernel ColossalAI would load for -a.

    Raises:
        UserError: none can run on this machine.
    """
    from colossalai.kernel.kernel_loader import FlashAttentionLoader

    known = [extension() for extension in FlashAttentionLoader.REGISTRY]
    available = [extension for extension in known if extension.is_available()]
    if not available:
        raise UserError(
            "-a asks for ColossalAI's flash attention kernel; none of "
            f"{', '.join(extension.name for extension in known)} runs here. Without -a "
            "attention is torch's SDPA."
        )
    return max(available, key=lambda extension: extension.priority).name


def causal_flash_attention(
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

    Args:
        query: [rows, heads, length, head_dim]; `key` and `value` with the key-value heads.

    Returns:
        [rows, length, heads, head_dim] and no weights.
    """
    from colossalai.shardformer.layer import ColoAttention
    from transformers.models.llama.modeling_llama import repeat_kv

    groups = query.shape[1] // key.shape[1]
    output = ColoAttention.attention(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        dropout_p=dropout,
        scale=scaling,
        **_causal(query.shape[0], query.shape[2], query.dtype, query.device),
    )
    return output.transpose(1, 2).contiguous(), None


@functools.lru_cache(maxsize=1)
def _causal(rows: int, length: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """ColossalAI's description of a causal mask; its SDPA kernel reads the mask, not the type."""
    from colossalai.shardformer.layer import ColoAttention

    return ColoAttention.prepare_attn_kwargs(
        (rows, 1, length, length), dtype, device, is_causal=True
    )


def use_flash_attention(model: Any) -> None:
    """Make a transformers Llama use the kernel; hybrid_parallel has a switch of its own instead."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, causal_flash_attention)
    model.config._attn_implementation = NAME
    # transformers would build a mask of its own for a name it does not know.
    model.model._update_causal_mask = lambda *_args, **_kwargs: None

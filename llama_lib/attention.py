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

    _register_causal_sdpa()
    known = [extension() for extension in FlashAttentionLoader.REGISTRY]
    available = [extension for extension in known if extension.is_available()]
    if not available:
        raise UserError(
            "-a asks for ColossalAI's flash attention kernel; none of "
            f"{', '.join(extension.name for extension in known)} runs here. Without -a "
            "attention is torch's SDPA."
        )
    return max(available, key=lambda extension: extension.priority).name


def _register_causal_sdpa() -> None:
    """Put torch's SDPA, told that it is causal, in the place of ColossalAI's SDPA kernel.

    ColossalAI's drops `is_causal` and hands torch a mask instead, for which torch has no flash
    kernel: -a would be slower than nothing.
    """
    from colossalai.kernel.extensions.pybind.flash_attention import (
        FlashAttentionDaoCudaExtension,
        FlashAttentionSdpaCudaExtension,
    )
    from colossalai.kernel.kernel_loader import FlashAttentionLoader

    class CausalSdpa(FlashAttentionSdpaCudaExtension):
        def load(self) -> Any:
            return causal_sdpa

    registry = FlashAttentionLoader.REGISTRY
    if FlashAttentionSdpaCudaExtension in registry:
        registry.remove(FlashAttentionSdpaCudaExtension)
        # Alone when flash-attn is missing: the loader warns when it has a choice.
        if not FlashAttentionDaoCudaExtension().is_available():
            FlashAttentionLoader.register_extension(CausalSdpa)


def causal_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The signature ColossalAI calls kernels with; tensors are [rows, heads, length, head_dim]."""
    if is_causal and cu_seqlens_q is None:  # no padding: the mask says no more than is_causal
        attention_mask = None
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attention_mask,
        dropout_p=dropout_p,
        scale=scale,
        is_causal=is_causal and attention_mask is None,
    )


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
    """ColossalAI's description of a causal mask, as its own Llama prepares it."""
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

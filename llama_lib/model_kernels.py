"""Kernels of what lies between the matrix products: --kernels and --compile.

torch: RMSNorm, rotary embedding and SwiGLU as transformers wrote them, one torch operation after
the other. liger: Liger-Kernel's Triton kernels, one launch each, on an NVIDIA GPU. compile:
torch.compile of every decoder layer, which fuses the same by itself.

Invariant: only instances of one model change, never a class or a module of transformers; a typed
choice that cannot be had is refused by name, and what `auto` chose is said.
"""

import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_lib.layout import Layout

NORMS = ("LlamaRMSNorm", "MistralRMSNorm")
MLPS = ("LlamaMLP", "MistralMLP")
ATTENTIONS = ("LlamaAttention", "MistralAttention")


def has_liger() -> bool:
    """Whether Liger's kernels are installed; Triton comes with torch's build for CUDA."""
    return all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


def use_kernels(
    model: Any,
    name: str,
    device: torch.device,
    layout: Layout,
    *,
    compiled: bool = False,
    flash: bool = False,
) -> str:
    """Put the kernels into a transformers Llama or Mistral that is not boosted yet.

    Args:
        name: auto, torch or liger.
        compiled: the layers will be compiled; `auto` then leaves them to the compiler.
        flash: ColossalAI's flash attention was asked for.

    Returns:
        What runs, for the log.
    """
    if name == "auto":
        if compiled:
            return "torch (compiled)"
        if device.type != "cuda":
            return "torch"
        if not has_liger():
            return "torch (liger_kernel is not installed)"
    if name == "torch":
        return "torch"
    _use_liger(model, fetch_weights=layout.plugin.startswith("gemini"))
    # There ColossalAI's own attention forward takes the place of ours.
    if layout.plugin == "hybrid_parallel" and (layout.sp_mode is not None or flash):
        return "liger (rotary: torch)"
    return "liger"


def _use_liger(model: Any, fetch_weights: bool) -> None:
    """
    Args:
        fetch_weights: gemini brings a weight when a torch operation takes it, which Liger's are
            not.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def normalise(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight * 1.0 if fetch_weights else self.weight
        # No offset, Llama's order of casts, the gradient not in the memory of the one it came from.
        return LigerRMSNormFunction.apply(
            hidden_states, weight, self.variance_epsilon, 0.0, "llama", False
        )

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Liger's writes its result over q and k, which selective recomputation may have kept.
        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)

    def multiply(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))

    for module in model.modules():
        kind = type(module).__name__
        forward: Callable[..., Any]
        if kind in NORMS:
            forward = normalise
        elif kind in MLPS and module.config.hidden_act in ("silu", "swish"):
            forward = multiply
        elif kind in ATTENTIONS:
            forward = _with_rotary(type(module).forward, rotate)
        else:
            continue
        module.forward = types.MethodType(forward, module)


def _with_rotary(forward: Any, rotate: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' attention forward, which looks the rotation up among its module's names."""
    names = forward.__globals__ | {"apply_rotary_pos_emb": rotate}
    copied = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


# -- torch.compile ---------------------------------------------------------------------------------


def compile_layers(model: Any) -> None:
    """torch.compile every decoder layer by itself: one graph, compiled once, serves them all.

    Compiling happens in the first steps. What surrounds the layers (recomputation, the pipeline,
    the plugin's hooks on weights) stays outside of the graph.
    """
    for layer in model.model.layers:
        layer.compile()

"""Which activations of the decoder layers the backward pass computes again (--recompute).

none: every tensor that a gradient needs is kept from the forward pass. full: of a layer only its
input is kept, and the backward pass begins with the layer's whole forward pass. selective: what
matrix products and attention gave is kept too, so only what is cheap is computed again: norms,
rotary embedding, the SwiGLU product, casts. No product is computed twice.

Invariant: loss and gradients are the same to the bit in all three modes, under every plugin that
`option_checks.recompute_problems` lets through.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed  # registers torch.ops.c10d
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten

# What is dear: matrix products, and every kernel that torch's SDPA chooses from. A kernel that is
# missing here would be computed again: slower, never wrong.
PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
# Tensor parallelism adds up the parts of a product in the product's own memory: what is kept then
# is the sum, and adding again would double it.
_SUM = torch.ops.c10d.allreduce_.default
KEPT = PRODUCTS | {_SUM}


class Keeping(TorchDispatchMode):
    """Keeps the results of `KEPT` operations, in their order, while a layer runs forward."""

    def __init__(self, results: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in KEPT:
            # Detached: the tensor itself will hold the graph that holds this.
            self.results.append((func, tree_map_only(Tensor, torch.detach, output)))
        return output

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        # Nothing after the last product (that of down_proj) is an input of a gradient: computing
        # again ends before it, so its result would be held for nobody.
        while self.results and self.results.pop()[0] not in PRODUCTS:
            pass


class Serving(TorchDispatchMode):
    """Gives the kept results, each once, to a layer that is computed again.

    torch's own mode of this kind (create_selective_checkpoint_contexts) demands that every single
    operation comes again; gemini fetches weights in between, the second time other ones.
    """

    def __init__(self, results: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in KEPT or not self.results:
            return func(*args, **(kwargs or {}))
        kept, output = self.results.popleft()
        if kept is not func:
            raise RuntimeError(f"a layer computed again did {func} where it had done {kept}")
        return output


def selective_contexts() -> tuple[Keeping, Serving]:
    """Contexts for one layer's forward pass and for computing it again."""
    results: deque[tuple[Any, Any]] = deque()
    return Keeping(results), Serving(results)


def use_recompute(model: Any, mode: str) -> None:
    """Make a transformers Llama or Mistral compute its layers again as `mode` says.

    Call it before the model is boosted: ColossalAI's own forward functions ask the model for the
    same switch.
    """
    if mode == "none":
        return
    # Non-reentrant recomputation keeps the graph that ColossalAI's hooks need.
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = selective_contexts
    model.gradient_checkpointing_enable(settings)

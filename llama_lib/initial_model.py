"""A new model with this project's initial weights, before any plugin has it.

Invariant: weights depend on the seed and the parameter's name alone, whatever builds and shards the
model.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llama_lib.progress import made


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def initialise(model: nn.Module, seed: int, device: torch.device) -> None:
    """Fill every parameter from a generator of its own, seeded by `seed` and its name.

    Order of creation, lazy materialisation and sharding then cannot change the weights. Matrices
    get normal(0, initializer_range), vectors (norms) ones: what transformers does for Llama. A lazy
    parameter says it is on the CPU wherever it will be made, hence `device`.
    """
    for name, parameter in model.named_parameters():
        made()
        if parameter.dim() < 2:
            parameter.data.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        parameter.data.normal_(0.0, model.config.initializer_range, generator=generator)


def build_model(
    config: Any, dtype: torch.dtype, seed: int, device: torch.device, lazy: bool
) -> Any:
    """A causal language model in `dtype` with this project's initial weights."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    if lazy:
        from colossalai.lazy import LazyInitContext

        where: Any = LazyInitContext(default_device=device)
    else:
        where = device
    with where, default_dtype(dtype), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        # Sharing the embedding with the head belongs to the initialisation that is left out.
        model.tie_weights()
        initialise(model, seed, device)
        # Lazy parameters take the default dtype of the moment they are made, not of this one.
        return model.to(dtype)


def restore_rotary_frequencies(model: nn.Module, device: torch.device) -> None:
    """Put the rotary frequencies back to fp32.

    The plugins cast every floating buffer to the working precision; frequencies rounded to bf16
    describe other positions than the ones Hugging Face computes when the model is served.
    """
    for module in model.modules():
        if hasattr(module, "rope_init_fn") and hasattr(module, "inv_freq"):
            frequencies, _ = module.rope_init_fn(module.config, device)
            module.register_buffer("inv_freq", frequencies.float(), persistent=False)
            module.original_inv_freq = module.inv_freq

"""Adapters: low-rank matrices trained beside frozen weights (LoRA, arXiv 2106.09685), through peft.

Invariant: outside this module a weight of the base has the name it has in plain transformers, and
an adapter the name it has in peft's files; with one seed adapters begin the same under every
plugin and number of processes, and change nothing before the first step.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_lib.config import Options

# peft wraps a linear layer: the layer itself is `base_layer`, its adapters have the name "default".
BASE_LAYER = ".base_layer."
ADAPTER_NAME = "default"
# What peft puts before the names of the model that it wraps, in its files too.
PREFIX = "base_model.model."


# -- options ------------------------------------------------------------------------------------


def new_token_problems(options: Options, new_tokens: int) -> list[str]:
    """Why adapters cannot learn the tokens that the chat template adds to the tokenizer."""
    if not options.model.lora_rank or not new_tokens:
        return []
    return [
        f"--lora_rank trains no embeddings, and the chat template adds {new_tokens} token(s), "
        "whose embeddings would stay as they begin; choose a --chat_template whose tokens the "
        "tokenizer has (llama-2, mistral and plain need none), or leave out --lora_rank."
    ]


# -- building -----------------------------------------------------------------------------------


def base_reference(model_path: str | None) -> str | None:
    """How a saved adapter names its base: an absolute folder, or the hub id as given."""
    if model_path is None or not Path(model_path).expanduser().exists():
        return model_path
    from llama_lib.inference import model_folder

    return str(model_folder(model_path).resolve())


def add_adapters(booster: Any, model: nn.Module, options: Options, dtype: torch.dtype) -> Any:
    """`model` wrapped by peft through the booster, its own weights frozen; before it is boosted.

    Args:
        dtype: precision of the adapters in the forward pass; the optimizer keeps fp32 beside.
    """
    from peft import LoraConfig

    # peft's type says int, its arithmetic takes any number.
    alpha: Any = options.model.lora_alpha
    config = LoraConfig(
        r=options.model.lora_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(options.model.lora_targets),
        task_type="CAUSAL_LM",
    )
    # ColossalAI warns of nothing but that adapters are enabled.
    with _quiet("colossalai"):
        wrapped = booster.enable_lora(model, lora_config=config)
    config.base_model_name_or_path = base_reference(options.model.model_path)
    for name, parameter in adapter_parameters(wrapped.get_base_model()):
        parameter.data = _initial(name, parameter.shape, options.training.seed).to(
            parameter.device, dtype
        )
    return wrapped


def _initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Like peft: A uniform within 1 / sqrt(its inputs), B zero; fp32 on the host."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class _quiet:
    """Errors only from a logger inside the block."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        self.logger.setLevel(self.level)


# -- names and values ---------------------------------------------------------------------------


def file_name(name: str) -> str:
    """The name in peft's files of an adapter in the wrapped model; any other name as it is."""
    return name.replace(f".{ADAPTER_NAME}.", ".") if ".lora_" in name else name


def plain_name(name: str) -> str:
    """The name in plain transformers of a weight of the base; others as they are."""
    return name.replace(BASE_LAYER, ".")


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in plain transformers, parameter) of a model with or without adapters, these left out.

    Args:
        module: `Engine.module`.
    """
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            yield plain_name(name), parameter


def adapter_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in peft's files, parameter) of every adapter of `Engine.module`."""
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            yield PREFIX + file_name(name), parameter


def merge(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """`weight`, a tensor of the base by its plain name, with its adapters added in fp32."""
    layer: Any = module.get_submodule(name.rpartition(".")[0])
    if not hasattr(layer, "lora_A") or not name.endswith(".weight"):
        return weight
    down = layer.lora_A[ADAPTER_NAME].weight.detach().float()
    up = layer.lora_B[ADAPTER_NAME].weight.detach().float()
    change = (up @ down) * layer.scaling[ADAPTER_NAME]
    return (weight.detach().float() + change).to(weight.dtype)

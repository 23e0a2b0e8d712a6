"""Adapters: low-rank matrices trained beside frozen weights (LoRA, arXiv 2106.09685), through peft.

Invariant: outside this module a weight of the base has the name it has in plain transformers, and
an adapter the name it has in peft's files; with one seed adapters begin the same under every
plugin and number of processes, and change nothing before the first step.
"""

import copy
import hashlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_lib.config import Options
from llama_lib.layout import Layout

# peft wraps a linear layer: the layer itself is `base_layer`, its adapters have the name "default".
BASE_LAYER = ".base_layer."
ADAPTER_NAME = "default"
# What peft puts before the names of the model that it wraps, in its files too.
PREFIX = "base_model.model."


# -- options ------------------------------------------------------------------------------------


def linear_layers(config: Any) -> list[str]:
    """Names of the linear layers in a block of the model, in their order; the head is not one."""
    from transformers import AutoModelForCausalLM

    one_block = copy.deepcopy(config)
    one_block.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one_block)
    found = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name.rpartition(".")[2] for name in found if ".layers." in name]


def lora_problems(options: Options, layout: Layout, config: Any, new_tokens: int = 0) -> list[str]:
    """What cannot work about adapters, each with what can.

    Args:
        config: the model's transformers config.
        new_tokens: tokens that the chat template adds to the tokenizer.
    """
    model = options.model
    if not model.lora_rank:
        if model.merge_lora:
            return ["--merge_lora has no adapters to merge: give --lora_rank too, or leave it out."]
        return []
    problems = []
    if layout.plugin.startswith("gemini"):
        problems.append(
            f"--lora_rank with -p {layout.plugin}: ColossalAI's gemini has no adapters; use -p "
            "zero2, zero2_cpu or hybrid_parallel."
        )
    sizes = {"tp": layout.tp, "pp": layout.pp, "sp": layout.sp}
    for name, size in sizes.items():
        if size > 1 and not (name == "sp" and layout.sp_mode == "split_gather"):
            problems.append(
                f"--lora_rank with --{name} {size}: ColossalAI has adapters without tensor, "
                f"pipeline and sequence parallelism only; use --{name} 1."
            )
    linear = linear_layers(config)
    unknown = [name for name in model.lora_targets if name not in linear]
    if unknown:
        problems.append(
            f"--lora_targets {' '.join(unknown)}: no linear layer in the model's blocks; valid: "
            f"{', '.join(linear)}."
        )
    if not model.lora_targets:
        problems.append(f"--lora_targets: got no layer, expected some of {', '.join(linear)}.")
    if new_tokens:
        problems.append(
            f"--lora_rank trains no embeddings, and the chat template adds {new_tokens} token(s), "
            "whose embeddings would stay as they begin; choose a --chat_template whose tokens the "
            "tokenizer has (llama-2, mistral and plain need none), or leave out --lora_rank."
        )
    return problems


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

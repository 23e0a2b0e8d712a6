"""Adapters in a checkpoint: peft's folder, and which base they belong to.

Invariant: adapters are never loaded onto other weights than those they were trained on.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama_lib.checkpoint.tensors import MissingWeights, TensorReader, shape_problems
from llama_lib.engine import Engine
from llama_lib.errors import UserError
from llama_lib.inference import ADAPTER, base_of
from llama_lib.lora import ADAPTER_NAME, adapter_parameters, base_parameters

# peft's name of the one file of tensors, without its ending.
ADAPTER_WEIGHTS = "adapter_model"
# What tells the base again: peft's folder beside it has no place for it.
BASE_SAMPLE = "base.json"
# Values of every frozen tensor that a checkpoint keeps, to know the model again.
SAMPLED_VALUES = 8
# Two roundings of one value to a 16-bit format differ by less than 2^-7 of it.
ROUNDING = 2.0**-7
# Below 2^-14 fp16 has no finer steps than this one.
SMALLEST_FP16 = 2.0**-24

Sample = Mapping[str, list[float]]


def adapter_config(model: Any) -> Any:
    """The LoraConfig of a boosted model with adapters."""
    return model.unwrap(unwrap_peft=False).peft_config[ADAPTER_NAME]


def save_adapter_config(model: Any, folder: Path) -> None:
    """adapter_config.json, as peft's own save_pretrained writes it."""
    config = copy.copy(adapter_config(model))
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def base_sample(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[float]]:
    """A few values of every tensor of the base, evenly spaced.

    Args:
        shapes: full shapes by plain name; a padded vocabulary is longer.
    """
    sample = {}
    for name, parameter in base_parameters(module):
        numel = math.prod(shapes[name])
        places = [i * (numel - 1) // (SAMPLED_VALUES - 1) for i in range(SAMPLED_VALUES)]
        # `detach` of a padded parameter is replaced by ColossalAI, and fails when called twice.
        sample[name] = parameter.data.flatten()[places].float().tolist()
    return sample


def other_base(found: Sample, saved: Sample, same_precision: bool) -> str | None:
    """A tensor by which the base differs from the one that adapters were trained on, if any."""

    def alike(a: float, b: float) -> bool:
        if same_precision:
            return a == b
        return abs(a - b) <= max(ROUNDING * max(abs(a), abs(b)), SMALLEST_FP16)

    for name, values in saved.items():
        now = found.get(name, [])
        if len(now) != len(values) or not all(map(alike, now, values)):
            return name
    return None


def base_facts(engine: Engine) -> dict[str, Any]:
    """What BASE_SAMPLE holds."""
    precision = engine.options.training.mixed_precision
    return {"precision": precision, "sample": base_sample(engine.module, engine.shapes)}


def load_adapters(engine: Engine, directory: Path) -> None:
    """The adapters of a checkpoint into an engine whose base is loaded, compared with theirs.

    Raises:
        UserError: there are none, they do not fit the model, or they belong to another base.
    """
    folder = directory / ADAPTER
    try:
        reader = TensorReader(folder, single=f"{ADAPTER_WEIGHTS}.safetensors")
    except MissingWeights as error:
        raise UserError(
            f"--load {directory} has no adapters ({error}); without --lora_rank it can be loaded."
        ) from None
    if problems := shape_problems(reader, engine.trained):
        raise UserError(
            f"--load {directory}: its adapters do not fit the model: {'; '.join(problems[:3])}. "
            "Give --model_path, --lora_rank and --lora_targets as before."
        )
    saved, found = json.loads((directory / BASE_SAMPLE).read_text()), base_facts(engine)
    same_precision = saved["precision"] == found["precision"]
    config, trained_on = adapter_config(engine.model), base_of(folder)
    if name := other_base(found["sample"], saved["sample"], same_precision):
        raise UserError(
            f"--load {directory}: its adapters were trained on {trained_on}, and {name} of "
            f"--model_path {config.base_model_name_or_path} is another; give the weights they were "
            "trained on to --model_path."
        )
    # A hub id or folder that was not given again.
    config.base_model_name_or_path = config.base_model_name_or_path or trained_on
    with torch.no_grad():
        for name, parameter in adapter_parameters(engine.module):
            parameter.data.copy_(reader.tensor(name))

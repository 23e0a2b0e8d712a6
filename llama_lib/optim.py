"""AdamW parameter groups and the learning-rate schedule.

Invariant: parameter k of the optimizer is always the same named parameter, whatever plugin shards
it, so optimizer state is stored by name (`parameter_names`).
"""

import math
from typing import Any

import torch
from torch import nn

# Touvron et al. 2023, section 2.3 (LLaMA) and 2.2 (LLaMA-2).
BETAS = (0.9, 0.95)
EPSILON = 1e-8
FINAL_LR_RATIO = 0.1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices and embeddings decay; norms and biases (one axis) do not."""
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its order; call before the model is boosted."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """ColossalAI's HybridAdam: the one optimizer that every plugin takes.

    `llama_lib.host.install` has put torch's fused AdamW behind it.
    """
    from colossalai.nn.optimizer import HybridAdam

    return HybridAdam(
        parameter_groups(model, weight_decay), lr=lr, betas=BETAS, eps=EPSILON, adamw_mode=True
    )


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of optimizer step `step` (counted from 1).

    Linear warm-up reaches `peak` at step `warmup_steps`; a cosine then ends at 10% of it at step
    `num_steps` (the LLaMA schedule).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if num_steps <= warmup_steps:
        return peak
    progress = min(1.0, (step - warmup_steps) / (num_steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (FINAL_LR_RATIO + (1.0 - FINAL_LR_RATIO) * cosine)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set every group of a (boosted) optimizer to `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr

"""Parts of ColossalAI's ZeRO optimizer without copies that a CPU has to wait for.

Invariant: gradients are those of the code they replace to the bit, norms within 1e-5.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer
from torch import Tensor

from llama_lib.host.norms import squared_norm

_compute_grad_norm = LowLevelZeroOptimizer._compute_grad_norm
_run_reduction = LowLevelZeroOptimizer._run_reduction


def compute_grad_norm(self: Any, dp_pg: Any, gradients: list[Tensor], norm_type: int = 2) -> float:
    """LowLevelZeroOptimizer's, which makes an fp64 copy of every gradient first."""
    if not gradients or norm_type != 2:
        return float(_compute_grad_norm(self, dp_pg, gradients, norm_type))
    total = torch.stack([squared_norm(gradient) for gradient in gradients]).sum()
    # fp32, as the code this stands for sends it.
    squares = total.float().reshape(1)
    for group in dp_pg if isinstance(dp_pg, tuple) else (dp_pg,):
        dist.all_reduce(squares, group=group)
    return math.sqrt(squares.item())


def run_reduction(self: Any) -> None:
    """LowLevelZeroOptimizer's, which copies the gradients of a bucket twice to send them; in a
    group of one process there is nobody to send them to."""
    stores = self.pg_to_bucket_store.values()
    if any(store.world_size > 1 for store in stores) or self._communication_dtype is not None:
        _run_reduction(self)
        return
    for store in stores:
        if store.num_elements_in_bucket() == 0:
            continue
        store.build_grad_in_bucket()
        store.reset_num_elements_in_bucket()
        for gradient in store.get_grad()[0]:
            parameter = store.get_param_id_of_grad(gradient)
            self._add_grad(gradient, 1, store.current_group_id, parameter)
        store.reset()

"""Norms of large tensors on a CPU."""

import torch
from torch import Tensor

# Elements. On the CPU torch's fp32 norm of 32 Mi elements at once is 0.2% too small and, in bf16,
# five times slower than by blocks that fit in a cache (torch 2.13).
NORM_BLOCK = 2**16


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of squares in fp64, from fp32 norms of blocks: within 1e-5 of the exact one."""
    blocks = tensor.reshape(-1).split(NORM_BLOCK)
    norms = torch.stack([torch.linalg.vector_norm(block, dtype=torch.float32) for block in blocks])
    return norms.double().square().sum()

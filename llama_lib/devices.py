"""Moving tensors to the device without making the host wait.

Invariant: a copy to a GPU is queued behind the work that is already there, never waited for.
"""

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from pageable memory the host would wait for all queued work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

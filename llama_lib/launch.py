"""Joining the process group, whoever started this process: nobody, torchrun or `colossalai run`.

Invariant: the launcher's environment is only completed, never overridden.
"""

import os
import socket

import torch

from llama_lib.errors import UserError


def world_size() -> int:
    """Number of processes of the run, readable before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def complete_environment() -> None:
    """Let `python pretrain.py` alone be a run of one process."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def start_process_group(seed: int) -> torch.device:
    """Install the host layer, join the process group and say which device this rank computes on.

    Raises:
        UserError: more processes on this host than GPUs.
    """
    from llama_lib import host

    host.install()
    complete_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_accelerator() and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this host has no GPU of its own: {torch.cuda.device_count()} "
            "visible; start at most that many with --nproc_per_node."
        )
    if not has_accelerator():
        _share_cores()
    import colossalai

    colossalai.launch_from_torch(seed=seed, verbose=False)
    if has_accelerator():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _share_cores() -> None:
    """Divide the cores among the processes of this host.

    torchrun sets OMP_NUM_THREADS to 1 for several processes, which leaves most cores idle; a number
    above 1 was chosen by the user and stands.
    """
    if int(os.environ.get("OMP_NUM_THREADS", "1")) > 1:
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))

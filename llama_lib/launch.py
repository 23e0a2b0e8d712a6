"""Joining the process group, whoever started this process: nobody, torchrun or `colossalai run`.

Invariant: the launcher's environment is only completed, never overridden.
"""

import contextlib
import functools
import ipaddress
import os
import socket
from typing import Any

import torch

from llama_lib.cluster.probe import own_address
from llama_lib.errors import RunError, UserError

# A run whose meeting point has one of these names cannot be on several hosts.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


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


def on_one_host() -> bool:
    """Whether that is known: a launcher may not say how many processes a host has."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return world_size() <= local_processes or os.environ.get("MASTER_ADDR") in LOCAL_NAMES


@functools.cache
def keep_to_this_host() -> Any:
    """Let the processes of a run on one host meet where no other machine can reach them.

    torch's store would listen on every network, and whoever reaches it can send a process what it
    unpickles. torchrun brings a store of its own, which listens like that until the run ends: only
    a firewall helps there. Returns the store, which the process group then shares: this cache keeps
    it, and with it the port.
    """
    if not on_one_host():
        return None
    # gloo would take the network that the name of this host leads to.
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank() or torchrun_serves or address not in LOCAL_NAMES or not port:
        return None
    place = ("127.0.0.1" if address == "localhost" else address, int(port))
    try:
        listener = socket.create_server(
            place, family=socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        )
    except OSError as error:
        raise RunError(
            f"port {port} of {address}, where the processes of this run meet, cannot be opened "
            f"({error.strerror}): choose another, --master_port of the launcher or MASTER_PORT."
        ) from None
    return torch.distributed.TCPStore(
        address,
        int(port),
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def network_problems() -> list[str]:
    """Why the processes of other hosts could not reach those of this one.

    gloo, which with GPUs still carries the requests to save or stop, offers its peers the address
    that this host's own name has. Where that is a loopback address (127.0.1.1 on a fresh Debian)
    the peers try in vain for minutes and end with "connectFullMesh failed".
    """
    is_known = "LOCAL_WORLD_SIZE" in os.environ  # else they may all be on this one
    if not is_known or on_one_host() or os.environ.get("GLOO_SOCKET_IFNAME"):
        return []
    name = socket.gethostname()
    address = own_address()
    if address is not None and not ipaddress.ip_address(address).is_loopback:
        return []
    meaning = "has no address of its own here" if address is None else f"means {address} here"
    return [
        f"the name of this host, {name}, {meaning}, so the other hosts cannot reach it; set "
        "GLOO_SOCKET_IFNAME to the network interface that leads to them (`ip -br address` lists "
        f"all), or give {name} its network address in /etc/hosts."
    ]


def start_process_group(
    seed: int, joining: contextlib.AbstractContextManager[None] | None = None
) -> torch.device:
    """Install the host layer, join the process group and say which device this rank computes on.

    Args:
        joining: watches over what waits for other processes.

    Raises:
        UserError: more processes on this host than GPUs.
    """
    complete_environment()
    keep_to_this_host()
    device = _own_device()
    from llama_lib import host

    host.install()
    with joining or contextlib.nullcontext():
        _join(seed)
        _greet(device)
    return device


def _greet(device: torch.device) -> None:
    """The first exchange of all processes, over both networks that training uses.

    Whoever cannot be reached shows here, not after the model is built.
    """
    from llama_lib import coordination

    present = torch.ones((), device=device)
    torch.distributed.all_reduce(present)
    if round(present.item()) != world_size():
        raise RunError(
            f"the first all-reduce counted {present.item():g} processes, expected {world_size()}: "
            "the network changes what it carries; check its hardware and drivers."
        )
    coordination.barrier()


def _join(seed: int) -> None:
    """`colossalai.launch_from_torch`, with keys of its own for every start of a job.

    torchrun's store outlives the processes that it starts again (--max_restarts): with the keys of
    the first start they would look for the addresses of processes that are gone.
    """
    from colossalai.accelerator import get_accelerator
    from colossalai.utils import set_seed
    from torch.distributed.rendezvous import rendezvous

    accelerator = get_accelerator()
    store, own_rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    torch.distributed.init_process_group(
        backend=accelerator.communication_backend,
        store=torch.distributed.PrefixStore(f"start-{attempt}", store),
        rank=own_rank,
        world_size=size,
    )
    if accelerator.support_set_device:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    set_seed(seed)
    torch._dynamo.config.optimize_ddp = size > 1


def _own_device() -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not has_accelerator():
        _share_cores()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this host has no GPU of its own: {torch.cuda.device_count()} "
            "visible; start at most that many with --nproc_per_node."
        )
    # Before ColossalAI is imported: some of its default arguments ask for the current device then,
    # and every rank would gather its optimizer state on GPU 0.
    # ColossalAI sets this variable when imported, which is too late once a context exists.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _share_cores() -> None:
    """Divide the cores among the processes of this host, unless the user chose.

    torchrun itself sets OMP_NUM_THREADS to 1 for several processes, which leaves most cores idle;
    any other value can only come from the user.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and (local_processes == 1 or threads != "1"):
        return
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))

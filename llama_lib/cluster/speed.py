"""`python -m llama_lib.cluster.speed`: measures one host's processes among those of all hosts.

Started without RANK it reads one JSON line and starts the processes of its host, which print their
results as JSON lines. Those import torch, and ColossalAI where the installation is to be tried.

Invariant: nothing outlives its time: the kernel ends a process at its alarm whatever it waits for,
and all of them as soon as nobody listens any more.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from llama_lib.cluster.processes import dying_with_this

MIB = 2**20
BEAT_SECONDS = 2.0

# Long enough for a processor limited by short pauses to show it, short enough for a check: chosen.
ROUND_SECONDS = 0.5
# The best of these counts, so that a moment's disturbance makes no host slow.
ROUNDS = 5
# Square matrices that keep a GPU or one core busy for some milliseconds.
GPU_SIZE, CPU_SIZE = 8192, 512
GPU_BYTES, CPU_BYTES = 256 * MIB, 8 * MIB
# Between two hosts less is sent, and more often without GPUs: there it takes as long as a pause of
# a busy processor, and the best of five was seen to differ by half between equal hosts.
GPU_LINK, CPU_LINK = (64 * MIB, 5), (2 * MIB, 100)


def main() -> int:
    """Start and watch this host's processes; all end with this one's input."""
    job = json.loads(sys.stdin.readline())
    cores = len(os.sched_getaffinity(0))
    started = []
    for local_rank in range(job["processes"]):
        variables = {
            "OMP_NUM_THREADS": str(max(1, cores // job["processes"])),
            **job["environment"],
            "RANK": str(job["first_rank"] + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(job["world"]),
            "LOCAL_WORLD_SIZE": str(job["processes"]),
            "MASTER_ADDR": job["master"],
            "MASTER_PORT": str(job["port"]),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "llama_lib.cluster.speed", json.dumps(job)],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                preexec_fn=dying_with_this(),
            )
        )

    def end_with_the_input() -> None:
        sys.stdin.read()
        os._exit(1)

    def give_signs_of_life() -> None:
        while True:
            _write({"beat": True})
            time.sleep(BEAT_SECONDS)

    for action in (end_with_the_input, give_signs_of_life):
        threading.Thread(target=action, daemon=True).start()
    return max(abs(process.wait()) for process in started)


def work(job: dict[str, Any]) -> None:
    """One process: join the others, measure, say the results."""
    signal.alarm(job["seconds"])
    stage = "torch cannot be imported"
    try:
        import torch

        if job["installation"]:
            stage = "ColossalAI cannot be imported with the host layer"
            from llama_lib import host

            host.install()
            import colossalai  # noqa: F401
        stage = "this process could not join the others"
        device = _join(torch, job)
        say(stage="joined")
        stage = "matmul failed"
        say(matmul=_matmul(torch, device))
        stage = "an all-reduce failed"
        if job["world"] > 1:
            say(all_reduce=_all_reduce(torch, device))
        stage = "sending to another host failed"
        if job["hosts"] > 2:
            say(link=_link(torch, device, job))
        say(stage="done")
        with suppress(Exception):
            torch.distributed.barrier()  # The first must not leave while others need its store.
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        say(error=f"{stage} ({type(error).__name__}: {first_line})")
        # The doctor decides; a normal end could wait for a peer that is gone.
        os._exit(1)
    os._exit(0)


def say(**values: Any) -> None:
    _write({"rank": int(os.environ["RANK"]), **values})


def _write(message: dict[str, Any]) -> None:
    """One whole line at once, so that lines of several processes cannot mix."""
    os.write(sys.stdout.fileno(), f"{json.dumps(message)}\n".encode())


def _join(torch: Any, job: dict[str, Any]) -> Any:
    if job["installation"]:
        # As a run does it.
        from llama_lib.launch import start_process_group

        return start_process_group(seed=0)
    if not job["on_gpu"]:
        torch.distributed.init_process_group("gloo")
        return torch.device("cpu")
    local_rank, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= seen:
        # A build without CUDA, a driver too old for it, or CUDA_VISIBLE_DEVICES.
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'not at all'}"
        raise RuntimeError(f"no GPU {local_rank}: {built}, sees {seen}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)
    return device


def _matmul(torch: Any, device: Any) -> float:
    """TFLOPS of the best round; all processes work at the same time, as they do in training."""
    on_gpu = device.type == "cuda"
    size, kind = (GPU_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
    left, right = (torch.rand(size, size, device=device, dtype=kind) for _ in range(2))
    left @ right  # libraries are loaded and kernels chosen by the first
    best = 0.0
    for _ in range(ROUNDS):
        torch.distributed.barrier()
        count, begin = 0, _now(torch, device)
        while (took := _now(torch, device) - begin) < ROUND_SECONDS:
            for _ in range(10):
                left @ right
            count += 10
        best = max(best, 2 * size**3 * count / took / 1e12)
    return best


def _all_reduce(torch: Any, device: Any) -> float:
    """GB/s over the slowest connection of the ring, as NCCL's own tests count it."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    buffer = torch.ones(size // 4, device=device)
    world = torch.distributed.get_world_size()

    def once() -> None:
        torch.distributed.all_reduce(buffer)

    seconds = _best(torch, device, once)
    return 2 * (world - 1) / world * size / seconds / 1e9


def _link(torch: Any, device: Any, job: dict[str, Any]) -> float | None:
    """GB/s received from the host before this one, first process to first process.

    Neighbours share no phase, so a slow host slows its own two connections and no other.
    """
    hosts, per_host = job["hosts"], job["processes"]
    host, local_rank = divmod(int(os.environ["RANK"]), per_host)
    size, times = GPU_LINK if device.type == "cuda" else CPU_LINK
    buffer = torch.ones(size // 4, device=device)
    ready = torch.ones(1, device=device)
    received = None
    for phase in range(3):
        torch.distributed.barrier()
        for receiver in range(hosts):
            # With an odd number of hosts the last pair, which closes the ring, is left over.
            own_phase = 2 if receiver == 0 and hosts % 2 else receiver % 2
            sender = (receiver - 1) % hosts
            if phase != own_phase or local_rank or host not in (sender, receiver):
                continue
            peer = (sender if host == receiver else receiver) * per_host

            def receive(peer: int = peer) -> None:
                torch.distributed.send(ready, peer)
                torch.distributed.recv(buffer, peer)

            def send(peer: int = peer) -> None:
                torch.distributed.recv(ready, peer)
                torch.distributed.send(buffer, peer)

            seconds = _best(torch, device, receive if host == receiver else send, times)
            if host == receiver:
                received = size / seconds / 1e9
    return received


def _best(torch: Any, device: Any, action: Callable[[], None], times: int = ROUNDS) -> float:
    """Seconds of the fastest of a few times, after one that opens connections."""
    action()
    seconds = []
    for _ in range(times):
        begin = _now(torch, device)
        action()
        seconds.append(_now(torch, device) - begin)
    return min(seconds)


def _now(torch: Any, device: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    if "RANK" in os.environ and len(sys.argv) > 1:
        work(json.loads(sys.argv[1]))
    sys.exit(main())

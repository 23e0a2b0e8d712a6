"""stuck.py FOLDER SECONDS RANK WHAT: the watched part of a run, in which one rank does something.

SECONDS is --start_timeout and --stall_timeout. Steps are all-reduces over gloo; in the fifth, or
before the processes connect, RANK does WHAT. Nothing of ColossalAI is loaded.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from llama_lib import progress
from llama_lib.cli import run_script
from llama_lib.errors import RunError
from llama_lib.watch.watchdog import Watchdog, watched

STEPS = 20


def endless() -> None:
    while True:
        pass


def holds_the_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL this keeps Python's lock


def stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fails() -> None:
    raise RunError("the disk is full")


def works() -> None:
    """Writes a long checkpoint."""
    for _ in range(40):
        time.sleep(0.25)
        progress.made()


ACTIONS = {
    "endless": endless,
    "holds_the_lock": holds_the_lock,
    "stops": stops,
    "works": works,
    "fails_early": fails,
    "stops_early": stops,
}


def main(_: list[str]) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with watched(float(sys.argv[2])) as watchdog:
        _train(watchdog)


def _train(watchdog: Watchdog) -> None:
    folder, seconds, what = sys.argv[1], float(sys.argv[2]), sys.argv[4]
    chosen = watchdog.crew.rank == int(sys.argv[3])
    if chosen and what == "fails_early":
        fails()
    watchdog.ready()
    import torch
    import torch.distributed as dist

    with watchdog.starting(folder, seconds):
        if chosen and what == "stops_early":
            stops()
        if len(watchdog.crew.members) > 1:
            dist.init_process_group("gloo")
            dist.all_reduce(torch.ones(1))
    watchdog.train(seconds)
    for step in range(1, STEPS + 1):
        if chosen and step == 5 and what in ACTIONS:
            ACTIONS[what]()
        if dist.is_initialized():
            dist.all_reduce(torch.ones(1))
        progress.step_done(step)
        Path(folder, f"step-{step}").touch()
        time.sleep(0.25)  # four steps take longer than the watchdog's look every half second
    if dist.is_initialized():
        dist.destroy_process_group()
    print("all steps are done", flush=True)


if __name__ == "__main__":
    run_script(main)

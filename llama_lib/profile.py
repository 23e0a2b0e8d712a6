"""`--profile START:STOP`: a torch trace of some steps of a run.

Invariant: outside the steps that were asked for nothing is recorded.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_lib.config import Options


@contextlib.contextmanager
def profiled(
    options: Options, done: int, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step; traces START..STOP-1 into save_dir/profile.

    Args:
        done: steps done before; those that lie behind are not profiled, and one line says so.
    """
    if options.report.profile is None:
        yield lambda: None
        return
    start, stop = (int(part) for part in options.report.profile.split(":"))
    if start <= done:
        say(f"--profile {start}:{stop} lies before this run's first step: not profiled")
        yield lambda: None
        return
    folder = Path(options.checkpoint.save_dir) / "profile"

    def write(profile: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{dist.get_rank():05d}.json"
        profile.export_chrome_trace(str(path))
        say(f"trace of steps {start} to {stop - 1}: {path}")

    # Steps count from 1: the profiler waits for those before START, of which one warms it up.
    quiet = start - 1 - done
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=max(0, quiet - 1), warmup=min(1, quiet), active=stop - start, repeat=1
        ),
        on_trace_ready=write,
    ) as profile:
        yield profile.step

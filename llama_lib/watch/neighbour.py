"""How another process of this host is, as the system knows it.

Invariant: nothing is said of a process unless it is the one of that rank and of this run.
"""

import os

import psutil

from llama_lib.watch.roll_call import Crew

STOPPED, GONE, RUNS = "stopped", "gone", "runs"


def process_of(crew: Crew, rank: int) -> psutil.Process | None:
    """Of another rank on this host; None also where its number may mean another process here.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    member = crew.members[rank]
    if rank == crew.rank or (member.host, member.numbers) != (crew.me.host, crew.me.numbers):
        return None
    try:
        process = psutil.Process(member.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            raise psutil.ZombieProcess(member.pid)
        facts = process.environ()
    except psutil.NoSuchProcess:
        raise
    except (psutil.Error, OSError):
        return None
    if facts.get("RANK") != str(rank) or facts.get("MASTER_PORT") != os.environ.get("MASTER_PORT"):
        raise psutil.NoSuchProcess(member.pid)  # its number has gone to another one
    return process


def state_of(crew: Crew, rank: int) -> str | None:
    """STOPPED, GONE or RUNS; None: that cannot be seen from here."""
    try:
        process = process_of(crew, rank)
        if process is None:
            return None
        return STOPPED if process.status() == psutil.STATUS_STOPPED else RUNS
    except psutil.NoSuchProcess:
        return GONE
    except (psutil.Error, OSError):
        return None

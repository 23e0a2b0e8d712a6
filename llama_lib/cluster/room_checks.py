"""What a host has for a run: GPUs, a shared save directory, disk and memory.

Invariant: a lower bound that was chosen is stated as such in the message.
"""

from collections import Counter

from llama_lib.cluster.examination import Examined
from llama_lib.cluster.problem import Job, Problem, some

GIB = 2**30

# A process with torch and ColossalAI and no model takes 0.4 GiB (measured with torch 2.13, no GPU).
# The rest up to this, and the bound of the disk, were chosen.
MEMORY_PER_PROCESS = GIB
DISK_LEAST = GIB
# What Docker's manual and NCCL's recommend; NCCL fails late and obscurely with Docker's 64 MiB.
SHM_LEAST = GIB
# Chosen: more than a display or a monitor takes.
GPU_USED_SHARE = 0.1


def gpus(each: Examined, job: Job) -> list[Problem]:
    name, gpus = each.host.name, each.facts.get("gpus")
    if gpus is None:
        said = each.facts.get("errors", {}).get("gpus", "no answer")
        mend = "reload the driver or restart the host; `nvidia-smi` there shows more"
        return [Problem(name, "gpus", "nvidia-smi fails", f"nvidia-smi fails ({said})", mend)]
    usual = job.usual_gpus()
    found = []
    if job.processes and usual and len(gpus) < job.processes:
        what = f"{len(gpus)} GPU(s), expected {job.processes} for --nproc_per_node {job.processes}"
        mend = f"pass --nproc_per_node {len(gpus) or 1}, or take a host with more"
        found.append(Problem(name, "gpus", f"{len(gpus)} GPU(s)", what, mend))
    elif len(gpus) != usual:
        what = f"{len(gpus)} GPU(s), expected {usual} as on most hosts"
        mend = (
            "`nvidia-smi` there shows what is missing, if no CUDA_VISIBLE_DEVICES hides it; "
            "or take the host out of the host file"
        )
        found.append(Problem(name, "gpus", f"{len(gpus)} GPU(s)", what, mend))
    drivers = Counter(gpu["driver"] for other in job.hosts for gpu in other.facts.get("gpus") or [])
    if gpus and gpus[0]["driver"] != drivers.most_common(1)[0][0]:
        expected = drivers.most_common(1)[0][0]
        what = f"GPU driver: got {gpus[0]['driver']}, expected {expected} as on most hosts"
        mend = "install the same driver on all hosts"
        found.append(Problem(name, "gpus", f"driver {gpus[0]['driver']}", what, mend))
    for gpu in gpus[: job.per_host()]:
        used, total = gpu["used_mib"], gpu["mib"]
        if used and total and used > GPU_USED_SHARE * total:
            what = (
                f"GPU {gpu['index']} is in use: {used / 1024:.0f} of {total / 1024:.0f} GiB taken"
            )
            mend = "end the program that has it (`nvidia-smi` there names it)"
            found.append(Problem(name, "gpus", f"GPU {gpu['index']} in use", what, mend))
    return found


def save_dir(each: Examined, job: Job) -> list[Problem]:
    name, folder = each.host.name, job.questions.save_dir
    if each.token_error:
        full = "No space left" in each.token_error
        what = f"nothing can be written in {folder} ({each.token_error})"
        mend = "make room there" if full else "mend its rights, or give another --save_dir"
        return [Problem(name, "save_dir", "disk full" if full else "cannot write", what, mend)]
    groups = Counter(other.sees for other in job.hosts if other.sees is not None)
    if each.sees is None or len(groups) < 2:
        return []
    most = max(groups.values())
    shared = next(
        other.sees for other in job.hosts if other.sees is not None and groups[other.sees] == most
    )
    if each.sees == shared:
        return []
    there = sorted(shared - each.sees)
    what = f"does not see in {folder} what {some(there)} wrote: it is not the same folder"
    mend = "mount the shared file system there, or give --save_dir a folder that all hosts share"
    return [Problem(name, "save_dir", "not shared", what, mend)]


def disk(each: Examined, job: Job) -> list[Problem]:
    disks = each.facts.get("disks") or {}
    named = {
        "--save_dir": job.questions.save_dir,
        "--cache_dir": job.questions.cache_dir,
        "TMPDIR": each.facts.get("temporary"),
    }
    found = []
    places: dict[tuple[int, int], list[str]] = {}
    for label, path in named.items():
        disk = disks.get(path)
        if disk is None:
            continue
        if each.token_error and path == job.questions.save_dir:
            continue  # Nothing can be written there: `save_dir` has said so, and why.
        if not disk["writable"]:
            what = f"{label} {path}: {disk['at']} cannot be written to"
            mend = "mend its rights or its mount, or choose another folder"
            found.append(Problem(each.host.name, "disk", "cannot write", what, mend))
        need, why = DISK_LEAST, "the least that is of any use"
        if label == "--save_dir" and job.checkpoint_bytes:
            need, why = max(need, job.checkpoint_bytes), "for one checkpoint"
        if disk["free"] < need:
            text = f"{label} {path} has {_size(disk['free'])} free, expected {_size(need)}, {why}"
            places.setdefault((disk["free"], disk["total"]), []).append(text)
    for (free, _), texts in places.items():
        what, mend = "; ".join(texts), "make room there, or choose another folder"
        found.append(Problem(each.host.name, "disk", f"{_size(free)} free", what, mend))
    return found


def memory(each: Examined, job: Job) -> list[Problem]:
    free, processes = each.facts.get("memory"), job.per_host()
    found = []
    if free is not None and free < processes * MEMORY_PER_PROCESS:
        what = (
            f"{_size(free)} of memory are free, expected {_size(processes * MEMORY_PER_PROCESS)}: "
            f"{_size(MEMORY_PER_PROCESS)} for each of {processes} process(es) before any model"
        )
        mend = "end what else runs there, or start fewer processes per host"
        found.append(Problem(each.host.name, "memory", f"{_size(free)} free", what, mend))
    shm = each.facts.get("shm")
    if shm and each.facts.get("gpus") and processes > 1 and shm["total"] < SHM_LEAST:
        what = f"/dev/shm has {_size(shm['total'])}, expected {_size(SHM_LEAST)} or more for NCCL"
        mend = "docker run --shm-size 1g (or --ipc host); mount -o remount,size=1g /dev/shm"
        found.append(Problem(each.host.name, "memory", "/dev/shm small", what, mend))
    return found


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"

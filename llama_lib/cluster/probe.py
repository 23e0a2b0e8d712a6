"""Answers questions about the host it runs on: the far end of `python -m llama_lib doctor`.

Invariant: needs nothing but Python 3.8; the text of this file is sent to a host whose copy of the
project may be old, broken or absent. Nothing on the host is changed but the token that one question
writes, and that is gone when the program ends.

One JSON object per line comes in and one goes out; the end of the input ends the program.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import ipaddress
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

GPU_SECONDS = 8
CONNECT_SECONDS = 3
# A network file system may go on saying "no such file" for as long as its clients cache that.
SHARED_SECONDS = 6

_SIOCGIFADDR = 0x8915
_LISTENING = "0A"


def facts(question: dict[str, Any]) -> dict[str, Any]:
    """All that can be learned without touching anything; each fact fails on its own."""
    python = question["python"]
    parts: dict[str, Callable[[], Any]] = {
        "name": socket.gethostname,
        "python": platform.python_version,
        "executable": lambda: sys.executable,
        "python_found": lambda: sys.executable == python,
        "folder": lambda: os.path.isdir(question["folder"]),
        "code": lambda: code(question["root"]),
        "packages": lambda: packages(question["packages"], question["search"]),
        "gpus": gpus,
        "memory": memory,
        "shm": lambda: disk("/dev/shm"),
        "disks": lambda: {path: disk(path) for path in [*question["paths"], temporary(question)]},
        "temporary": lambda: temporary(question),
        "own_address": own_address,
        "interfaces": interfaces,
        "towards": lambda: towards(question["first"]),
        "cores": lambda: len(os.sched_getaffinity(0)),
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:
            found[name] = None
            found.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
    return found


def clock(question: dict[str, Any]) -> float:
    return time.time()


def code(root: str) -> dict[str, str]:
    """Hash of every source file of the project: what this process would import there."""
    names = glob.glob(os.path.join(root, "*.py"))
    names += glob.glob(os.path.join(root, "llama_lib", "**", "*.py"), recursive=True)
    hashes = {}
    for name in names:
        with open(name, "rb") as file:
            hashes[os.path.relpath(name, root)] = hashlib.sha256(file.read()).hexdigest()[:16]
    return hashes


def packages(names: list[str], search: list[str]) -> dict[str, str | None]:
    """Versions as the packages' metadata say; None where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    sys.path[:0] = [path for path in search if path not in sys.path]
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def gpus() -> list[dict[str, Any]]:
    """What nvidia-smi lists of those that a process here may use; empty where the host has none.

    Raises:
        RuntimeError: there is an nvidia-smi and it does not work, as after a driver's update.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    fields = "index,uuid,memory.total,memory.used,driver_version,name"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=GPU_SECONDS
    )
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        if "No devices were found" in said:
            return []
        first = said.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(first[0])
    rows = [line.split(", ", 5) for line in said.strip().splitlines()]
    return [
        {
            "index": row[0],
            "mib": float(row[2]) if row[2].isdigit() else None,
            "used_mib": float(row[3]) if row[3].isdigit() else None,
            "driver": row[4],
            "name": row[5],
        }
        for row in _visible(rows)
    ]


def _visible(rows: list[list[str]]) -> list[list[str]]:
    """The rows that CUDA_VISIBLE_DEVICES chooses, by number or by the beginning of the uuid."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or "MIG-" in chosen:  # nvidia-smi lists whole GPUs, no parts of them
        return rows
    found = []
    for word in chosen.split(","):
        word = word.strip()
        fits = [row for row in rows if word == row[0] or (word and row[1].startswith(word))]
        if len(fits) != 1:
            break  # As CUDA does: what follows a word that means nothing does not count.
        found += fits
    return found


def memory() -> int:
    """Bytes that new processes can take, within the control group's limit if there is one."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current") as file:
            free = min(free, limit - int(file.read()))
    except (OSError, ValueError):
        pass  # No control group, or one whose limit is the word "max".
    return free


def temporary(question: dict[str, Any]) -> str:
    """The folder for temporary files: that of the starting shell if it has one, else our own."""
    return question["temporary"] or os.environ.get("TMPDIR") or "/tmp"


def disk(path: str) -> dict[str, Any]:
    """Room where `path` is or would be made."""
    existing = os.path.abspath(os.path.expanduser(path))
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    sizes = os.statvfs(existing)
    return {
        "free": sizes.f_bavail * sizes.f_frsize,
        "total": sizes.f_blocks * sizes.f_frsize,
        "at": existing,
        "writable": os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK),
    }


def own_address() -> str | None:
    """The first address of this host's name that a server can be bound to: gloo's rule."""
    try:
        candidates = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return None
    for family, kind, protocol, _, address in candidates:
        try:
            with socket.socket(family, kind, protocol) as server:
                server.bind(address)
        except OSError:
            continue
        return str(address[0])
    return None


def interfaces() -> dict[str, list[str]]:
    """Addresses of each network interface that is up."""
    import fcntl

    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            found[name] = []
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            found[name].append(socket.inet_ntoa(answer[20:24]))
    try:
        with open("/proc/net/if_inet6") as file:
            for line in file:
                digits, *_, name = line.split()
                address = ipaddress.IPv6Address(int(digits, 16))
                found.setdefault(name, []).append(str(address))
    except OSError:
        pass  # A kernel without IPv6.
    return found


def towards(first: str) -> dict[str, Any]:
    """The interface by which packets leave for the first host; None where none leads there."""
    family, kind, protocol, _, address = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as asking:
        # No packet is sent: the kernel only chooses the route.
        asking.connect(address)
        own = asking.getsockname()[0]
    names = [name for name, addresses in interfaces().items() if own in addresses]
    return {"address": str(address[0]), "own": own, "interface": names[0] if names else None}


# Kept until the program ends, for `reach` on the other hosts.
_listening: list[socket.socket] = []


def port(question: dict[str, Any]) -> dict[str, Any]:
    """Listen on the port as the run's first process will; where that fails, who has it."""
    number = question["port"]
    try:
        _listening.append(_server(number))
    except OSError as error:
        return {"free": False, "why": str(error.strerror).split(" (")[0], "holder": holder(number)}
    return {"free": True}


def _server(number: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", number), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", number))


def holder(number: int) -> str | None:
    """Process id and name of who listens on the port, as far as this user may see it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as file:
                rows = [line.split() for line in file][1:]
        except OSError:
            continue
        inodes |= {
            f"socket:[{row[9]}]"
            for row in rows
            if row[3] == _LISTENING and int(row[1].rsplit(":", 1)[1], 16) == number
        }
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) in inodes:
                pid = link.split("/")[2]
                with open(f"/proc/{pid}/comm", errors="replace") as file:
                    return f"pid {pid} ({file.read().strip()})"
        except OSError:
            continue  # Ended meanwhile, or another user's.
    return None


def reach(question: dict[str, Any]) -> str | None:
    """Why no connection to the first host's port can be made; None if one can."""
    address = (question["first"], question["port"])
    try:
        with socket.create_connection(address, timeout=CONNECT_SECONDS):
            return None
    except OSError as error:
        return str(error)


# What `write_token` made: files and folders, in the order of their removal.
_made: list[str] = []


def write_token(question: dict[str, Any]) -> None:
    """Write this host's token in the folder, which is made where absent."""
    folder = os.path.abspath(question["folder"])
    missing = folder
    while not os.path.exists(missing):
        _made.append(missing)
        missing = os.path.dirname(missing)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, question["name"])
    with open(path, "w") as file:
        _made.insert(0, path)
        file.write(question["name"])
        file.flush()
        os.fsync(file.fileno())


def read_tokens(question: dict[str, Any]) -> list[str]:
    """Which of the tokens this host sees, given the time that network file systems may need."""
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        # Listing makes a client of a network file system look anew.
        there = os.listdir(question["folder"]) if os.path.isdir(question["folder"]) else []
        seen = [name for name in question["names"] if name in there]
        if len(seen) == len(question["names"]) or time.monotonic() > deadline:
            return seen
        time.sleep(0.5)


def remove_token(question: dict[str, Any]) -> None:
    for path in [path for path in _made if not os.path.isdir(path)]:
        _made.remove(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def remove_folders(question: dict[str, Any]) -> None:
    """Remove the folders made for the token, unless something else came into them."""
    while _made:
        with contextlib.suppress(OSError):
            os.rmdir(_made.pop(0))


QUESTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "facts": facts,
    "clock": clock,
    "port": port,
    "reach": reach,
    "write_token": write_token,
    "read_tokens": read_tokens,
    "remove_token": remove_token,
    "remove_folders": remove_folders,
}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"is": QUESTIONS[question["ask"]](question)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    try:
        for line in sys.stdin:
            sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
            sys.stdout.flush()
    finally:
        remove_token({})
        remove_folders({})


if __name__ == "__main__":
    main()

"""One run at a time writes to a save directory: a file says which, and is renewed while it lives.

Invariant: of two runs that want one directory at the same time at most one trains. A file and not a
lock of the operating system, because those of other hosts are not seen on every shared disk.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llama_lib.errors import RunError, UserError
from llama_lib.progress import made

FILE = "run.lock"
RENEW_SECONDS = 5.0
# Who has not renewed a lease for so long is gone, or stands still and will see that it was lost.
# Network file systems may show the time of a file some seconds late.
LEASE_SECONDS = 30.0
# Two that take over the same old lease see each other after this time.
_SETTLE_SECONDS = 0.5
_POLL_SECONDS = 1.0
_NO_JOB = "none"  # what torchrun calls a run that was given no name


@dataclass(frozen=True)
class Holder:
    """Who writes to a directory.

    `place` is the machine and namespace in which `pid` means something; `started` is that process's
    beginning; all starts of a job that is restarted have `job` in common.
    """

    host: str
    place: str
    pid: int
    started: float
    job: str
    token: str

    @classmethod
    def here(cls) -> "Holder":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        process = psutil.Process()
        job = os.environ.get("TORCHELASTIC_RUN_ID", _NO_JOB)
        return cls(
            socket.gethostname(), place, process.pid, process.create_time(), job, uuid.uuid4().hex
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def runs(self) -> bool:
        """Whether the process is there; for those of this place."""
        try:
            return psutil.Process(self.pid).create_time() == self.started
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


class Lease:
    """A directory that is this run's; renewed by a thread until it is closed."""

    def __init__(self, path: Path, me: Holder) -> None:
        self._path, self._me = path, me
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._me:
                self._path.unlink()

    def _renew(self) -> None:
        while not self._closing.wait(RENEW_SECONDS):
            try:
                holder = _read(self._path)
                if holder == self._me:
                    os.utime(self._path)
                elif holder is not None:
                    self._end(holder)
            except OSError:
                continue  # a disk that does not answer is not this thread's to report

    def _end(self, holder: Holder) -> None:
        text = (
            f"{self._path.parent} was taken over by another run ({holder}) while this one stood "
            f"still for more than {LEASE_SECONDS:.0f} s; ending here, so as not to write over it.\n"
        )
        os.write(2, text.encode())
        os._exit(RunError.exit_code)


@contextlib.contextmanager
def leased(save_dir: str, say: Callable[[str], None]) -> Iterator[None]:
    """The directory is this run's until the block ends; called by one process of a run.

    Raises:
        UserError: another run has it.
        RunError: it cannot be written to.
    """
    path, me = Path(save_dir) / FILE, Holder.here()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path, me, say)
    except OSError as error:
        raise RunError(f"--save_dir {save_dir} cannot be written to ({error.strerror}).") from None
    lease = Lease(path, me)
    try:
        yield
    finally:
        lease.close()


def _take(path: Path, me: Holder, say: Callable[[str], None]) -> None:
    holder = _holder(path, me, say)
    if holder is None:
        _write(path, me)
        time.sleep(_SETTLE_SECONDS)
        holder = _read(path)
    if holder != me:
        raise UserError(
            f"--save_dir {path.parent} is being written to by another run ({holder}). Choose "
            "another one, as in -o other, or end that run first: touch "
            f"{path.parent / 'save_and_exit'} saves and ends it."
        )


def _holder(path: Path, me: Holder, say: Callable[[str], None]) -> Holder | None:
    """The run that has the directory, if it still runs."""
    holder = _read(path)
    # A launcher starts a job again only when all of it has ended.
    if holder is None or holder.job == me.job != _NO_JOB:
        return None
    if holder.place == me.place:
        return holder if holder.runs() else None
    renewed, age = _renewed(path)
    if age < LEASE_SECONDS:
        say(
            f"{path} is of {holder}, which renewed it {age:.0f} s ago: waiting up to "
            f"{LEASE_SECONDS - age:.0f} s to see whether that still runs"
        )
    while age < LEASE_SECONDS:
        time.sleep(_POLL_SECONDS)
        made()  # the other processes wait for this one, and nobody is to call that a stall
        again, age = _renewed(path)
        if again != renewed:
            return _read(path)
    return None


def _read(path: Path) -> Holder | None:
    """Whose lease it is; None if there is none."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder("a host unknown", "", 0, 0.0, _NO_JOB, "")


def _write(path: Path, holder: Holder) -> None:
    temporary = path.with_name(f"{path.name}.{holder.token}")
    temporary.write_text(json.dumps(asdict(holder)) + "\n")
    temporary.rename(path)


def _renewed(path: Path) -> tuple[float, float]:
    """When the lease was renewed, and how long that is ago by the clock of the disk it lies on."""
    probe = path.with_name(f"{path.name}.now-{uuid.uuid4().hex}")
    try:
        probe.touch()
        renewed = path.stat().st_mtime
        return renewed, probe.stat().st_mtime - renewed
    except FileNotFoundError:
        return 0.0, LEASE_SECONDS
    finally:
        probe.unlink(missing_ok=True)

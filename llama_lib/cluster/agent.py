"""`python -m llama_lib.cluster.agent`: starts the ranks of one host and ends them, for a launcher.

Not torchrun: it turns every exit code into 1, buries a message under its own report, and its static
meeting cannot be formed again without a lost host. What it gives to a process is given here too.

Invariant: no process of the job outlives the contact with the launcher. The agent is two processes,
each of which ends everything when it loses the other; the kernel ends the ranks if both are killed.
"""

import glob
import os
import signal
import threading
import time
from contextlib import suppress
from select import select
from typing import NoReturn

from llama_lib.cluster import ports, probe, processes
from llama_lib.cluster.environment import without_launcher
from llama_lib.cluster.protocol import (
    BEAT_SECONDS,
    GRACE_SECONDS,
    HOST_LOST_SECONDS,
    RUN_ID,
    STUCK_SECONDS,
    VERSION,
    Message,
    decode,
    encode,
)
from llama_lib.cluster.worker import Terminal, Worker

# What is left of an attempt that has just ended may keep the port for a moment. Chosen.
_PORT_PATIENCE_SECONDS = 15.0
# For the last words of the workers, if anybody hears them. Chosen.
_REPORT_SECONDS = 3.0
_LOOK_SECONDS = 0.2
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
_READ_BYTES = 65536


class Agent:
    """The workers of this host.

    Args:
        output: descriptor that leads to the launcher.
    """

    def __init__(self, output: int) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._job: Message = {}
        self._workers: list[Worker] = []
        self._heard = time.monotonic()
        self._deadline: float | None = None  # when what still runs is killed
        self._is_over = False
        self._is_told_to_end = False

    def emit(self, message: Message) -> None:
        """Tell the launcher; a launcher that is gone is found out by reading."""
        data = encode(message)
        with self._lock, suppress(OSError):
            while data:
                data = data[os.write(self._output, data) :]

    def run(self) -> None:
        """Obey the launcher until it is done with this host, or gone."""
        signal.signal(signal.SIGTERM, lambda *_: self._be_told_to_end())
        self._emit_hello()
        threading.Thread(target=self._beat, daemon=True).start()
        pending = b""
        while not self._is_over:
            readable = select([0], [], [], _LOOK_SECONDS)[0]
            if readable:
                data = os.read(0, _READ_BYTES)
                if not data:
                    self._lose("its line to the launcher was closed")
                    break
                self._heard = time.monotonic()
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    self._obey(decode(line))
            if self._is_told_to_end:
                self._lose("its agent was told to end by SIGTERM, or half of it was killed")
            elif time.monotonic() - self._heard > HOST_LOST_SECONDS:
                self._lose(f"it heard nothing from the launcher for {HOST_LOST_SECONDS:.0f} s")
            self._keep_deadline()
        self._end_all()

    def _emit_hello(self) -> None:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        hello = {
            "hello": VERSION,
            # Two names of one host have this in common.
            "identity": f"{boot} {os.readlink('/proc/self/ns/net')}",
            "gpus": count_gpus(),
            "pid": os.getpid(),
        }
        # What a login shell has printed without ending its line becomes a line of its own.
        with self._lock, suppress(OSError):
            os.write(self._output, b"\n" + encode(hello))

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.emit({"beat": 1})

    def _obey(self, message: Message) -> None:
        if "job" in message:
            self._job = message["job"]
            problem = self._prepare()
            self.emit({"problem": problem} if problem else {"ready": 1})
        elif "go" in message:
            self._start()
        elif "signal" in message:
            for worker in self._workers:
                worker.send_signal(message["signal"])
        elif "stop" in message:
            self._stop(float(message["stop"]))

    def _prepare(self) -> tuple[str, str] | None:
        """What stands in the way of starting here, and what mends it; None if nothing."""
        folder, script = self._job["workdir"], self._job["argv"][0]
        try:
            os.chdir(folder)
        except OSError as error:
            return f"folder {folder}: {error.strerror}", "start from a folder that all hosts have"
        if not os.path.isfile(script):
            return f"{script} is not in {folder}", "the project must lie there on all hosts"
        if self._job["node_rank"] == 0:
            return self._check_port(int(self._job["master_port"]))
        return None

    def _check_port(self, port: int) -> tuple[str, str] | None:
        patience = _PORT_PATIENCE_SECONDS if self._job["attempt"] else 0.0
        deadline = time.monotonic() + patience
        while not ports.can_listen(port):
            if time.monotonic() > deadline:
                holder = probe.holder(port) or "a process that cannot be seen from here"
                return f"port {port} is used by {holder}", "pass another one by --master_port"
            time.sleep(0.5)
            self._heard = time.monotonic()
        return None

    def _start(self) -> None:
        # What an earlier attempt left here. Agents of hosts that are containers of one machine may
        # see each other's ranks, so those of this attempt are spared.
        if attempt := self._job["attempt"]:
            processes.kill_marked(RUN_ID, self._job["run_id"], f"{_ATTEMPT}={attempt}")
        for local_rank in range(self._job["nproc"]):
            self._workers.append(
                Worker(
                    local_rank,
                    self._job["argv"],
                    self._environment(local_rank),
                    self.emit,
                    self._terminals(local_rank),
                )
            )
        for worker in self._workers:
            worker.follow()

    def _terminals(self, local_rank: int) -> tuple[Terminal | None, Terminal | None]:
        """One rank of the job may draw a progress bar."""
        if local_rank or self._job["node_rank"]:
            return None, None
        made = [Terminal(**given) if given else None for given in self._job["terminals"]]
        return made[0], made[1]

    def _environment(self, local_rank: int) -> dict[str, str]:
        """All variables of a rank, as torchrun sets them."""
        job = self._job
        nproc, num_nodes, node_rank = job["nproc"], job["num_nodes"], job["node_rank"]
        rank, world_size = node_rank * nproc + local_rank, nproc * num_nodes
        place = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": nproc,
            "GROUP_RANK": node_rank,
            "GROUP_WORLD_SIZE": num_nodes,
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": world_size,
            "ROLE_NAME": "default",
            "MASTER_ADDR": job["master_addr"],
            "MASTER_PORT": job["master_port"],
            _ATTEMPT: job["attempt"],
            "TORCHELASTIC_MAX_RESTARTS": job["restarts"],
            RUN_ID: job["run_id"],
        }
        variables = without_launcher(os.environ) | job["environment"]
        if any(job["terminals"]) and "TERM" not in variables:
            variables["TERM"] = next(given["name"] for given in job["terminals"] if given)
        if nproc > 1:
            share = max(1, len(os.sched_getaffinity(0)) // nproc)
            variables.setdefault("OMP_NUM_THREADS", str(share))
        return variables | {name: str(value) for name, value in place.items()}

    def _stop(self, grace: float) -> None:
        """End the workers: ask them now, kill them after `grace` seconds, or earlier if that was
        said before."""
        deadline = time.monotonic() + grace
        if self._deadline is None:
            for worker in self._workers:
                worker.send_signal(signal.SIGTERM)
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        self._keep_deadline()

    def _keep_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            for worker in self._workers:
                worker.kill()

    def _be_told_to_end(self) -> None:
        self._is_told_to_end = True

    def _lose(self, reason: str) -> None:
        """Nobody directs this host any more."""
        self._is_over = True
        if any(not worker.has_ended for worker in self._workers):
            # Where the way to the launcher is blocked, saying so must keep nobody from ending.
            message = {"ending": reason}
            threading.Thread(target=self.emit, args=(message,), daemon=True).start()

    def _end_all(self) -> None:
        running = [worker for worker in self._workers if not worker.has_ended]
        if running:
            self._stop(GRACE_SECONDS)
        while self._deadline is not None and time.monotonic() < self._deadline:
            if all(worker.has_ended for worker in self._workers):
                break
            time.sleep(0.05)
        processes.kill_descendants(STUCK_SECONDS)
        deadline = time.monotonic() + _REPORT_SECONDS
        for worker in self._workers:
            worker.is_reported.wait(max(0.0, deadline - time.monotonic()))


def count_gpus() -> int:
    """GPUs that a process of this host would see."""
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus and chosen is not None:
        return len([each for each in chosen.split(",") if each and not each.startswith("-")])
    return gpus


def _guard() -> None:
    """Become two processes; returns in the second, the first one ends what that leaves behind."""
    processes.become_subreaper()
    first = os.getpid()
    second = os.fork()
    if second == 0:
        # A group of its own: whoever kills the first one's group leaves this one to clean up.
        os.setpgid(0, 0)
        processes.die_with(first, signal.SIGTERM)
        processes.become_subreaper()
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.kill(second, signal.SIGTERM))
    # The launcher shall see the end of the second one, not of this.
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    _, status = os.waitpid(second, 0)
    processes.kill_descendants(STUCK_SECONDS)
    os._exit(min(255, abs(os.waitstatus_to_exitcode(status))))


def main() -> NoReturn:
    _guard()
    # Nothing else in this process may write where messages go.
    output = os.dup(1)
    os.dup2(2, 1)
    os.set_inheritable(output, False)
    Agent(output).run()
    os._exit(0)


if __name__ == "__main__":
    main()

"""Requests that reach a run from outside: signals, and files touched in its save directory.

Invariant: all ranks act on a request at the same step boundary, or the job ends.
"""

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

SAVE_NOW = "save_now"
SAVE_AND_EXIT = "save_and_exit"

# torchrun kills its workers 30 s after a signal: 10 s to agree leaves 20 s to save.
ANSWER_SECONDS = 10.0

# A Ctrl-C may come from the terminal and, at once, again from the launcher; a hand takes longer.
ECHO_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """What all ranks agreed to do after the current step.

    `failed`: what some rank does beside the training has failed, and the run has to end.
    """

    save: bool = False
    leave: bool = False
    signal_number: int = 0
    failed: bool = False


class Requests:
    """Collects requests and lets all ranks agree on them once per step.

    `ask` starts the exchange when a step begins and `answer` reads it when the step ends, so the
    (host-only) exchange runs beside the computation and costs no device synchronisation.

    Args:
        saves: the run saves before it ends on a request.
    """

    def __init__(self, save_dir: str, saves: bool = True) -> None:
        self._save_dir, self._saves = Path(save_dir), saves
        self._group = dist.new_group(backend="gloo")
        self._flags = torch.zeros(4, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._signal_number = 0
        self._interrupted: float | None = None  # when the latest Ctrl-C came
        self._deadline: threading.Timer | None = None
        self._in_step = False
        self._lock = threading.Lock()
        self._handlers: dict[int, object] = {}
        self._listen()

    def _listen(self) -> None:
        # Python runs signal handlers between bytecodes only, so a rank that waits in a collective
        # would never run one; the wake-up descriptor is written at once, and a thread reads it.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = (reader, writer)
        self._previous_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._receive, args=(reader,), daemon=True).start()

    def _receive(self, reader: socket.socket) -> None:
        while True:
            try:
                received = reader.recv(1)
            except OSError:
                return
            if not received:
                return
            number = received[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self._is_impatient(number):
                os._exit(128 + number)
            if self._signal_number == 0 and dist.get_rank() == 0:
                name = signal.Signals(number).name
                what = (
                    "saving after this step, then ending"
                    if self._saves
                    else "ending after this step"
                )
                print(f"{name}: {what}", file=sys.stderr, flush=True)
            with self._lock:
                self._signal_number = self._signal_number or number
                self._watch_step()

    def _is_impatient(self, number: int) -> bool:
        """Whether this is a user's second Ctrl-C, not the first one passed on by the launcher."""
        if number != signal.SIGINT:
            return False
        first, self._interrupted = self._interrupted, time.monotonic()
        return first is not None and self._interrupted - first > ECHO_SECONDS

    def _watch_step(self) -> None:
        """Start the deadline of a signal; a rank that saves or evaluates is not overdue.

        A single process has nobody to wait for and no launcher that kills it: it takes its time.
        """
        if dist.get_world_size() == 1:
            return
        if self._in_step and self._signal_number and self._deadline is None:
            self._deadline = threading.Timer(ANSWER_SECONDS, self._give_up)
            self._deadline.daemon = True
            self._deadline.start()

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        print(
            f"rank {dist.get_rank()}: signal {self._signal_number}, but not every rank reached the "
            f"end of a step within {ANSWER_SECONDS:.0f} s: ending without a checkpoint. For longer "
            f"steps touch {self._save_dir / SAVE_AND_EXIT} instead.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def ask(self, failed: bool = False) -> None:
        """Start the exchange of this step; called by every rank when a step begins.

        Args:
            failed: what this rank does beside the training has failed.
        """
        leader = dist.get_rank() == 0
        with self._lock:
            self._in_step = True
            self._watch_step()
        self._flags[0] = self._signal_number
        self._flags[1] = int(leader and (self._save_dir / SAVE_NOW).exists())
        self._flags[2] = int(leader and (self._save_dir / SAVE_AND_EXIT).exists())
        self._flags[3] = int(failed)
        self._work = dist.all_reduce(
            self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def answer(self) -> Request:
        """What was agreed; files that asked for it are removed."""
        assert self._work is not None
        self._work.wait()
        number, save_now, save_and_exit, failed = self._flags.tolist()
        with self._lock:
            self._in_step = False
            self._stop_watching()  # a request that came too late for this exchange: the next step's
        if dist.get_rank() == 0:
            for asked, name in ((save_now, SAVE_NOW), (save_and_exit, SAVE_AND_EXIT)):
                if asked:
                    (self._save_dir / name).unlink(missing_ok=True)
        leave = bool(number or save_and_exit)
        return Request(bool(save_now) or leave, leave, number, bool(failed))

    def close(self) -> None:
        """Give the signals back to their former handlers."""
        with self._lock:
            self._in_step = False
            self._stop_watching()
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        for end in self._sockets:
            end.close()

"""Keeping a job alive: after a failure it starts again, on the hosts that answer.

Invariant: a user's mistake or a wish to end is never answered with a restart, the number of
restarts is never exceeded, and a restarted training goes on from its newest checkpoint.
"""

import dataclasses
import io
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from llama_lib.cluster.job import Failure, Job, NotReady, Outcome, Plan
from llama_lib.cluster.link import Events, Link, connect
from llama_lib.cluster.output import Output
from llama_lib.cluster.protocol import GRACE_SECONDS
from llama_lib.cluster.remote import Host, HostError
from llama_lib.cluster.signals import Signals
from llama_lib.errors import RunError, UserError

# A host that was lost has noticed it too by now; this long it needs to end its ranks.
_LOST_HOST_SECONDS = GRACE_SECONDS + 5.0
# The scripts that know --load.
_RESUMABLE = ("pretrain.py", "finetune.py")


@dataclass(frozen=True)
class Wish:
    """What the user asked for; None stands for what follows from the hosts."""

    hosts: list[Host]
    num_nodes: int
    min_nodes: int
    restarts: int
    nproc: int | None
    master_addr: str | None
    plan: Plan  # all that does not depend on the hosts that answer


class Supervisor:
    """Runs the attempts of one job.

    Args:
        announce: called with the hosts and the plan of the first attempt before it starts.
    """

    def __init__(
        self,
        wish: Wish,
        output: Output,
        signals: Signals,
        announce: Callable[[list[str], Plan], None],
    ) -> None:
        self._wish, self._output, self._signals = wish, output, signals
        self._announce = announce
        self._resume = Resume(wish.plan.argv)
        self._run_id = uuid.uuid4().hex[:12]
        self._processes: int | None = None  # of the attempt before

    def run(self) -> int:
        """The exit code of the job.

        Raises:
            RunError: too few hosts can take part.
            UserError: the number of processes does not follow from the hosts.
        """
        outcome = self._attempt(0, None)
        for number in range(1, self._wish.restarts + 1):
            if outcome.code == 0 or outcome.asked:
                break
            if outcome.lost:
                self._output.say(
                    f"{outcome.failure}; waiting {_LOST_HOST_SECONDS:.0f} s, in which a host that "
                    "only lost the link ends its processes too"
                )
                time.sleep(_LOST_HOST_SECONDS)
            outcome = self._attempt(number, outcome)
        self._report(outcome)
        return outcome.code

    def _report(self, outcome: Outcome) -> None:
        """Of a user's mistake the rank itself has said all."""
        if outcome.failure is None or outcome.code == UserError.exit_code:
            return
        # A save that failed after a signal ended otherwise than it was asked to.
        is_as_asked = outcome.asked and outcome.code > 128
        how = "ended as asked" if is_as_asked else f"{outcome.failure} first"
        if is_as_asked and outcome.at_once:
            how = "the ranks were ended at once, as asked, which saves nothing"
        self._output.say(f"{how}; exit code {outcome.code}")

    def _attempt(self, number: int, before: Outcome | None) -> Outcome:
        events: Events = queue.SimpleQueue()
        links = self._gather(events, least=self._wish.min_nodes if number else None)
        try:
            plan = self._plan(links, number)
        except BaseException:
            _dismiss(links)
            raise
        names = [link.host.name for link in links]
        if before is None:
            self._announce(names, plan)
        else:
            self._say_restart(names, plan, before)
        self._processes = plan.nproc * len(links)
        try:
            return Job(plan, links, events, self._output, self._signals).run()
        except NotReady as error:
            if number == 0:
                raise RunError(str(error)) from None
            self._output.say(str(error))
            lost = [problem.host for problem in error.problems]
            return Outcome(1, False, Failure(lost[0], what=error.problems[0].what), lost)

    def _gather(self, events: Events, least: int | None) -> list[Link]:
        """Agents on the first hosts that answer, as many as are wanted.

        Where fewer answer, spares included, at least `least` go on; None stands for all.
        """
        wanted = self._wish.num_nodes
        waiting = list(self._wish.hosts)
        links: list[Link] = []
        silent: list[HostError] = []
        while waiting and len(links) < wanted:
            asked = waiting[: wanted - len(links)]
            waiting = waiting[len(asked) :]
            for answer in connect(asked, events):
                if isinstance(answer, Link):
                    links.append(answer)
                else:
                    silent.append(answer)
        doubles = _doubles(links)
        if len(links) < (least or wanted) or doubles:
            _dismiss(links)
            problems = [str(error) for error in [*silent, *doubles]]
            if least and not doubles:
                problems.append(
                    f"{len(links)} of the hosts answer, fewer than --min_nodes {least}: not "
                    "started again."
                )
            raise RunError("\n".join(problems))
        for error in silent:
            self._output.say(f"without {error}")
        return links

    def _plan(self, links: Sequence[Link], attempt: int) -> Plan:
        wish, first = self._wish, links[0].host.name
        master = "127.0.0.1" if len(links) == 1 else first
        # An address that was given belongs to the first host of the file.
        if wish.master_addr and first == wish.hosts[0].name:
            master = wish.master_addr
        return dataclasses.replace(
            wish.plan,
            argv=self._resume.argv() if attempt else wish.plan.argv,
            nproc=wish.nproc or self._processes_per_host(links),
            master_addr=master,
            run_id=self._run_id,
            attempt=attempt,
            restarts=wish.restarts,
        )

    @staticmethod
    def _processes_per_host(links: Sequence[Link]) -> int:
        gpus = {link.host.name: int(link.hello["gpus"]) for link in links}
        counts = set(gpus.values())
        if len(counts) == 1 and 0 not in counts:
            return counts.pop()
        seen = ", ".join(f"{name} {count}" for name, count in gpus.items())
        raise UserError(
            f"--nproc_per_node is not given and does not follow from the GPUs of the hosts "
            f"({seen}); pass the number of processes per host by --nproc_per_node (to a "
            "benchmark script: NPROC=)."
        )

    def _say_restart(self, names: list[str], plan: Plan, before: Outcome) -> None:
        processes = plan.nproc * len(names)
        line = (
            f"restart {plan.attempt} of {plan.restarts}, since {before.failure}: "
            f"{processes} process(es) on {', '.join(names)}"
        )
        if self._processes not in (None, processes):
            line += (
                f" instead of {self._processes}; that changes the global batch unless "
                "--global_batch_tokens fixes it"
            )
        self._output.say(line)
        if note := self._resume.note():
            self._output.say(note)


def _dismiss(links: Sequence[Link]) -> None:
    for link in links:
        link.end()
    for link in links:
        link.close(1.0)


def _doubles(links: Sequence[Link]) -> list[HostError]:
    """Hosts that are another one of the job under a second name."""
    problems = []
    seen: dict[str, str] = {}
    for link in links:
        earlier = seen.setdefault(link.hello["identity"], link.host.name)
        if earlier != link.host.name:
            what = f"is the same host as {earlier}"
            problems.append(HostError(link.host.name, what, "name each host once in the host file"))
    return problems


class Resume:
    """The arguments with which a restarted script goes on where it was.

    A script of ours gets `--load auto`. Where the user gave a checkpoint to start from, that holds
    until the run has written one of its own.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)
        self._given: str | None = None
        self._save_dir: Path | None = None
        if Path(argv[0]).name in _RESUMABLE:
            self._read_options()
        self._newest = self._latest()

    def argv(self) -> list[str]:
        """For a restart, now."""
        if Path(self._argv[0]).name not in _RESUMABLE or self._keeps_given():
            return self._argv
        return [*self._argv, "--load", "auto"]

    def note(self) -> str:
        """What the user should know about where it starts; empty if nothing."""
        if Path(self._argv[0]).name not in _RESUMABLE:
            return f"{self._argv[0]} is not known to take --load: it starts as it did before"
        if self._keeps_given():
            return (
                f"no checkpoint of this run in {self._save_dir} can be seen from here: it starts "
                f"from --load {self._given} again"
            )
        return ""

    def _keeps_given(self) -> bool:
        return self._given not in (None, "auto") and self._latest() == self._newest

    def _read_options(self) -> None:
        from llama_lib.config import parse_options

        silence = io.StringIO()  # what there is to say, the ranks say
        try:
            with redirect_stdout(silence), redirect_stderr(silence):
                options = parse_options(Path(self._argv[0]).stem, self._argv[1:])
        except (UserError, SystemExit):
            return
        self._given, self._save_dir = options.checkpoint.load, Path(options.checkpoint.save_dir)

    def _latest(self) -> str | None:
        """The name of the newest checkpoint."""
        try:
            return (self._save_dir / "latest").read_text() if self._save_dir else None
        except OSError:
            return None

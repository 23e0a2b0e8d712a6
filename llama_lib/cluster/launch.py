"""`python -m llama_lib launch [options] SCRIPT ARGUMENTS...`: one job on this host or on many.

Invariant: the script gets its arguments as they were typed, byte for byte, and the exit code is the
job's own.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from llama_lib.cluster import ports
from llama_lib.cluster.agent import count_gpus
from llama_lib.cluster.environment import Passed, names_of, passed_on
from llama_lib.cluster.hostfile import read_hostfile
from llama_lib.cluster.job import Plan
from llama_lib.cluster.output import Output
from llama_lib.cluster.remote import Host, open_hosts
from llama_lib.cluster.restarts import Supervisor, Wish
from llama_lib.cluster.signals import Interrupted, Signals
from llama_lib.cluster.writer import Writer
from llama_lib.errors import UserError
from llama_lib.private import masked

ROOT = Path(__file__).resolve().parents[2]
_LOCAL_NAMES = ("localhost", "::1", "0.0.0.0", "::")
_SWITCHES = ("--print_only", "--help", "-h")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"launch: {message}; see python -m llama_lib launch --help.")


def _count(text: str) -> int:
    """A number from 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1")
    return int(text)


def _count_or_zero(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port from 1 to 65535")
    return int(text)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m llama_lib launch",
        usage="python -m llama_lib launch [options] SCRIPT ARGUMENTS...",
        description="Runs a training script on this host, or on all hosts of a file over ssh. "
        "Options of launch stand before the script, the script's behind it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hostfile", metavar="FILE", help="one host name or address per line [this host alone]")
    add(
        "--nproc_per_node",
        type=_count,
        metavar="N",
        help="processes per host [its GPUs; 1 on this host alone if it has none]",
    )
    add(
        "--num_nodes",
        type=_count,
        metavar="N",
        help="hosts that work; the others of the file are spares [all]",
    )
    add(
        "--min_nodes",
        type=_count,
        metavar="N",
        help="a restart goes on with fewer hosts, but not with fewer than this [1]",
    )
    add(
        "--restarts",
        type=_count_or_zero,
        default=0,
        metavar="N",
        help="times to start again after a failure or a lost host, with --load auto [0]",
    )
    add("--master_addr", metavar="ADDRESS", help="where the processes meet [the first host]")
    add(
        "--master_port",
        type=_port,
        metavar="PORT",
        help=f"the port there [{ports.DEFAULT_PORT}; a free one without a host file]",
    )
    add("--ssh_port", type=_port, metavar="PORT", help="of all hosts [~/.ssh/config, else 22]")
    add(
        "--pass",
        dest="passed",
        metavar="NAME,...",
        help="further variables that the hosts are given; their values are not shown",
    )
    add("--print_only", action="store_true", help="print the torchrun line of each host and end")
    return parser


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words and, untouched, the script with its arguments."""
    own: list[str] = []
    rest = list(argv)
    while rest:
        word = rest[0]
        if word == "--":
            return own, rest[1:]
        if not word.startswith("-"):
            break
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("-", "_").replace("__", "--", 1)  # --num-nodes, as others spell it
        own.append(name + equals + value)
        rest = rest[1:]
        if not equals and name not in _SWITCHES and rest:
            own.append(rest.pop(0))
    return own, rest


def main(argv: Sequence[str]) -> int:
    own, command = split(argv)
    arguments = _parser().parse_args(own)
    passed = _check(arguments, command)
    hosts = _hosts(arguments)
    wish = _wish(arguments, hosts, command, passed)
    if arguments.print_only:
        nproc = wish.nproc
        if nproc is None:
            raise UserError("--print_only with --hostfile needs --nproc_per_node: got none.")
        names = [host.name for host in wish.hosts[: wish.num_nodes]]
        print("\n".join(torchrun_lines(names, nproc, wish, arguments.hostfile is None)))
        return 0
    writer = Writer()
    output = Output(writer.write)
    if passed.held and not all(host.is_local for host in hosts):
        output.say(
            f"not passed on to the other hosts: {', '.join(passed.held)} (--pass NAME,... does)"
        )

    def announce(names: list[str], plan: Plan) -> None:
        output.say("the same by hand, once on each host:")
        for line in torchrun_lines(names, plan.nproc, wish, arguments.hostfile is None):
            output.say(f"  {line}")

    with Signals() as signals:
        try:
            return Supervisor(wish, output, signals, announce).run()
        finally:
            try:
                writer.flush()
            except Interrupted as interrupted:
                # The interpreter's own end would wait for a reader too.
                os._exit(interrupted.exit_code)


def _check(arguments: argparse.Namespace, command: Sequence[str]) -> Passed:
    """What is wrong before any host is asked, all in one message."""
    problems = []
    if task := _slurm_task(os.environ):
        problems.append(task)
    if not command:
        problems.append(
            "launch: got no script; expected one behind the options, as in "
            "python -m llama_lib launch --nproc_per_node 8 pretrain.py -c 7b"
        )
    else:
        problems += _script_problems(command[0])
    if arguments.hostfile is None:
        for name in ("num_nodes", "min_nodes"):
            if (getattr(arguments, name) or 1) > 1:
                problems.append(f"--{name} needs the hosts' names: give --hostfile.")
    passed = Passed({}, [])
    try:
        passed = passed_on(os.environ, names_of(arguments.passed))
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    return passed


def _script_problems(script: str) -> list[str]:
    """Why the first word that is no option cannot be run; empty if it can."""
    rule = "the first word that is no option of launch is the script."
    if not script.endswith(".py"):
        # The ranks would give whatever it is to Python.
        return [f"launch: got {script!r}, expected a Python script, named *.py; {rule}"]
    if os.path.isfile(script):
        return []
    own = ROOT / Path(script).name
    known = f" (there is {own})" if own.is_file() else ""
    return [f"launch: {script!r} is no file in {os.getcwd()}{known}; {rule}"]


def _slurm_task(environ: Mapping[str, str]) -> str:
    """Why a start by srun is refused: every task would start the whole job."""
    task, tasks = environ.get("SLURM_PROCID", "0"), environ.get("SLURM_STEP_NUM_TASKS", "1")
    if task == "0" and tasks in ("", "1"):
        return ""
    return (
        f"launch: started by every task of srun (this is task {task} of {tasks}), but it starts "
        "the processes of all hosts itself; run it once, without srun, or one torchrun per host as "
        "scripts/slurm/train.sbatch does."
    )


def _hosts(arguments: argparse.Namespace) -> list[Host]:
    """The hosts of the file, or this one.

    Raises:
        UserError: they do not fit the other options.
    """
    if arguments.hostfile is None:
        return [Host("this host", True)]
    names = read_hostfile(arguments.hostfile)
    wanted = arguments.num_nodes or len(names)
    problems = []
    if wanted > len(names):
        problems.append(
            f"--num_nodes {wanted} is more than the {len(names)} host(s) of {arguments.hostfile}."
        )
    if (arguments.min_nodes or 1) > wanted:
        problems.append(
            f"--min_nodes {arguments.min_nodes} is more than the {wanted} host(s) that work."
        )
    local = [name for name in names if name in _LOCAL_NAMES or name.startswith("127.")]
    if local and len(names) > 1:
        problems.append(
            f"{arguments.hostfile}: {', '.join(local)} means another host on each host; write the "
            "name by which the others know it."
        )
    if problems:
        raise UserError(problems)
    return open_hosts(names, arguments.ssh_port)


def _wish(
    arguments: argparse.Namespace, hosts: list[Host], command: list[str], passed: Passed
) -> Wish:
    alone = arguments.hostfile is None
    free = alone and not arguments.print_only
    plan = Plan(
        argv=command,
        workdir=working_folder(),
        environment=passed.variables,
        nproc=0,
        master_addr="",
        master_port=arguments.master_port or (ports.free_port() if free else ports.DEFAULT_PORT),
        run_id="",
        terminals=(_terminal(sys.stdout.isatty()), _terminal(sys.stderr.isatty())),
    )
    return Wish(
        hosts=hosts,
        num_nodes=arguments.num_nodes or len(hosts),
        min_nodes=arguments.min_nodes or 1,
        restarts=arguments.restarts,
        nproc=arguments.nproc_per_node or (max(1, count_gpus()) if alone else None),
        master_addr=arguments.master_addr,
        plan=plan,
    )


def working_folder() -> str:
    """The folder of the shell by the name it was entered by: other hosts may know no other."""
    entered, real = os.environ.get("PWD", ""), os.getcwd()
    return entered if os.path.isabs(entered) and os.path.realpath(entered) == real else real


def _terminal(is_one: bool) -> dict[str, int | str] | None:
    if not is_one:
        return None
    size = shutil.get_terminal_size()
    name = os.environ.get("TERM", "dumb")
    return {"columns": size.columns, "lines": size.lines, "name": name}


def torchrun_lines(names: Sequence[str], nproc: int, wish: Wish, alone: bool) -> list[str]:
    """What starts the same job by hand: a line per host, ready to paste on it."""
    torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
    start = f"cd {shlex.quote(wish.plan.workdir)} && {shlex.quote(torchrun)}"
    script = shlex.join(masked(word) for word in wish.plan.argv)
    if alone:
        return [f"{start} --standalone --nproc_per_node {nproc} {script}"]
    lines = []
    for node_rank, name in enumerate(names):
        words = [
            *("--nnodes", str(len(names)), "--node_rank", str(node_rank)),
            *("--nproc_per_node", str(nproc), "--master_addr", wish.master_addr or names[0]),
            *("--master_port", str(wish.plan.master_port)),
        ]
        lines.append(f"{name}: {start} {shlex.join(words)} {script}")
    return lines

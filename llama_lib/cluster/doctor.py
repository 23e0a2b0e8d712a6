"""`python -m llama_lib doctor`: says before a run what would go wrong on which host, and the mend.

Invariant: every cell of the table that is not `ok` or `-` has a line below it with the host, what
is wrong and what mends it; the exit code is 0 only if there is none.
"""

import argparse
import os
import re
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_lib.cluster import ports
from llama_lib.cluster.environment import passed_on
from llama_lib.cluster.examination import Questions, examine
from llama_lib.cluster.hostfile import read_hostfile
from llama_lib.cluster.judgement import CHECKS, not_made, problems_of
from llama_lib.cluster.problem import Job, Problem
from llama_lib.cluster.remote import Host, open_hosts
from llama_lib.cluster.speed_check import (
    DEADLINE_SECONDS,
    Speeds,
    measure,
    slow_ones,
    speed_lines,
)
from llama_lib.config import Options
from llama_lib.flops import num_parameters
from llama_lib.models import model_shape

ROOT = Path(__file__).resolve().parents[2]
# With one of these a host would spoil the measurement of all, or cannot take part.
_UNFIT = {"ssh", "code", "python", "packages", "gpus", "network"}
# A weight in bfloat16 with its fp32 master and two moments.
_BYTES_PER_PARAMETER = 14


def main(argv: list[str]) -> int:
    """Check the hosts of a file, or this one; 0: nothing is wrong, 1: something is.

    Raises:
        UserError: the host file or an option is wrong.
    """
    arguments = _parse(argv)
    names = read_hostfile(arguments.hostfile) if arguments.hostfile else [socket.gethostname()]
    if arguments.hostfile:
        hosts = open_hosts(names, arguments.ssh_port)
    else:
        hosts = [Host(names[0], is_local=True)]
    needed = _checkpoint_bytes(arguments.config) if arguments.config else None
    environment = passed_on(os.environ).variables
    questions = Questions(
        folder=os.getcwd(),
        root=str(ROOT),
        packages=_packages(),
        save_dir=os.path.abspath(os.path.expanduser(arguments.save_dir)),
        cache_dir=arguments.cache_dir,
        temporary=environment.get("TMPDIR"),
        port=arguments.master_port,
    )
    print(f"checking {_counted(len(hosts), 'host')} ...", flush=True)
    here, examined = examine(hosts, questions)
    job = Job(here, examined, questions, arguments.nproc_per_node, needed, environment)
    problems = [problem for each in examined for problem in problems_of(each, job)]
    absent = {each.host.name: not_made(each, job) for each in examined}

    notes: list[str] = []
    if not arguments.no_speed:
        problems += _measure(job, problems, absent, notes, alone=not arguments.hostfile)
    checks = [*CHECKS, *(["speed"] if not arguments.no_speed else [])]
    print("\n".join(table(names, checks, problems, absent)))
    print("\n".join([*_facts(job), *notes]))
    lines = problem_lines(problems)
    if lines:
        print("\n".join(["", *lines]))
    print("\n" + _next(arguments, job, argv, len(lines)))
    return 1 if lines else 0


def table(
    names: Sequence[str],
    checks: Sequence[str],
    problems: Sequence[Problem],
    absent: dict[str, set[str]],
) -> list[str]:
    """A row per host: ok, the first fault of that check, or - where it was not made."""
    rows = [["host", *checks]]
    for name in names:
        cells = []
        for check in checks:
            faults = [each for each in problems if (each.host, each.check) == (name, check)]
            if faults:
                more = f" +{len(faults) - 1}" if len(faults) > 1 else ""
                cells.append(faults[0].short + more)
            else:
                cells.append("-" if check in absent[name] else "ok")
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """One line per fault; hosts with the same fault share one."""
    hosts: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        hosts.setdefault((problem.what, problem.mend), []).append(problem.host)
    return [
        f"{', '.join(names)}: {what}; "
        f"{mend.replace('{host}', names[0] if len(names) == 1 else 'HOST')}."
        for (what, mend), names in hosts.items()
    ]


def _measure(
    job: Job, problems: list[Problem], absent: dict[str, set[str]], notes: list[str], alone: bool
) -> list[Problem]:
    """Measure the hosts that are fit for it; adds to `absent` and `notes`."""
    unfit = {problem.host for problem in problems if problem.check in _UNFIT}
    fit = [each for each in job.hosts if each.host.name not in unfit]
    if unfit:
        for name in unfit:
            absent[name].add("speed")
        left_out = [each.host.name for each in job.hosts if each.host.name in unfit]
        notes.append(f"speed: not measured with {', '.join(left_out)}; mend that first")
    if not fit:
        return []
    on_gpu = bool(job.usual_gpus())
    taken = any(problem.check == "port" for problem in problems)
    port = job.questions.port + taken
    found: list[Problem] = []
    at_most = DEADLINE_SECONDS * (2 if alone and on_gpu else 1)
    what = "importing ColossalAI and measuring" if alone else "measuring"
    print(
        f"{what} the speed of {_counted(len(fit), 'host')}, at most {at_most} s (--no-speed leaves "
        "it out) ...",
        flush=True,
    )

    def measured(per_host: int, with_gpus: bool, variables: dict[str, str]) -> Speeds:
        hosts = [each.host for each in fit]
        whole = alone and not with_gpus
        return measure(hosts, per_host, port, str(ROOT), variables, with_gpus, whole)

    if alone:
        # Two processes without GPUs: ColossalAI, the host layer and gloo, wherever this is.
        hidden = {**job.environment, "CUDA_VISIBLE_DEVICES": ""}
        speeds = measured(2, False, hidden)
        found += slow_ones(speeds, on_gpu=False)
        if not speeds.failures:
            notes.append("ColossalAI with the host layer: imported; two processes met over gloo")
            notes += [] if on_gpu else speed_lines(speeds, on_gpu=False)
    if on_gpu or not alone:
        speeds = measured(job.per_host(), on_gpu, dict(job.environment))
        found += slow_ones(speeds, on_gpu)
        notes += speed_lines(speeds, on_gpu)
    return found


def _facts(job: Job) -> list[str]:
    """What the hosts are, for a look at the end: one line per different answer."""
    lines: dict[str, list[str]] = {}
    for each in job.hosts:
        if not each.facts:
            continue
        gpus = each.facts.get("gpus") or []
        kinds = " and ".join(dict.fromkeys(gpu["name"] for gpu in gpus))
        what = f"{len(gpus)} x {kinds}" if gpus else "no GPU"
        towards = each.facts.get("towards") or {}
        way = f", {towards['interface']} leads to the first" if towards.get("interface") else ""
        alone = len(job.hosts) == 1 or each is job.hosts[0]
        line = f"{what}, {each.facts.get('cores')} cores{'' if alone else way}"
        lines.setdefault(line, []).append(each.host.name)
    return ["", *(f"{', '.join(names)}: {line}" for line, names in lines.items())]


def _next(arguments: argparse.Namespace, job: Job, argv: list[str], problems: int) -> str:
    if problems:
        again = shlex.join(["python", "-m", "llama_lib", "doctor", *argv])
        return f"{_counted(problems, 'problem')}; when mended: {again}"
    words = ["python", "-m", "llama_lib", "launch"]
    if arguments.hostfile:
        words += ["--hostfile", arguments.hostfile]
    words += ["--nproc_per_node", str(job.per_host())]
    if arguments.master_port != ports.DEFAULT_PORT:
        words += ["--master_port", str(arguments.master_port)]
    if arguments.ssh_port:
        words += ["--ssh_port", str(arguments.ssh_port)]
    script = ["pretrain.py", *(["-c", arguments.config] if arguments.config else [])]
    script += ["-o", arguments.save_dir]
    return f"no problem found; next: {shlex.join([*words, *script])} ..."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _checkpoint_bytes(config: str) -> int:
    return num_parameters(model_shape(config)) * _BYTES_PER_PARAMETER


def _packages() -> list[str]:
    """What is installed with this project, as its requirements say."""
    names: list[str] = []
    for file in ("requirements.txt", "requirements-colossalai.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if found := re.match(r"([A-Za-z0-9._-]+)==", line):
                names.append(found[1])
    return names


def _number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {least} to {most}")
        return int(text)

    return read


def _parse(argv: list[str]) -> argparse.Namespace:
    defaults: Any = Options()
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib doctor",
        description="Checks this machine, or the hosts of a host file, before a run.",
        allow_abbrev=False,
    )
    add, port = parser.add_argument, _number(1, 65535)
    add("--hostfile", metavar="FILE", help="one host name or address per line")
    add(
        "--nproc_per_node",
        type=_number(1, 1024),
        metavar="N",
        help="processes per host (its GPUs, or 1)",
    )
    add("--save_dir", "-o", default=defaults.checkpoint.save_dir, help="[%(default)s]")
    add("--cache_dir", default=defaults.data.cache_dir, help="[%(default)s]")
    add("--config", "-c", metavar="MODEL", help="model, for the room that its checkpoint needs")
    add(
        "--master_port",
        type=port,
        default=ports.DEFAULT_PORT,
        help="port of the first host [%(default)s]",
    )
    add("--ssh_port", type=port, help="where ~/.ssh/config does not say it [22]")
    add("--no-speed", action="store_true", help="leave out the measurement, which takes longest")
    return parser.parse_args(argv)

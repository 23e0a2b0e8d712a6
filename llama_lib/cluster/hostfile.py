"""Reads a host file: one host name or address per line, as ColossalAI's launcher wants it.

Invariant: a file that is accepted here means the same hosts to ColossalAI's launcher; all faulty
lines are found in one go, each with what to write instead.
"""

import codecs
import ipaddress
import re
from pathlib import Path

from llama_lib.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
# What editors of other systems write first.
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_EXPECTED = "expected one host name or address per line and nothing else"


def read_hostfile(path: str | Path) -> list[str]:
    """The hosts of a file in its order.

    Raises:
        UserError: all that is wrong with the file, a line for each faulty line.
    """
    lines = _text(Path(path)).splitlines()
    problems: list[str] = []
    first_seen: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(lines, start=1):
        written = line.strip()
        if not written:
            continue
        place = f"{path} line {number}: got {written!r}"
        if mend := _mend(written):
            problems.append(f"{place}, {_EXPECTED}; {mend}.")
            continue
        earlier = first_seen.setdefault(written.lower(), number)
        if earlier != number:
            problems.append(f"{place}, which line {earlier} names already; delete one of them.")
            continue
        hosts.append(written)
    if problems:
        raise UserError(problems)
    if not hosts:
        raise UserError(f"{path} names no host; write one host name or address per line.")
    return hosts


def _text(path: Path) -> str:
    mend = "give --hostfile a text file with one host name or address per line"
    if not path.exists():
        raise UserError(f"host file {path}: no such file; {mend}.")
    if not path.is_file() and not path.is_fifo():
        raise UserError(f"host file {path}: not a file; {mend}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"host file {path}: {error.strerror}; {mend}.") from None
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            raise UserError(
                f"host file {path}: begins with the byte order mark of {encoding}, which "
                "would be a part of the first name; save it as UTF-8 without a byte order mark."
            )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"host file {path}: not text; {mend}.") from None
    if "\0" in text:
        raise UserError(f"host file {path}: not text; {mend}.")
    return text


def is_address(text: str) -> bool:
    """Whether this is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _mend(written: str) -> str | None:
    """What to write instead of a line; None if the line is a host."""
    if is_address(written):
        return None
    if written.startswith("#"):
        return "delete it: ColossalAI's launcher takes a comment for a host"
    if slots := re.fullmatch(r"(\S+)\s+(?:max_)?slots\s*=\s*(\d+).*", written):
        return (
            f"write {slots[1]} and pass --nproc_per_node {slots[2]} (to a benchmark script: "
            f"NPROC={slots[2]})"
        )
    if "#" in written and (name := written.split("#")[0].strip()) and _mend(name) is None:
        return f"write {name}: ColossalAI's launcher takes a comment for a part of the name"
    if "[" in written and "]" in written:
        return "write each host on a line of its own (Slurm: scontrol show hostnames lists them)"
    if "," in written:
        return "write each host on a line of its own"
    if user := re.fullmatch(r"([\w.-]+)@([\w.:-]+)", written):
        return f"write {user[2].split(':')[0]}; the user goes into ~/.ssh/config, as User {user[1]}"
    if port := re.fullmatch(r"([\w.-]+):(\d+)", written):
        return f"write {port[1]}; an ssh port is given by --ssh_port or in ~/.ssh/config"
    if len(written.split()) > 1 and _mend(written.split()[0]) is None:
        return (
            f"write {written.split()[0]}; processes per host are given by --nproc_per_node (to a "
            "benchmark script: NPROC=)"
        )
    if re.fullmatch(r"[\d.]+", written):
        return "this is no IPv4 address; correct it"
    if not _NAME.fullmatch(written) or ".." in written:
        return "a host name has letters, digits, '.', '-' and '_' only; correct it"
    return None

"""What a run keeps to itself: no secret in what it shows or stores, no file in everyone's hands.

Invariant: a password in a URL, and the value of a variable whose name says that it is secret, leave
the process through no stream and no file of this project.
"""

import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO, cast
from urllib.parse import quote

MASK = "***"

# HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY; not TOKENIZERS_PARALLELISM or HF_TOKEN_PATH.
SECRET_NAME = re.compile(
    r"(^|_|API|ACCESS)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS)$", re.IGNORECASE
)
# Of shorter values every text is full. Chosen.
SHORTEST_SECRET = 8
# A number, or a word as it stands in every message: hiding it would hide what is no secret.
_ORDINARY = re.compile(r"[0-9.]+|[a-z]+")

# One slash: what becomes of an address that is taken for a path.
_URL_PASSWORD = re.compile(r"(:/{1,2}[^\s/:@'\"]*):[^\s/'\"]+@")
# A long name without a password is a token itself, as in https://ghp_...@github.com.
_URL_TOKEN = re.compile(r"://[^\s/:@'\"*]{16,}@")
# Signed addresses, as stores of objects give them.
_URL_QUERY = re.compile(
    r"([?&][^\s=&?'\"]*(?:token|key|secret|password|signature|sig|credential)[^\s=&?'\"]*=)"
    r"[^\s&'\"]+",
    re.IGNORECASE,
)


def secrets(environ: Mapping[str, str] | None = None) -> list[str]:
    """The values to hide, in every spelling that a text may have, longest first."""
    found = set()
    for name, value in (os.environ if environ is None else environ).items():
        value = value.strip()
        if SECRET_NAME.search(name) is None or len(value) < SHORTEST_SECRET:
            continue
        # A variable may name the file of a secret, which is no secret and part of messages.
        if _ORDINARY.fullmatch(value) or os.path.exists(value):
            continue
        found |= {value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1]}
    return sorted(found, key=lambda value: (-len(value), value))


def masked(text: str) -> str:
    """`text` with MASK in the place of every secret."""
    for secret in secrets():
        if secret in text:
            text = text.replace(secret, MASK)
    if ":/" in text:
        text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
        text = _URL_TOKEN.sub(f"://{MASK}@", text)
        text = _URL_QUERY.sub(rf"\1{MASK}", text)
    return text


def masked_values(value: Any) -> Any:
    """The same for every text in nested dicts and lists."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(each) for each in value]
    return value


class LogFormatter(logging.Formatter):
    """Of a log file: the formatted record, a traceback included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _Stream:
    """A text stream that masks what is written to it; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(masked(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> None:
    """Make this process careful: its output is masked, and nothing it creates is open to everyone.

    For the beginning of a program, before anything that keeps a stream of its own. An error of a
    foreign package may quote any address or header, so this is done where all of them come out.
    """
    os.umask(os.umask(0o022) | stat.S_IWOTH)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Stream):
            setattr(sys, name, cast(TextIO, _Stream(stream)))


def allow_readers(path: Path) -> None:
    """Give a file the mode that the umask gives to files.

    safetensors creates one that nobody but its owner can read, and a model is often for others.
    """
    # os.umask tells the mask by changing it, which other threads would notice.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            path.chmod(0o666 & ~int(line.split()[1], 8))


def open_folders(folders: Mapping[str, str | Path]) -> list[str]:
    """A line for every folder (by its flag) that everyone may write to.

    Whoever writes there can put a checkpoint in the place of another, or end the run. Where the
    sticky bit is set, as in /tmp, nobody can replace what is others'.
    """
    lines = []
    for flag, folder in folders.items():
        path = Path(folder).expanduser()
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            lines.append(
                f"warning: {flag} {folder} can be written to by every user of this machine, who "
                f"can replace what a run trusts: chmod o-w {path}"
            )
    return lines

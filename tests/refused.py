"""Running a script in this process, for what users can get wrong: refused at once, or accepted."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from llama_lib.cli import run_command
from llama_lib.watch.roll_call import alone


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ended]
Attempt = Callable[..., str]


def command_of(
    main: Callable[..., int],
    right: Mapping[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """`command(*argv, processes=1)`: a script in this process, with the value in `right` for every
    flag that `argv` leaves out; a flag with the value "" is left out altogether."""
    # A mistake that is not found fails its test at once, not after a training run.
    monkeypatch.setattr("llama_lib.run.train", lambda *_: 0)
    # Of several processes only this one is there.
    monkeypatch.setattr("llama_lib.watch.watchdog.call_roll", lambda seconds: alone())

    def command(*argv: str, processes: int = 1) -> Ended:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        absent = {flag for flag, value in pairwise(argv) if value == ""}
        others = [word for pair in right.items() if pair[0] not in argv for word in pair]
        given = [word for word in argv if word and word not in absent]
        code = run_command(main, [*others, *given])
        return Ended(code, *capsys.readouterr())

    return command


def attempt_of(command: Command, folder: Path) -> Attempt:
    """`attempt(*argv, processes=1)`: the message of a command that has to be refused, and to leave
    `folder`, in which it runs, as it was."""

    def attempt(*argv: str, processes: int = 1) -> str:
        before = everything_in(folder)
        ended = command(*argv, processes=processes)
        assert (ended.code, ended.out) == (2, ""), (ended.out, ended.err)
        assert "Traceback" not in ended.err
        assert everything_in(folder) == before
        assert not list(folder.glob("cache/prepared/*"))
        return ended.err

    return attempt


def everything_in(folder: Path) -> list[str]:
    """All paths and sizes but those of the cache, where locks may stay."""
    return sorted(
        f"{path.relative_to(folder)} {path.stat().st_size if path.is_file() else ''}"
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "cache"
    )


def missing_from(message: str, *parts: str) -> list[str]:
    absent = [part for part in parts if part not in message]
    assert not absent, message
    return absent

"""Preparing is killed at several moments in a real process, and goes on where it was."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama_lib.data import tokenised
from llama_lib.data.parts import parts_of
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.tokenised import tokens_path
from llama_lib.data.work_folder import remove_others
from llama_lib.errors import RunError, UserError

# Small parts, so that there are many; the first argument is how long to wait for each, in both
# stages, so that there is time to kill.
PREPARE = """
import sys, time
from llama_lib.data import build, tokenised
from llama_lib.data.prepare import main
tokenised.PART_BYTES = 10_000
pause = float(sys.argv[1])
class SlowPool(tokenised.WorkerPool):
    def map(self, items, *arguments, **more):
        def slowly():
            for item in items:
                time.sleep(pause)
                yield item
        return super().map(slowly(), *arguments, **more)
tokenised.WorkerPool = SlowPool
assemble = build.assemble
def slowly(*arguments, on_part, **more):
    def wait(part):
        time.sleep(pause)
        on_part(part)
    return assemble(*arguments, on_part=wait, **more)
build.assemble = slowly
rename = build.publish
def rename_later(*arguments):
    time.sleep(20 * pause)
    rename(*arguments)
build.publish = rename_later
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    paths = []
    for name in "ab":
        path = folder / f"{name}.jsonl"
        lines = [
            json.dumps({"text": f"the cat {name} sat on mat {n % 2500} " * 5}) for n in range(1500)
        ]
        path.write_text("\n".join([*lines, ""]))
        paths.append(path)
    return paths


class Case:
    def __init__(self, folder: Path, data: list[Path], tokenizer: Path, workers: int) -> None:
        self.out, self.folder = folder / "out", folder
        self.arguments = ["-d", *map(str, data), "--tokenizer", str(tokenizer), "--dedup"]
        self.arguments += ["--cache_dir", str(folder / "cache"), "--output", str(self.out)]
        self.arguments += ["--eval_ratio", "0.1", "--workers", str(workers)]

    def start(self, pause: float = 0.0) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(pause), *self.arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> str:
        process = self.start()
        _, messages = process.communicate(timeout=120)
        assert process.returncode == 0, messages
        return messages

    @property
    def work(self) -> Path:
        (folder,) = self.folder.glob("out.work-*")
        return folder

    def parts(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.work.glob("part-*.json")}

    def kill_when(self, there: Callable[[], bool]) -> None:
        self.started = time.time_ns()
        process = self.start(pause=0.03)
        deadline = time.monotonic() + 60
        while not there() and time.monotonic() < deadline:
            assert process.poll() is None, "was killed too late to show anything"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert there() and not self.out.exists()

    def has_parts(self, count: int) -> bool:
        return len(list(self.folder.glob("out.work-*/part-*.json"))) >= count

    def has_result(self, name: str) -> bool:
        """Whether the process started last has written it; an earlier one may have, too."""
        found = self.folder.glob(f"out.work-*/result/{name}")
        return any(path.stat().st_mtime_ns > self.started for path in found)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(
    data: list[Path], tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The result without interruption, and without parts."""
    folder = tmp_path_factory.mktemp("expected")
    request = PrepareRequest(
        [str(path) for path in data],
        tokenizer=str(tokenizer_path),
        cache_dir=folder,
        output=folder / "out",
        eval_ratio=0.1,
        workers=1,
        dedup=True,
    )
    dataset = prepare(request)
    assert dataset.held_out is not None and len(dataset.sources) == 2
    return files_of(folder / "out")


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_killed_preparer_is_continued(
    data, tokenizer_path, tmp_path, expected, workers: int
) -> None:
    case = Case(tmp_path, data, tokenizer_path, workers)
    case.kill_when(lambda: case.has_parts(5))
    before = case.parts()
    number = sum(len(parts_of(path, 10_000)) for path in data)
    assert 5 <= len(before) < number
    # Again in the second stage, when the first half of the result is written.
    case.kill_when(lambda: case.has_result("b.bin"))
    between = case.parts()
    assert len(between) == number
    assert before.items() <= between.items(), "a part was tokenised again"
    messages = case.finish()
    assert "tokenising: 100% are there already" in messages
    assert files_of(case.out) == expected
    assert not list(tmp_path.glob("out.*")), "something is left over"


@pytest.mark.full
@pytest.mark.parametrize("moment", [1, 12, 30, "result/a.bin", "result/manifest.json"])
def test_a_kill_at_any_moment_does_no_harm(
    data, tokenizer_path, tmp_path, expected, moment: int | str
) -> None:
    case = Case(tmp_path, data, tokenizer_path, workers=2)
    if isinstance(moment, int):
        case.kill_when(lambda: case.has_parts(moment))
    else:
        case.kill_when(lambda: case.has_result(moment.removeprefix("result/")))
    before = case.parts()
    case.kill_when(lambda: case.has_result("a.bin"))
    assert before.items() <= case.parts().items()
    case.finish()
    assert files_of(case.out) == expected


def test_damaged_parts_are_made_again(data, tokenizer_path, tmp_path, expected) -> None:
    case = Case(tmp_path, data, tokenizer_path, workers=1)
    case.kill_when(lambda: case.has_result("a.bin"))
    work, before = case.work, case.parts()
    # What a loss of power leaves: facts that are there, and tokens that never reached the disk.
    tokens = tokens_path(work, 3)
    tokens.write_bytes(bytes(tokens.stat().st_size))
    (work / "part-000004.documents").unlink()
    (work / "part-000005.json").write_text('{"number":')
    (work / "part-000006.bin.1.tmp").write_bytes(b"left by a process of the killed run")
    case.kill_when(lambda: case.has_result("a.bin"))
    again = {name for name, changed in case.parts().items() if before[name] != changed}
    assert again == {f"part-00000{number}.json" for number in (3, 4, 5)}
    assert not list(work.glob("*.tmp"))
    case.finish()
    assert files_of(case.out) == expected


def test_other_text_starts_over(data, tokenizer_path, tmp_path) -> None:
    paths = [tmp_path / path.name for path in data]
    for path, original in zip(paths, data, strict=True):
        path.write_bytes(original.read_bytes())
    case = Case(tmp_path, paths, tokenizer_path, workers=1)
    case.kill_when(lambda: case.has_parts(5))
    stale = case.work
    with paths[1].open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    messages = case.finish()
    assert "are there already" not in messages
    assert not stale.exists() and case.out.is_dir()


def test_a_container_with_another_name_continues_and_other_folders_stay(
    data, tokenizer_path, tmp_path, expected
) -> None:
    case = Case(tmp_path, data, tokenizer_path, workers=1)
    case.kill_when(lambda: case.has_parts(5))
    assert socket.gethostname() not in case.work.name
    assert (tmp_path / "out.lock").exists(), "left by the killed process, and held by nobody"
    foreign = [tmp_path / "out.work-final", tmp_path / "out2.work-01234567"]
    stale = tmp_path / "out.work-01234567"
    for folder in (*foreign, stale):
        folder.mkdir()
    assert "are there already" in case.finish()
    assert files_of(case.out) == expected
    assert all(folder.is_dir() for folder in foreign) and not stale.exists()
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.work-final"]


def test_a_pattern_in_the_name_of_the_output_matches_no_other_work(tmp_path: Path) -> None:
    others = [tmp_path / "a.work-00000000", tmp_path / "b.work-00000000"]
    own = tmp_path / "[ab].work-00000000"
    for folder in (*others, own):
        folder.mkdir()
    remove_others(tmp_path / "[ab]", tmp_path / "[ab].work-11111111")
    assert all(folder.is_dir() for folder in others) and not own.exists()


def test_trouble_that_is_not_of_the_text_keeps_the_parts(
    data, tokenizer_path, tmp_path, expected, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(tokenised, "PART_BYTES", 10_000)
    request = PrepareRequest(
        [str(path) for path in data],
        tokenizer=str(tokenizer_path),
        cache_dir=tmp_path / "c",
        output=tmp_path / "out",
        eval_ratio=0.1,
        workers=1,
        dedup=True,
    )
    true = tokenised._write_part
    for number, error in ((4, RunError("cannot be read")), (8, OSError(errno.EIO, "I/O error"))):

        def failing(encoder, folder, part, *more, number=number, error=error):  # type: ignore[no-untyped-def]
            if part == number:
                raise error
            return true(encoder, folder, part, *more)

        with monkeypatch.context() as patch:
            patch.setattr(tokenised, "_write_part", failing)
            with pytest.raises(RunError, match=r"cannot be read|I/O error.*is kept"):
                prepare(request)
        (work,) = tmp_path.glob("out.work-*")
        assert len(list(work.glob("part-*.json"))) == number
    # A refusal of the options, when all is tokenised: other options go on from there.
    with pytest.raises(UserError, match=r"shorter than --min_length(.|\n)*is kept in"):
        prepare(replace(request, min_length=100_000))
    capsys.readouterr()
    prepare(request)
    assert "tokenising: 100% are there already" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == expected
    assert not list(tmp_path.glob("out.*"))


def test_nobody_waits_for_the_one_very_long_file(
    data, tokenizer_path, tmp_path, monkeypatch
) -> None:
    """However many parts come behind it: all of them may be begun before it is done."""
    monkeypatch.setattr(tokenised, "PART_BYTES", 2000)
    numbers: list[tuple[int, int]] = []

    class SpiedPool(tokenised.WorkerPool):  # type: ignore[type-arg, misc]
        def map(self, items, on_report, ahead):  # type: ignore[no-untyped-def]
            numbers.append((len(items), ahead))
            return super().map(items, on_report, ahead)

    monkeypatch.setattr(tokenised, "WorkerPool", SpiedPool)
    prepare(
        PrepareRequest(
            [str(path) for path in data], str(tokenizer_path), cache_dir=tmp_path, workers=2
        )
    )
    ((parts, ahead),) = numbers
    assert parts > 2 * 64 and ahead >= parts


def test_bad_line_in_any_part_is_named_and_leaves_nothing(
    data, tokenizer_path, tmp_path, monkeypatch
) -> None:
    path = tmp_path / "bad.jsonl"
    lines = data[0].read_text().splitlines()
    lines[1300] = lines[1200] = '{"text": 7}'
    path.write_text("\n".join([*lines, ""]))
    monkeypatch.setattr(tokenised, "PART_BYTES", 10_000)
    for workers in (1, 2, 3):
        request = PrepareRequest(
            [str(path)], tokenizer=str(tokenizer_path), cache_dir=tmp_path / "c", workers=workers
        )
        with pytest.raises(UserError, match=r"bad\.jsonl line 1201: .*--skip_bad_lines"):
            prepare(request)
        assert not list((tmp_path / "c" / "prepared").iterdir())

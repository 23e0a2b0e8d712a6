"""Preparing is killed at several moments in a real process, and goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_lib.data import tokenised
from llama_lib.data.parts import parts_of
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.tokenised import tokens_path
from llama_lib.errors import UserError

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
rename = build._rename
def rename_later(*arguments):
    time.sleep(20 * pause)
    rename(*arguments)
build._rename = rename_later
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

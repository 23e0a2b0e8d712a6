"""The processes and the thread behind a stream: they work ahead, and end with the trainer."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llama_lib.data.loader import BatchLoader
from llama_lib.errors import RunError, UserError
from tests.data.streams import first_boundary, ids, read, stream, texts, tokenised, write

# Reads a few rows with two workers, tells their ids, and goes on reading when a line comes in.
READER = """
import os, signal, sys
from pathlib import Path
from tests.data.streams import ids, stream
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
rows = stream([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), workers=2, window=1).rows()
first = ids(rows, range(5)).sum()
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    print(ids(rows, range(5 + number * 400, 405 + number * 400)).sum(), len(got), flush=True)
rows.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", texts("a", 2000))


def start(path: Path, tokenizer: Path, cache_dir: Path) -> "subprocess.Popen[str]":
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path), str(tokenizer), str(cache_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while not all("gigatoken" in loaded(worker) for worker in children(reader.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return reader


def loaded(process: int) -> str:
    """The libraries of a process."""
    return Path(f"/proc/{process}/maps").read_text()


def children(parent: int) -> list[int]:
    """Processes started by any thread of a process."""
    threads = Path(f"/proc/{parent}/task").iterdir()
    return sorted(
        int(child) for thread in threads for child in (thread / "children").read_text().split()
    )


def wait_until_gone(processes: list[int], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(process) for process in processes):
        assert time.monotonic() < deadline, f"still there: {processes}"
        time.sleep(0.1)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_workers_die_with_a_killed_trainer_and_import_no_torch(
    path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    reader = start(path, tokenizer_path, cache_dir)
    workers = children(reader.pid)
    assert len(workers) == 2
    for worker in workers:
        assert "libtorch" not in loaded(worker)
    reader.kill()
    reader.wait()
    wait_until_gone(workers)
    for stream_ in (reader.stdin, reader.stdout):
        assert stream_ is not None
        stream_.close()


def test_signals_to_all_processes_leave_the_workers_at_work(
    path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    expected = stream([path], tokenizer_path, cache_dir, window=1).rows()
    reader = start(path, tokenizer_path, cache_dir)
    workers = children(reader.pid)
    # As a terminal does on Ctrl-C, and as a scheduler does before its time limit.
    os.killpg(reader.pid, signal.SIGINT)
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.5)
    assert reader.stdin is not None and reader.stdout is not None
    for number in range(2):
        reader.stdin.write("\n")
        reader.stdin.flush()
        total = ids(expected, range(5 + number * 400, 405 + number * 400)).sum()
        assert reader.stdout.readline().split() == [str(total), "1"]
    assert children(reader.pid) == workers
    reader.stdin.close()
    assert reader.wait(20) == 0
    wait_until_gone(workers)
    reader.stdout.close()
    expected.close()


def test_a_worker_that_dies_ends_the_run_with_a_message(
    path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    rows = stream([path], tokenizer_path, cache_dir, workers=2, window=1).rows()
    ids(rows, range(5))
    os.kill(children(os.getpid())[-1], signal.SIGKILL)
    with pytest.raises(RunError, match="was ended by signal 9"):
        ids(rows, range(5000))
    # Asked again it says so again instead of waiting for what never comes.
    with pytest.raises(RunError, match="was ended by signal 9"):
        ids(rows, [5000])
    rows.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_finds_reaches_the_trainer(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path, workers: int
) -> None:
    path = write(tmp_path / "a.jsonl", [*texts("a", 300), 3, *texts("b", 300)])
    rows = stream([path], tokenizer_path, cache_dir, workers=workers).rows()
    loader = BatchLoader(rows, 8)
    with pytest.raises(UserError, match=r"a\.jsonl line 301: `text` is int"):
        for _ in loader.steps(0, 5000):
            pass
    loader.close()


def test_the_next_batch_is_made_while_one_is_used(
    path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    loader = BatchLoader(stream([path], tokenizer_path, cache_dir, workers=1).rows(), 8)
    waits = []
    steps = loader.steps(0, 30)
    for _ in steps:
        waits.append(loader.data_wait)
        time.sleep(0.05)
    loader.close()
    assert sorted(waits[1:])[len(waits) // 2] < 0.001


def test_a_closed_stream_leaves_no_process_and_no_thread(
    path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    before, threads = set(children(os.getpid())), threading.active_count()
    rows = stream([path], tokenizer_path, cache_dir, workers=2, window=1).rows()
    ids(rows, range(5))
    workers = sorted(set(children(os.getpid())) - before)
    assert len(workers) == 2
    assert threading.active_count() == threads + 1
    rows.close()
    wait_until_gone(workers)
    assert threading.active_count() == threads


MEASURE = """
import resource, sys
from pathlib import Path
from tests.data.streams import stream
rows = stream(
    sys.argv[1:2], Path(sys.argv[2]), Path(sys.argv[3]), chunk_bytes=1 << 20, max_length=1024,
    workers=int(sys.argv[4]),
).rows()
rows.rows([0], [0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sample = 0
while rows.state(sample)["parts"][0]["epoch"] == 0:
    rows.rows(range(sample, sample + 64), [sample])
    sample += 64
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows.close()
print(before, after, rows.num_chunks)
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path, kind: str
) -> None:
    document = " ".join(texts("a", 100))
    documents = [f"{number} {document}" for number in range(200 * 10**6 // len(document))]
    path = write(tmp_path / f"a.{kind}", documents)
    size = sum(map(len, documents))
    assert size > 190 * 10**6
    del documents
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tokenizer_path), str(cache_dir), "0"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    before, after, chunks = json.loads(f"[{done.stdout.replace(' ', ',')}]")
    assert chunks > 20
    # The first window and the chunks ahead of it are in the first figure already.
    assert after - before < 80 * 1024, f"{before} KiB after one window, {after} at the end"


def test_bad_lines_do_not_add_up_over_epochs(
    tmp_path: Path, tokenizer_path: Path, cache_dir: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [*texts("a", 50), 3, *texts("b", 50), None])
    options = {"skip_bad_lines": True, "workers": 1}
    rows = stream([path], tokenizer_path, cache_dir, **options).rows()
    good = write(tmp_path / "good" / "a.jsonl", [*texts("a", 50), *texts("b", 50)])
    total = sum(map(len, tokenised(read([good]), tokenizer_path).values()))
    ids(rows, range(first_boundary(rows, 3 * total)))
    assert rows.bad_lines == {str(path): 2}
    rows.close()

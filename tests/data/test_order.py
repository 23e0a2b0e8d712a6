"""The order of rows: nothing lost, nothing twice, the same in every release and every process."""

import errno
import hashlib
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama_lib.data import shared
from llama_lib.data.order import Order, RowOrder
from llama_lib.data.shared import SharedArrays
from llama_lib.errors import UserError

# A third of the documents are shorter than a row, some are empty.
LENGTHS = np.random.RandomState(0).randint(0, 60, 37).astype(np.int32)
TOTAL = int(LENGTHS.sum())


def row_tokens(order: Order, lengths: np.ndarray, sample: int) -> list[int]:
    """The tokens of a row, numbered through the documents from 0."""
    firsts = np.cumsum(lengths) - lengths
    tokens = []
    for document, start, length in order.row_documents(sample):
        assert 0 < length <= lengths[document] - start
        tokens += range(firsts[document] + start, firsts[document] + start + length)
    return tokens


@pytest.mark.parametrize("max_length", [1, 7, 16, 64, TOTAL - 1, TOTAL, TOTAL + 1, 3 * TOTAL + 5])
@pytest.mark.parametrize("num_epochs", [1, 2, 5])
def test_no_token_is_lost_or_doubled(max_length: int, num_epochs: int) -> None:
    order = RowOrder(LENGTHS, max_length, 1)
    counts: Counter[int] = Counter()
    for sample in range(order.num_rows(num_epochs)):
        tokens = row_tokens(order, LENGTHS, sample)
        assert len(tokens) == max_length
        counts.update(tokens)
    dropped = num_epochs * TOTAL - counts.total()
    assert 0 <= dropped < max_length
    # each token once per epoch, but for the few that the end of the run drops
    if max_length <= TOTAL:
        assert set(counts.values()) <= {num_epochs, num_epochs - 1}
    assert sum(num_epochs - counts[token] for token in range(TOTAL)) == dropped


def test_last_row_of_an_epoch_carries_into_the_next() -> None:
    order = RowOrder(LENGTHS, 16, 1)
    assert TOTAL % 16, "the test needs a partial row"
    carried = order.num_rows(1)
    assert order.epoch_of(carried) == 0 and order.epoch_of(carried + 1) == 1
    # its head are the only tokens of epoch 0 no other row has
    seen = {token for sample in range(carried) for token in row_tokens(order, LENGTHS, sample)}
    head = row_tokens(order, LENGTHS, carried)[: TOTAL % 16]
    assert set(head) == set(range(TOTAL)) - seen


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = RowOrder(LENGTHS, 16, seed)
        samples = range(order.num_rows(number), order.num_rows(number + 1))
        return [token for sample in samples for token in row_tokens(order, LENGTHS, sample)]

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(2, 0)
    assert epoch(1, 0) != epoch(1, 1)
    documents = {RowOrder(LENGTHS, 16, 1).row_documents(sample)[0].document for sample in range(8)}
    assert len(documents) > 3, "rows of one document do not stand side by side"


def test_order_of_this_release_never_changes() -> None:
    # A resumed run relies on it; numpy promises this stream for good.
    order = RowOrder(np.array([5, 3, 8, 2]), 4, 42)
    assert [order.row_documents(sample) for sample in range(6)] == [
        [(0, 4, 1), (1, 0, 3)],
        [(3, 0, 2), (2, 0, 2)],
        [(2, 2, 4)],
        [(0, 0, 4)],
        [(2, 6, 2), (3, 0, 2)],
        [(1, 0, 3), (0, 0, 1)],
    ]


def digest(order: Order, samples: range) -> str:
    content = hashlib.sha256()
    for sample in samples:
        for piece in order.row_documents(sample):
            content.update(np.array(piece, "<i8").tobytes())
        content.update(b"|")
    return content.hexdigest()[:16]


# Numbers of version 0.1.0, which wrote the checkpoints that have to go on.
@pytest.mark.parametrize(
    ("documents", "longest", "max_length", "seed", "samples", "expected"),
    [
        (37, 60, 16, 1, range(400), "ba02314fd5a7b24e"),
        (37, 60, 4000, 7, range(12), "4aae52935837678d"),
        (1, 50, 8, 0, range(40), "3ae3175f1408fcbf"),
        (1000, 900, 128, 42, range(3000, 3400), "296dfcdc24f82c8b"),
        (1000, 900, 128, 2**32 - 1, range(10**6, 10**6 + 50), "d2138e622cc6f330"),
        (30000, 2000, 1024, 42, range(29000, 29600), "54cc304866702da5"),
    ],
)
@pytest.mark.parametrize("in_files", [False, True])
def test_concat_order_is_that_of_the_first_version(
    documents: int,
    longest: int,
    max_length: int,
    seed: int,
    samples: range,
    expected: str,
    in_files: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first 37 have empty documents among them.
    source = np.random.RandomState(documents)
    lengths = source.randint(0 if documents == 37 else 1, longest, documents).astype(np.int32)
    arrays = SharedArrays(tmp_path, "key")
    if in_files:
        monkeypatch.setattr(shared, "LARGE", 3)
    assert digest(RowOrder(lengths, max_length, seed, arrays), samples) == expected
    assert arrays.folder.exists() == in_files


@pytest.mark.parametrize("document_mask", [False, True])
def test_labels_are_counted_as_the_pieces_say(document_mask: bool) -> None:
    order = RowOrder(LENGTHS, 16, 3)
    samples = np.array([0, 5, 40, order.num_rows(1), 200])
    rows = [order.row_documents(int(sample)) for sample in samples]
    expected = sum(
        sum(piece.length - 1 for piece in row)
        if document_mask
        else sum(piece.length for piece in row) - 1
        for row in rows
    )
    assert order.num_labels(samples, document_mask) == expected
    assert order.num_labels(samples, False) == 5 * 15


def test_many_samples_at_once_are_the_samples_one_by_one() -> None:
    order = RowOrder(LENGTHS, 16, 3)
    samples = np.array([7, 3, order.num_rows(1), 3, 300])
    pieces = order.pieces(samples)
    for index, sample in enumerate(samples.tolist()):
        here = pieces.row == index
        columns = (pieces.document[here], pieces.start[here], pieces.length[here])
        together = list(zip(*(column.tolist() for column in columns), strict=True))
        assert together == order.row_documents(sample)
    with pytest.raises(IndexError):
        order.row_documents(-1)


def test_any_position_is_reached_at_once() -> None:
    lengths = np.full(100_000, 700, np.int32)
    order = RowOrder(lengths, 4096, 0)
    start = time.process_time()
    order.row_documents(10**9)
    assert time.process_time() - start < 0.5
    start = time.process_time()
    order.row_documents(10**9 + 1)
    assert time.process_time() - start < 0.01


# -- large orders in files -------------------------------------------------------------------------


def test_only_the_epochs_in_use_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "LARGE", 3)
    arrays = SharedArrays(tmp_path, "key")
    order = RowOrder(LENGTHS, 16, 1, arrays)
    for sample in range(order.num_rows(5)):
        order.row_documents(sample)
    # the row that ends epoch 4 carries into none, as the run ends before it
    expected = {f"{name}-{epoch}" for name in ("documents", "order-1") for epoch in (3, 4)}
    assert {path.name for path in arrays.folder.iterdir()} == expected
    # an earlier epoch is made again
    assert row_tokens(RowOrder(LENGTHS, 16, 1, arrays), LENGTHS, 2) == row_tokens(
        RowOrder(LENGTHS, 16, 1), LENGTHS, 2
    )


_ASK = """
import sys, time, numpy as np
from pathlib import Path
from llama_lib.data import shared
from llama_lib.data.shared import SharedArrays, create
folder, start = Path(sys.argv[1]), float(sys.argv[2])
def build(work):
    with (folder / "builds").open("a") as file:
        file.write("built\\n")
    array = create(work, "numbers", np.int64, 1000)
    time.sleep(0.5)
    array[:] = np.arange(1000)
time.sleep(max(0, start - time.time()))
print(SharedArrays(folder, "key").load("name", build)["numbers"].sum())
"""


def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    start = str(time.time() + 2)
    command = [sys.executable, "-c", _ASK, str(tmp_path), start]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert answers == [str(sum(range(1000)))] * 3
    assert (tmp_path / "builds").read_text() == "built\n"


_DIE = """
import os, sys, numpy as np
from llama_lib.data.shared import SharedArrays, create
def build(work):
    create(work, "numbers", np.int64, 4)
    (work / "half").touch()
    os.kill(os.getpid(), 9)
SharedArrays(sys.argv[1], "key").load("name", build)
"""


def test_arrays_of_a_killed_process_are_made_again(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _DIE, str(tmp_path)], cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -9
    arrays = SharedArrays(tmp_path, "key")
    assert [path.name for path in arrays.folder.rglob("half")] == ["half"]

    def build(work: Path) -> None:
        shared.create(work, "numbers", np.int64, 4)[:] = 7

    assert arrays.load("name", build)["numbers"].tolist() == [7] * 4
    assert [path.name for path in arrays.folder.rglob("*") if path.is_file()] == ["numbers.npy"]


def test_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared, "LARGE", 3)
    monkeypatch.setattr("os.posix_fallocate", full)
    arrays = SharedArrays(tmp_path, "key")
    with pytest.raises(UserError, match=r"--cache_dir .* \(No space left on device\)"):
        RowOrder(LENGTHS, 16, 1, arrays).row_documents(0)
    assert list(arrays.folder.iterdir()) == []


def test_large_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    arrays = SharedArrays(tmp_path, "key")

    def build(work: Path) -> None:
        shared.create(work, "numbers", np.int64, 1 << 22)[-1] = 5

    numbers = arrays.load("name", build)["numbers"]

    def own_memory() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0])

    before = own_memory()
    assert int(numbers[-1]) == 5 and int(numbers.sum()) == 5
    assert own_memory() - before < 4096, "32 MB of numbers cost this process no memory"

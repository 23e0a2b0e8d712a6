"""Datasets joined, subsets of them, single sources, files of Megatron; weights."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama_lib.data.indexed import IndexedWriter
from llama_lib.data.join import joined, one_source, subset
from llama_lib.data.opening import is_tokenised, needs_tokenizer, open_tokens
from llama_lib.data.order import RowOrder
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset, unigram_entropy
from llama_lib.data.tokenizer import save_tokenizer, train_tokenizer
from llama_lib.errors import RunError, UserError


@pytest.fixture
def request_for(tmp_path: Path, tokenizer_path: Path):  # type: ignore[no-untyped-def]
    def make(*datasets: object, **options: object) -> PrepareRequest:
        options = {
            "cache_dir": tmp_path / "cache",
            "tokenizer": str(tokenizer_path),
            "workers": 1,
            **options,
        }
        return PrepareRequest([str(dataset) for dataset in datasets], **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def made(request_for, write_jsonl, tmp_path):  # type: ignore[no-untyped-def]
    """Two prepared folders: x with the sources a and b, y with another a."""
    for name in ("x/a", "x/b", "y/a"):
        write_jsonl(f"{name}.jsonl", [f"{name} the cat {n}" for n in range(40)])
    for name in "xy":
        prepare(request_for(tmp_path / name, output=tmp_path / f"made-{name}", eval_ratio=0.2))
    return tmp_path / "made-x", tmp_path / "made-y"


def documents(dataset: PreparedDataset | None) -> list[list[int]]:
    assert dataset is not None
    return [dataset.tokens(n).tolist() for n in range(dataset.num_documents)]


def test_joined_datasets_hold_the_documents_of_each(made) -> None:
    x, y = map(PreparedDataset.open, made)
    both = joined([x, y])
    assert both.sources == ["a", "b", "a.2"]
    assert both.sources_of_entry == {0: ("a", "b"), 1: ("a.2",)}
    assert documents(both) == documents(x) + documents(y)
    assert documents(both.held_out) == documents(x.held_out) + documents(y.held_out)
    assert both.num_tokens == x.num_tokens + y.num_tokens == both.manifest["tokens"]
    assert both.tokenizer_path == x.tokenizer_path and both.vocab_size == x.vocab_size
    assert both.file_of("a.2", 3) == "a.jsonl"
    assert len({d.manifest_hash for d in (x, y, both, joined([y, x]))}) == 4
    assert joined([x, y]).manifest_hash == both.manifest_hash
    counts = Counter(both.locate(number)[0] for number in range(both.num_documents))
    assert counts == {name: len(reader) for name, reader in both.readers.items()}


def test_subset_is_a_seeded_view(made) -> None:
    x = PreparedDataset.open(made[0])
    some = subset(x, 20, seed=3)
    chosen = documents(some)
    assert len(chosen) == some.num_documents == 20
    assert some.num_tokens == sum(map(len, chosen)) == some.document_lengths.sum()
    places = [documents(x).index(document) for document in chosen]
    assert places == sorted(places) and len(set(places)) == 20
    for number, place in enumerate(places):
        source, within = some.locate(number)
        assert source == x.locate(place)[0]
        assert some.readers[source].number_in_file(within) == x.locate(place)[1]
    flat = np.concatenate([*some.rows(16)])
    assert flat.tolist() == [token for document in chosen for token in document]
    assert unigram_entropy(some) > 0
    assert documents(subset(x, 20, seed=3)) == chosen != documents(subset(x, 20, seed=4))
    hashes = [d.manifest_hash for d in (x, some, subset(x, 21, 3), subset(x, 20, 4))]
    assert len(set(hashes)) == 4 and subset(x, 20, 3).manifest_hash == some.manifest_hash
    assert subset(x, 1000, 3) is x
    assert documents(some.held_out) == documents(x.held_out)


def test_words_of_d_mix_text_and_tokens(made, request_for, write_jsonl, tmp_path) -> None:
    x, y = map(PreparedDataset.open, made)
    text = write_jsonl("z.jsonl", [f"later words {n}" for n in range(5)])
    more = write_jsonl("w.jsonl", [f"and more {n}" for n in range(3)])
    dataset = prepare(
        request_for(
            f"{made[1]}:2", f"{text}[4]:0.5", f"{made[0]}/b[10]:1", f"{more}:7", eval_ratio=0
        )
    )
    assert dataset.sources == ["a", "z", "w", "b"]
    assert dataset.weights == ((2.0, ("a",)), (0.5, ("z",)), (1.0, ("b",)), (7.0, ("w",)))
    counts = [dataset.only(name).num_documents for name in dataset.sources]
    assert counts == [y.num_documents, 4, 3, 10]
    assert documents(dataset.only("a")) == documents(y)
    assert set(map(tuple, documents(dataset.only("b")))) <= set(map(tuple, documents(x.only("b"))))
    # the tokenizer of what is prepared is used for the text
    untold = prepare(request_for(made[1], text, tokenizer=None))
    assert untold.tokenizer_hash == y.tokenizer_hash and untold.weights is None
    held_out = prepare(request_for(made[0], text, eval_data=[str(more)])).held_out
    assert held_out is not None and held_out.sources == ["w"]


def test_weights_change_what_is_trained_on_but_not_what_is_prepared(
    request_for, write_jsonl
) -> None:
    paths = [write_jsonl(f"{name}.jsonl", ["one", "two"]) for name in "ab"]
    plain = prepare(request_for(*paths, eval_ratio=0))
    one = prepare(request_for(f"{paths[0]}:0.7", f"{paths[1]}:0.3", eval_ratio=0))
    other = prepare(request_for(f"{paths[0]}:0.6", f"{paths[1]}:0.4", eval_ratio=0))
    assert plain.path == one.path == other.path
    assert one.weights == ((0.7, ("a",)), (0.3, ("b",)))
    assert len({d.manifest_hash for d in (plain, one, other)}) == 3
    empty = write_jsonl("e.jsonl", ["x"])
    with pytest.raises(UserError, match=r"e\.jsonl:1: no document is left"):
        prepare(request_for(f"{paths[0]}:1", f"{empty}:1", min_length=3, eval_ratio=0))


def test_one_source_of_a_folder(made, request_for) -> None:
    x = PreparedDataset.open(made[0])
    for name in (f"{made[0]}/b", f"{made[0]}/b.bin", f"{made[0]}/b.idx"):
        assert is_tokenised(name) and not needs_tokenizer(name)
        dataset = prepare(request_for(name, tokenizer=None))
        assert documents(dataset) == documents(x.only("b"))
        assert dataset.held_out is not None and dataset.held_out.sources == ["b"]
        assert dataset.num_tokens == dataset.manifest["tokens"]
    assert one_source(x, "b").manifest_hash != x.manifest_hash
    with pytest.raises(UserError, match="has no source c; it has a, b"):
        prepare(request_for(f"{made[0]}/c"))
    # Its documents would be trained on twice.
    with pytest.raises(UserError, match="name the same data: name it once"):
        prepare(request_for(made[0], f"{made[0]}/b"))
    both = prepare(request_for(f"{made[0]}/a", f"{made[0]}/b", tokenizer=None))
    assert sorted(documents(both)) == sorted(documents(x))


def test_refusals(made, request_for, tmp_path, write_jsonl) -> None:
    save_tokenizer(train_tokenizer(["something else"], 280), tmp_path / "other")
    text = write_jsonl("t.jsonl", ["one", "two"])
    there = tmp_path / "there"
    prepare(request_for(text, tokenizer=str(tmp_path / "other"), output=there))
    with pytest.raises(UserError, match="another tokenizer"):
        joined([PreparedDataset.open(made[0]), PreparedDataset.open(there)])
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(request_for(made[0], there))
    with pytest.raises(UserError, match="--output has nothing to do"):
        prepare(request_for(made[0], text, output=tmp_path / "out"))
    with pytest.raises(UserError, match="--num_token takes text"):
        prepare(request_for(made[0], num_token=["8:1k"], mixture="even"))
    with pytest.raises(UserError, match="vocab_size is 200"):
        prepare(request_for(made[0], made[1], vocab_size=200))


# Written by megatron-core: two documents, the first of two sequences.
MEGATRON = """
import sys
from collections import Counter
import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
for name in sys.argv[2:]:
    builder = IndexedDatasetBuilder(f"{sys.argv[1]}/{name}.bin", dtype=getattr(np, name))
    builder.add_item(torch.tensor([5, 6, 7]))
    builder.add_item(torch.tensor([8, 2]))
    builder.end_document()
    builder.add_item(torch.tensor([9, 10, 11, 12, 2]))
    builder.end_document()
    builder.finalize(f"{sys.argv[1]}/{name}.idx")
"""


def test_files_of_megatron_open_and_give_rows(tmp_path, request_for, tokenizer_path) -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("needs megatron-core, see requirements-dev.txt")
    dtypes = ["uint16", "int32", "int64", "uint8"]
    # In a process of its own: importing megatron-core changes settings of torch and warns a lot.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEGATRON, str(tmp_path), *dtypes],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name in dtypes:
        for word in (name, f"{name}.bin", f"{name}.idx"):
            assert is_tokenised(f"{tmp_path}/{word}") and needs_tokenizer(f"{tmp_path}/{word}")
            dataset = prepare(request_for(tmp_path / word))
            assert documents(dataset) == [[5, 6, 7], [8, 2], [9, 10, 11, 12, 2]]
    # every token once in the rows of an epoch, as with files of our own
    order = RowOrder(dataset.document_lengths, 5, seed=0)
    seen = [
        dataset.tokens(*piece).tolist()
        for sample in range(order.num_rows(1))
        for piece in order.row_documents(sample)
    ]
    assert sorted(id for piece in seen for id in piece) == sorted([5, 6, 7, 8, 2, 9, 10, 11, 12, 2])
    assert dataset.file_of("uint8", 2) == "uint8.bin"
    assert (dataset.tokenizer_path / "tokenizer.json").is_file()
    both = prepare(request_for(tmp_path / "uint16", tmp_path / "int32", eval_ratio=0.5))
    assert both.num_documents == 6 and both.held_out is None
    with pytest.raises(UserError, match=r"has no tokenizer beside it.*--tokenizer"):
        prepare(request_for(tmp_path / "uint16", tokenizer=None))


def test_megatron_files_that_cannot_be_used(tmp_path, request_for, tokenizer_path) -> None:
    with IndexedWriter(tmp_path / "high", np.uint16) as writer:
        writer.write(np.array([1, 300]), np.array([2]))
    with pytest.raises(UserError, match=r"holds the id 300.* 0 to 299.*--tokenizer"):
        prepare(request_for(tmp_path / "high"))
    with IndexedWriter(tmp_path / "none", np.uint16) as writer:
        writer.write(np.array([], np.int64), np.array([], np.int64))
    with pytest.raises(UserError, match="holds no tokens"):
        prepare(request_for(tmp_path / "none"))
    (tmp_path / "high.idx").write_bytes(b"MMIDIDX" + bytes(40))
    with pytest.raises(RunError, match="is damaged"):
        prepare(request_for(tmp_path / "high"))


def test_copies_of_megatron_files_are_the_same_data(tmp_path, tokenizer_path) -> None:
    hashes = []
    for folder, last in (("x", 7), ("y", 7), ("z", 8)):
        (tmp_path / folder).mkdir()
        with IndexedWriter(tmp_path / folder / "a", np.uint16) as writer:
            writer.write(np.array([5, last, 2]), np.array([3]))
        dataset = open_tokens(f"{tmp_path}/{folder}/a", str(tokenizer_path), tmp_path / "cache")
        hashes.append(dataset.manifest_hash)
        json.dumps(dataset.manifest)  # inspect shows it
    assert hashes[0] == hashes[1] != hashes[2]

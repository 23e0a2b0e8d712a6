"""A prepared dataset: a folder of tokenised sources with a manifest, read by memory map.

Invariant: a folder without a valid manifest.json is never opened; equal `manifest_hash` means equal
documents, ids, order and tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_lib.data.indexed import IndexedReader
from llama_lib.errors import RunError, UserError

FORMAT = "llama_lib prepared dataset"
VERSION = 2
# 1 had neither entries nor rows, and nothing else is different: such folders open, but what the
# cache holds of them is made again.
_READABLE = (1, VERSION)
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
EVAL_FOLDER = "eval"

# The key names files of one machine by path and mtime, and the seed touches no id, so nodes that
# hold the same data may differ in both.
_NOT_HASHED = ("key", "seed")


def is_prepared(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


class Reader(Protocol):
    """The documents of one source: a token file, or some of the documents of one."""

    @property
    def lengths(self) -> npt.NDArray[np.integer]: ...

    @property
    def num_tokens(self) -> int: ...

    def __len__(self) -> int: ...

    def tokens(
        self, document: int, start: int = 0, count: int | None = None
    ) -> npt.NDArray[np.integer]: ...

    def chunks(self, size: int) -> Iterator[npt.NDArray[np.integer]]: ...

    def number_in_file(self, document: int) -> int: ...


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Documents of all sources, numbered through in the order of the manifest.

    `held_out` is the dataset of the documents that are never trained on, if there is one.
    `weights`: relative shares of the training tokens, each of the sources it is for together;
    None trains on everything alike. `tokenizer_folder` is where the tokenizer is kept, if not in
    the folder itself.
    """

    path: Path
    manifest: dict[str, Any]
    readers: dict[str, Reader]
    held_out: PreparedDataset | None = None
    weights: tuple[tuple[float, tuple[str, ...]], ...] | None = None
    tokenizer_folder: Path | None = None

    @classmethod
    def open(cls, path: str | Path) -> PreparedDataset:
        """Open a folder; costs the same for any number of tokens.

        Raises UserError when it is no prepared dataset, RunError when its files are damaged.
        """
        path = Path(path)
        if not is_prepared(path):
            raise UserError(
                f"{path} is no prepared dataset: it has no {MANIFEST}, so it was never finished. "
                "Make one with: python -m llama_lib prepare -d DATA --output DIR"
            )
        manifest = _read_manifest(path / MANIFEST)
        readers: dict[str, Reader] = {}
        for name, facts in manifest["sources"].items():
            readers[name] = reader = IndexedReader(path / name)
            found = (len(reader), reader.num_tokens)
            if found != (facts["documents"], facts["tokens"]):
                raise RunError(
                    f"{path / name}.bin has {found[0]} documents and {found[1]} tokens, the "
                    f"manifest says {facts['documents']} and {facts['tokens']}: prepare it again."
                )
        held_out = cls.open(path / EVAL_FOLDER) if is_prepared(path / EVAL_FOLDER) else None
        return cls(path, manifest, readers, held_out)

    @property
    def sources(self) -> list[str]:
        return list(self.readers)

    @property
    def num_documents(self) -> int:
        return sum(len(reader) for reader in self.readers.values())

    @property
    def num_tokens(self) -> int:
        return sum(reader.num_tokens for reader in self.readers.values())

    @property
    def has_rows(self) -> bool:
        """Whether some documents are ready-made rows, or cut to rows for a budget of tokens."""
        return any(self._facts(name).get("rows", False) for name in self.readers)

    @cached_property
    def sources_of_entry(self) -> dict[int, tuple[str, ...]]:
        """The sources of each word of -d, by its number from 0."""
        entries: dict[int, tuple[str, ...]] = {}
        for name in self.readers:
            entry = self._facts(name).get("entry", 0)
            entries[entry] = (*entries.get(entry, ()), name)
        return entries

    @property
    def tokenizer_hash(self) -> str:
        return self.manifest["tokenizer"]["hash"]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can give."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer the ids come from, kept beside them."""
        return self.tokenizer_folder or self.path / TOKENIZER_FOLDER

    @cached_property
    def document_lengths(self) -> npt.NDArray[np.integer]:
        """Tokens of each document int32 [documents], EOS included."""
        lengths = [reader.lengths for reader in self.readers.values()]
        # One file stays where it is; only several have to be put together in memory.
        return (
            lengths[0] if len(lengths) == 1 else np.concatenate([*lengths, np.empty(0, np.int32)])
        )

    @cached_property
    def _first_documents(self) -> npt.NDArray[np.int64]:
        counts = [len(reader) for reader in self.readers.values()]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def locate(self, document: int) -> tuple[str, int]:
        """(source, number within the source) of a document."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        source = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return self.sources[source], document - int(self._first_documents[source])

    def file_of(self, source: str, within: int) -> str:
        """Name of the file that document `within` of a source comes from."""
        number = self.readers[source].number_in_file(within)
        for file in self._facts(source)["files"]:
            if number < file["documents"]:
                return file["name"]
            number -= file["documents"]
        raise IndexError(f"document {within} of {source}")

    def _facts(self, source: str) -> dict[str, Any]:
        return self.manifest["sources"][source]

    def tokens(
        self, document: int, start: int = 0, count: int | None = None
    ) -> npt.NDArray[np.integer]:
        """Ids start..start+count of one document (to its end without `count`), a view."""
        source, within = self.locate(document)
        return self.readers[source].tokens(within, start, count)

    def only(self, source: str) -> PreparedDataset:
        """The same dataset with one source; its manifest stays that of the whole."""
        return replace(self, readers={source: self.readers[source]}, held_out=None)

    def rows(self, max_length: int) -> Iterator[npt.NDArray[np.int64]]:
        """Unshuffled rows of `max_length` ids for evaluation; the last one may be shorter."""
        buffer = np.empty(0, np.int64)
        for reader in self.readers.values():
            for chunk in reader.chunks(max_length):
                piece = chunk.astype(np.int64)
                buffer = np.concatenate([buffer, piece])
                while len(buffer) >= max_length:
                    yield buffer[:max_length]
                    buffer = buffer[max_length:]
        if len(buffer):
            yield buffer

    @cached_property
    def manifest_hash(self) -> str:
        """sha256 of what the manifest says about the data; nodes compare it before training."""
        content = {key: self.manifest[key] for key in self.manifest if key not in _NOT_HASHED}
        # Unsorted: the order of the sources is part of the data.
        text = json.dumps(content)
        if self.held_out is not None:
            text += self.held_out.manifest_hash
        if self.weights is not None:
            text += json.dumps(self.weights)
        return hashlib.sha256(text.encode()).hexdigest()


def unigram_entropy(dataset: PreparedDataset) -> float:
    """Nats per token of the best model that ignores context: the entropy of the id counts."""
    counts = np.zeros(dataset.vocab_size, np.int64)
    for reader in dataset.readers.values():
        # Whole files need not fit in memory.
        for chunk in reader.chunks(1 << 24):
            counts += np.bincount(chunk, minlength=len(counts))
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log(shares)).sum())


def check_tokenizer(dataset: PreparedDataset, tokenizer_hash: str) -> list[str]:
    """The problem, if the dataset was prepared with another tokenizer."""
    if dataset.tokenizer_hash == tokenizer_hash:
        return []
    return [
        f"{dataset.path} was prepared with another tokenizer (hash {dataset.tokenizer_hash[:16]}, "
        f"the one used here has {tokenizer_hash[:16]}). All data of a run need one tokenizer: "
        f"leave out another --tokenizer, to use the one kept in {dataset.tokenizer_path}, or "
        "prepare the text again."
    ]


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): prepare the data again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a prepared dataset.")
    if manifest.get("version") not in _READABLE:
        raise UserError(
            f"{path} has version {manifest.get('version')}, this program reads {VERSION}: prepare "
            "the data again."
        )
    missing = _missing(manifest, ("sources", "documents", "tokens", "tokenizer", "options"))
    if missing:
        raise RunError(f"{path} is damaged (no {', '.join(missing)}): prepare the data again.")
    return manifest


def _missing(manifest: dict[str, Any], fields: Sequence[str]) -> list[str]:
    return [field for field in fields if field not in manifest]

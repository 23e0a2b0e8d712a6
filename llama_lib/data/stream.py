"""Train at once from text of any size: a stream that is tokenised while it is used.

Invariant: which documents make row i depends on the files, the seed and the window alone, not on
ranks, workers or batch size. Each process walks the whole stream and keeps the rows of its rank:
nothing is exchanged, so nothing can be missed or come twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_lib.data.blend import Apportionment
from llama_lib.data.chunk_work import Settings
from llama_lib.data.chunks import CHUNK_BYTES, Corpus
from llama_lib.data.entries import Entry
from llama_lib.data.loader import Row, row_arrays
from llama_lib.data.parts import Part, parquet_file
from llama_lib.data.readers import TextFile
from llama_lib.data.stream_files import corpora_of
from llama_lib.data.stream_walk import Walker
from llama_lib.data.tokenise import prove
from llama_lib.data.tokenizer import load_tokenizer, tokenizer_hash
from llama_lib.data.training_data import Passage
from llama_lib.data.windows import Tokens
from llama_lib.errors import UserError

DEFAULT_WINDOW = 16

_PROBE_CHARACTERS = 64 << 10
_MIB = 1 << 20


def open_stream(
    entries: Sequence[Entry],
    tokenizer: str | Path,
    max_length: int,
    seed: int,
    cache_dir: str | Path,
    *,
    workers: int = 0,
    document_mask: bool = False,
    skip_bad_lines: bool = False,
    window: int = DEFAULT_WINDOW,
    excluded: Iterable[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> Stream:
    """The stream of the words of `-d`; with weights one stream per word, blended.

    `workers` processes tokenise (0: a thread of this process); documents are shuffled among those
    of `window` chunks of about `chunk_bytes`; texts whose hash is in `excluded` are left out.

    Raises:
        UserError: everything that is wrong with the entries, in one message.
    """
    folder = Path(cache_dir).expanduser()
    corpora = corpora_of(entries, folder, seed, skip_bad_lines, chunk_bytes)
    loaded = load_tokenizer(str(tokenizer), cache_dir)
    settings = Settings(
        recipe=prove(loaded).recipe,
        excluded=np.array(sorted(excluded), np.uint64),
        skip_bad_lines=skip_bad_lines,
        document_mask=document_mask,
        is_worker=workers > 0,
    )
    weights = [entry.weight for entry in entries if entry.weight is not None]
    stream = Stream(corpora, weights, loaded, settings, max_length, seed, window, workers, folder)
    stream.remember()
    return stream


@dataclass
class Stream:
    """What is streamed and how; `rows` begins a walk through it, at any place.

    `weights` are the shares of the corpora, empty if there is one without a share.
    """

    corpora: list[Corpus]
    weights: list[float]
    tokenizer: Any
    settings: Settings
    max_length: int
    seed: int
    window: int
    workers: int
    cache_dir: Path
    _engines: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        return [name for corpus in self.corpora for name in corpus.sources]

    @cached_property
    def tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    @cached_property
    def identity(self) -> str:
        """Equal for streams with the same rows: files by name, size and time; all that orders."""
        facts = {
            "corpora": [corpus.identity() for corpus in self.corpora],
            "weights": self.weights,
            "tokenizer": self.tokenizer_hash,
            "max_length": self.max_length,
            "seed": self.seed,
            "window": self.window,
            "excluded": hashlib.sha256(self.settings.excluded.tobytes()).hexdigest(),
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def describe(self) -> list[str]:
        """What a reader of the log needs to know about the stream."""
        files = [file for corpus in self.corpora for file in corpus.files]
        remote = sum(file.remote is not None for file in files)
        whole = sum(len(corpus.whole_files) for corpus in self.corpora) - remote
        chunk = self.corpora[0].chunk_bytes / _MIB
        size = sum(corpus.size for corpus in self.corpora) / _MIB
        lines = [
            f"stream of {len(files)} file(s), {size:,.1f} MiB, from {len(self.sources)} source(s), "
            f"in chunks of {chunk:g} MiB; documents are shuffled within windows of {self.window} "
            f"chunks ({self.window * chunk:g} MiB of text)"
        ]
        parts = sum(len(corpus.parts) for corpus in self.corpora)
        if parts:
            lines.append(f"{parts:,} chunks of plain files come in a new order every epoch")
        if whole:
            lines.append(
                f"{whole} file(s) can only be read from the beginning (compressed, .json, .arrow): "
                "they come one after another, so a document moves by one window at most"
            )
        if remote:
            lines.append(
                f"{remote} file(s) of the hub are downloaded one by one as they are needed"
            )
        if self.weights:
            shares = zip(self.corpora, self.weights, strict=True)
            named = (f"{'+'.join(c.sources)} {w / sum(self.weights):.2%}" for c, w in shares)
            lines.append(f"rows by weight: {', '.join(named)}")
        where = f"{self.workers} process(es)" if self.workers else "a thread"
        lines.append(f"every training process tokenises the whole stream in {where} of its own")
        return lines

    def rows(self, state: dict[str, Any] | None = None) -> StreamedRows:
        """The rows from the beginning, or from what `StreamedRows.state` once gave.

        Raises:
            UserError: the state belongs to another stream; what has changed is named.
        """
        if problems := self.problems_of(state or {}):
            raise UserError(problems)
        return StreamedRows(self, state or {})

    def passages(self, samples: Sequence[int], state: dict[str, Any]) -> list[list[Passage]]:
        """For each sample the documents its row is made of; `state` is of the first or before."""
        rows = self.rows(state)
        try:
            return rows.passages(samples)
        finally:
            rows.close()

    def problems_of(self, state: dict[str, Any]) -> list[str]:
        """What makes it impossible to go on from a state."""
        if not state or state.get("stream") == self.identity[:16]:
            return []
        problems = []
        before, now = self._remembered(str(state.get("stream"))), self._listing()
        for name in sorted(before.keys() - now.keys()):
            problems.append(f"{name} belonged to the stream, but is not among the files now")
        for name in sorted(now.keys() - before.keys() if before else ()):
            problems.append(f"{name} did not belong to the stream")
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                problems.append(f"{name} was changed: {before[name]} before, {now[name]} now")
        remedy = (
            "give the files, --tokenizer, --max_length, --seed and --shuffle_window the run "
            "started with, or start a new run without --load."
        )
        if not problems:
            return [f"the checkpoint was made from another stream: {remedy}"]
        return [f"{problem}: {remedy}" for problem in problems]

    def remember(self) -> None:
        """Keep the list of files, so that a later refusal can name the one that changed."""
        path = self._memory(self.identity[:16])
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        # Without it a refusal still says that the stream is another one.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._listing()))
            temporary.replace(path)

    def _remembered(self, identity: str) -> dict[str, Any]:
        path = self._memory(identity)
        return json.loads(path.read_text()) if path.is_file() else {}

    def _memory(self, identity: str) -> Path:
        return self.cache_dir / "streams" / f"{identity}.json"

    def _listing(self) -> dict[str, list[Any]]:
        return {name: facts for corpus in self.corpora for name, facts in corpus.listing().items()}

    def engine_of(self, corpus: Corpus, source: int) -> str:
        """The tokenizer that is proven on the first texts of a source, as `prepare` does it."""
        name = corpus.sources[source]
        if name not in self._engines:
            first = next(n for n, file in enumerate(corpus.files) if file.source == source)
            probes = _head(corpus.ready(first), corpus.skip_bad_lines)
            proof = prove(self.tokenizer, probes=probes)
            self._engines[name] = proof.recipe.engine
            if proof.note and os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"tokenising {name} with tokenizers, 10 to 50 times slower: {proof.note}",
                    file=sys.stderr,
                    flush=True,
                )
        return self._engines[name]


class StreamedRows:
    """Rows of a stream, from a place on; see `loader.RowSource`.

    Samples may be skipped, and asked for again; asking for what comes next is what is quick.
    """

    def __init__(self, stream: Stream, state: dict[str, Any]) -> None:
        self.stream = stream
        self.max_length = stream.max_length
        self.document_mask = stream.settings.document_mask
        self._apportionment = Apportionment(stream.weights or [1.0], stream.seed)
        parts = state["parts"] if state else [{} for _ in stream.corpora]
        # One word of several takes its part of the processes.
        workers = stream.workers and max(1, stream.workers // len(stream.corpora))
        self._walkers = [
            Walker(
                corpus,
                stream.settings,
                partial(stream.engine_of, corpus),
                stream.max_length,
                stream.window,
                workers,
                part,
            )
            for corpus, part in zip(stream.corpora, parts, strict=True)
        ]
        self._sources = [
            [corpus.sources[file.source] for file in corpus.files] for corpus in stream.corpora
        ]

    def rows(self, samples: Sequence[int], wanted: Sequence[int]) -> tuple[list[Row], int]:
        found: dict[int, Row] = {}
        mine = set(wanted)
        num_labels = len(samples) * (self.max_length - 1)
        for sample, part, number in self._located(samples):
            if sample in mine:
                found[sample] = self._row(part, self._walkers[part].row(number))
            if self.document_mask:
                # The first piece of each row has no label for its first token in any case.
                num_labels -= self._walkers[part].num_pieces(number) - 1
        return [found[sample] for sample in wanted], num_labels

    def _row(self, part: int, tokens: Tokens) -> Row:
        counts: dict[str, int] = {}
        pieces = tokens.pieces
        lengths = pieces["length"].tolist()
        for file, length in zip(pieces["file"].tolist(), lengths, strict=True):
            source = self._sources[part][file]
            counts[source] = counts.get(source, 0) + length
        ids = tokens.ids.astype(np.int64)
        return Row(*row_arrays(ids, lengths, self.document_mask), counts)

    def epoch_of(self, sample: int) -> int:
        """Epoch in which the row of a sample begins, from 0; of a blend, of its slowest part."""
        counts = zip(self._walkers, self._apportionment.counts(sample), strict=True)
        return min(walker.epoch_of(count) for walker, count in counts)

    def state(self, sample: int) -> dict[str, Any]:
        counts = zip(self._walkers, self._apportionment.counts(sample), strict=True)
        parts = [walker.state(count) for walker, count in counts]
        return {"stream": self.stream.identity[:16], "sample": sample, "parts": parts}

    def passages(self, samples: Sequence[int]) -> list[list[Passage]]:
        """For each sample the documents its row is made of, by their numbers in their files."""
        result = []
        for _, part, number in self._located(samples):
            pieces = self._walkers[part].row(number).pieces
            result.append([self._passage(part, *piece) for piece in pieces.tolist()])
        return result

    def _passage(
        self, part: int, file: int, first: int, record: int, start: int, length: int
    ) -> Passage:
        corpus = self.stream.corpora[part]
        facts = corpus.files[file]
        number = record + _records_before(corpus.ready(file), first, corpus.skip_bad_lines)
        return Passage(self._sources[part][file], facts.name, number, start, length)

    @property
    def bad_lines(self) -> dict[str, int]:
        """Bad lines left out so far, by the path of the file."""
        return {
            str(walker.corpus.files[file].path): count
            for walker in self._walkers
            for file, count in walker.bad_lines.items()
        }

    @property
    def num_excluded(self) -> int:
        """Documents left out so far because their text is held out."""
        return sum(walker.num_excluded for walker in self._walkers)

    def report(self) -> list[str]:
        """What was left out since this process began to read."""
        lines = [
            f"  {', '.join(walker.corpus.sources)}: came to epoch {walker.last_epoch + 1}"
            for walker in self._walkers
            if walker.last_epoch
        ]
        lines += [f"{path}: {count} bad lines left out" for path, count in self.bad_lines.items()]
        if self.num_excluded:
            lines.append(f"{self.num_excluded} documents left out because they are held out")
        return lines

    @property
    def num_chunks(self) -> int:
        """Chunks that were read and tokenised so far."""
        return sum(walker.num_chunks for walker in self._walkers)

    def close(self) -> None:
        for walker in self._walkers:
            walker.close()

    def _located(self, samples: Sequence[int]) -> list[tuple[int, int, int]]:
        """(sample, part of the blend, number of the sample within the part) of each."""
        parts, numbers = self._apportionment.locate(np.asarray(samples, np.int64))
        return list(zip(samples, parts.tolist(), numbers.tolist(), strict=True))


def _head(path: Path, skip_bad_lines: bool) -> list[str]:
    """The first texts of a file, to prove the fast tokenizer on."""
    texts: list[str] = []
    characters = 0
    reader = TextFile(path, skip_bad_lines)
    for text in reader if not reader.is_rows else ():
        if text:
            texts.append(text[:_PROBE_CHARACTERS])
        characters += len(text)
        if characters >= _PROBE_CHARACTERS:
            break
    return texts


@cache
def _records_before(path: Path, start: int, skip_bad_lines: bool) -> int:
    """How many records of a file come before a part of it."""
    if start == 0:
        return 0
    if path.name.lower().endswith(".parquet") and not skip_bad_lines:
        with parquet_file(path) as file:
            return sum(file.metadata.row_group(number).num_rows for number in range(start))
    return sum(1 for _ in TextFile(path, skip_bad_lines, Part(path, 0, start)))

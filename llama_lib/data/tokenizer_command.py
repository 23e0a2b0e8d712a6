"""`python -m llama_lib tokenizer`: train on the text of some sources, report, write the folder.

Invariant: the folder is whole, its report in it, or not there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama_lib.data.entries import Entry, parse_entries
from llama_lib.data.readers import TextFile
from llama_lib.data.sources import Source, resolve
from llama_lib.data.tokenizer import (
    DEFAULT_CACHE_DIR,
    fast_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from llama_lib.data.tokenizer_report import report, report_table
from llama_lib.data.train_tokenizer import (
    CHARACTER_COVERAGE,
    STYLES,
    check_vocab_size,
    train_style,
)
from llama_lib.errors import UserError

# Llama 2's.
VOCAB_SIZE = 32000


@dataclass
class Corpus:
    """The texts of some sources, read anew for each pass; only counts stay in memory."""

    sources: Sequence[Source]
    skip_bad_lines: bool = False
    sample_ratio: float = 1.0
    # Of the last pass, for each source.
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        self.counts = {source.name: Counter() for source in self.sources}
        for source in self.sources:
            yield from self.texts_of(source, self.counts[source.name])

    def texts_of(self, source: Source, counts: Counter[str] | None = None) -> Iterator[str]:
        counts = Counter() if counts is None else counts
        for path in source.files:
            reader = TextFile(path, self.skip_bad_lines)
            for text in reader:
                if not isinstance(text, str):
                    raise UserError(
                        f"{path} holds ready-made rows of ids, which have no text to train a "
                        "tokenizer on. Leave it out of --input."
                    )
                if text and self._drawn(text):
                    counts["documents"] += 1
                    counts["bytes"] += len(text.encode("utf-8"))
                    yield text
            counts["bad_lines"] += reader.bad

    def _drawn(self, text: str) -> bool:
        if self.sample_ratio >= 1:
            return True
        # Salted: the share held out for evaluation is drawn by a hash of the text too.
        digest = hashlib.sha256(b"tokenizer\0" + text.encode("utf-8")).digest()
        return int.from_bytes(digest[:8], "big") < self.sample_ratio * 2**64


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # Of a link the folder behind it: a rename cannot put a folder in place of a link.
    output = Path(os.path.realpath(os.path.expanduser(arguments.output)))
    entries = _checked(arguments, output)
    from tqdm import tqdm

    cache_dir = Path(arguments.cache_dir).expanduser()
    reference = compared = None
    if arguments.reference:
        reference = fast_tokenizer(arguments.reference, cache_dir, "--reference")
    other = arguments.compare or arguments.reference
    if arguments.compare:
        compared = fast_tokenizer(arguments.compare, cache_dir, "--compare")
    else:
        compared = reference
    sources = resolve([entry.name for entry in entries], cache_dir)
    corpus = Corpus(sources, arguments.skip_bad_lines, arguments.sample_ratio)

    def texts() -> Iterable[str]:
        return tqdm(
            corpus.texts(), desc="reading", unit=" documents", disable=not sys.stderr.isatty()
        )

    tokenizer = train_style(
        texts,
        arguments.vocab_size,
        arguments.style,
        reference,
        arguments.character_coverage,
        arguments.reference,
    )
    tokenizers = {output.name: tokenizer}
    if compared is not None:
        title = Path(other).resolve().name if Path(other).is_dir() else other
        tokenizers[title if title != output.name else other] = compared
    size = vocabulary_size(tokenizer)
    content = {
        "ids": size,
        "hash": tokenizer_hash(tokenizer),
        "reference": arguments.reference,
        "sample_ratio": arguments.sample_ratio,
        **report(
            {
                source.name: (corpus.counts[source.name], corpus.texts_of(source))
                for source in corpus.sources
            },
            tokenizers,
            int(arguments.report_mib * 2**20),
        ),
    }
    save_tokenizer(tokenizer, output, {"report.json": json.dumps(content, indent=1) + "\n"})
    print("\n".join(report_table(content)))
    print(f"{output}: {size} ids, hash {content['hash'][:16]}; the table is in its report.json")
    if size < arguments.vocab_size:
        print(f"the text gives no more than {size} of {arguments.vocab_size} ids")
    return 0


def _checked(arguments: argparse.Namespace, output: Path) -> list[Entry]:
    """The entries of --input. Raises UserError with every problem of the arguments."""
    problems = []
    entries: list[Entry] = []
    try:
        entries = parse_entries(arguments.input)
    except UserError as error:
        problems += error.problems
    problems += [
        f"--input {entry.text}: numbers of documents and weights are for training; expected "
        f"{entry.name}. Draw a part of the documents with --sample_ratio."
        for entry in entries
        if entry.limit is not None or entry.weight is not None
    ]
    problems += _output_problems(output)
    if arguments.style is not None and arguments.style not in STYLES:
        problems.append(
            f"unknown --style: got {arguments.style!r}, expected one of {', '.join(STYLES)}."
        )
    elif not arguments.reference:
        # With a reference the style may be its own, which is not known yet.
        try:
            check_vocab_size(arguments.vocab_size, arguments.style or "llama3", False)
        except UserError as error:
            problems += error.problems
    for flag in ("sample_ratio", "character_coverage"):
        if not 0 < getattr(arguments, flag) <= 1:
            problems.append(
                f"--{flag} {getattr(arguments, flag)} is not a share: expected 0 < r <= 1."
            )
    if not arguments.report_mib > 0:
        problems.append(f"--report_mib {arguments.report_mib}: expected a number above 0.")
    if problems:
        raise UserError(problems)
    return entries


def _output_problems(output: Path) -> list[str]:
    """Why the folder cannot be written, found before the training; leaves nothing behind."""
    made: list[Path] = []
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            return [f"{output} exists and is not empty: choose another --output."]
        if os.path.ismount(output):
            return [f"--output {output} is where a disk begins: choose a folder inside it."]
        missing = [folder for folder in output.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as probe:
            (Path(probe) / "probe").write_bytes(b"probe")
    except OSError as error:
        return [f"--output {output} cannot be written: {error}. Choose another place."]
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # Another process may have begun to use it.
                folder.rmdir()
    return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib tokenizer",
        description="Train a tokenizer on text and report how it does, source by source.",
    )
    add = parser.add_argument
    add("-d", "--dataset", "--input", dest="input", nargs="+", default=["sample"], metavar="INPUT",
        help="text, as -d of pretrain.py takes it (sample)")  # fmt: skip
    add("--output", required=True, help="folder to write (Hugging Face format)")
    add("--vocab_size", type=int, default=VOCAB_SIZE, help=f"number of ids ({VOCAB_SIZE})")
    add("--style", help="llama2 or llama3 (that of --reference, else llama3)")
    add("--reference", help="copy normalizer, pre-tokenizer, decoder and post-processor of this "
        "tokenizer (folder or hub id)")  # fmt: skip
    add("--compare", help="report on this tokenizer too (that of --reference)")
    add("--sample_ratio", type=float, default=1.0, help="share of documents used, by a hash (1)")
    add("--character_coverage", type=float, default=CHARACTER_COVERAGE,
        help=f"llama2: share of characters that get a token ({CHARACTER_COVERAGE})")  # fmt: skip
    add("--report_mib", type=float, default=16, help="text per source to report on, in MiB (16)")
    add("--cache_dir", default=DEFAULT_CACHE_DIR, help="where `sample` is kept")
    add("--skip_bad_lines", action="store_true", help="drop and count bad lines")
    return parser

"""Write the folder of a prepared dataset beside its final name, then rename it.

Invariant: the manifest is written last and the folder is renamed after everything is on the disk,
so what carries the final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lib.data.build import HASHES, Built, build
from llama_lib.data.once import Turn
from llama_lib.data.prepared import (
    EVAL_FOLDER,
    FORMAT,
    MANIFEST,
    TOKENIZER_FOLDER,
    VERSION,
    is_prepared,
)
from llama_lib.data.readers import TextFile
from llama_lib.data.sources import Source
from llama_lib.data.tokenise import Encoder
from llama_lib.data.tokenizer import tokenizer_hash, vocabulary_size
from llama_lib.errors import UserError

if TYPE_CHECKING:
    from llama_lib.data.prepare import PrepareRequest

# Text bytes per byte of file, for the estimate of the space needed. Chosen, on the safe side.
_EXPANSION = {".gz": 5.0, ".zst": 6.0, ".parquet": 4.0}
_PROBE_CHARACTERS = 64 << 10

Facts = dict[str, dict[str, Any]]


def assemble(
    request: PrepareRequest,
    options: dict[str, Any],
    sources: list[Source],
    eval_sources: list[Source],
    tokenizer: Any,
    key: str,
    folder: Path,
    turn: Turn,
) -> None:
    """Write everything beside `folder`, the manifest last, and rename."""
    workers = request.workers or len(os.sched_getaffinity(0))
    probes = [text for source in sources for text in _head(source, request.skip_bad_lines)]
    encoder = Encoder(tokenizer, workers, request.add_bos, probes)
    if encoder.note:
        print(f"tokenising with tokenizers, 10 to 50 times slower: {encoder.note}", file=sys.stderr)
    _check_space([*sources, *eval_sources], encoder, folder.parent)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "hash": tokenizer_hash(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "options": options,
        "seed": request.seed,
        "key": key,
    }

    # Of this host alone: another one may be at work on the same shared disk.
    temporary = folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        training, held_out = _tokenise(request, sources, eval_sources, encoder, temporary, turn)
        if held_out:
            tokenizer.save_pretrained(temporary / EVAL_FOLDER / TOKENIZER_FOLDER)
            _write_manifest(temporary / EVAL_FOLDER, facts, held_out)
        tokenizer.save_pretrained(temporary / TOKENIZER_FOLDER)
        _write_manifest(temporary, facts, training)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _report(folder, training, held_out, encoder.engine)


def _tokenise(
    request: PrepareRequest,
    sources: list[Source],
    eval_sources: list[Source],
    encoder: Encoder,
    folder: Path,
    turn: Turn,
) -> tuple[Facts, Facts]:
    """Write the token files of both sides; returns their facts per source."""
    eval_folder = folder / EVAL_FOLDER
    eval_folder.mkdir(parents=True)
    build_with = partial(
        build,
        encoder=encoder,
        skip_bad_lines=request.skip_bad_lines,
        on_percent=lambda percent: turn.report(percent=percent),
    )
    if eval_sources:
        held_out = build_with(eval_sources, eval_folder, keep_hashes=True)
        built = build_with(sources, folder, excluded=held_out.hashes)
        if not built.kept:
            raise UserError(
                f"no document is left to train on: {built.excluded} of -d are in --eval_data too."
            )
        return built.kept, held_out.kept
    if request.eval_ratio == 0:
        built = build_with(sources, folder)
    else:
        cut = max(1, int(request.eval_ratio * HASHES))
        built = build_with(sources, folder, eval_folder=eval_folder, cut=cut)
        mended = _mended_cut(built)
        if mended is not None:
            built = build_with(sources, folder, eval_folder=eval_folder, cut=mended)
    if not built.held_out:
        shutil.rmtree(eval_folder)
    if not built.kept:
        raise UserError("no document is left to train on: every text is empty.")
    return built.kept, built.held_out


def _mended_cut(built: Built) -> int | None:
    """Another cut if all documents fell on one side: one distinct text at least goes to each.

    Happens with few documents only, so a second pass costs little.
    """
    if built.num_documents == 0 or (built.kept and built.held_out):
        return None
    if built.lowest == built.highest:
        return 0 if built.held_out else None
    return built.highest if built.held_out else built.lowest + 1


def _head(source: Source, skip_bad_lines: bool) -> list[str]:
    """The first texts of a source, to prove the fast tokenizer on."""
    texts, characters = [], 0
    for text in TextFile(source.files[0], skip_bad_lines=skip_bad_lines):
        if text:
            texts.append(text[:_PROBE_CHARACTERS])
        characters += len(text)
        if characters >= _PROBE_CHARACTERS:
            break
    return texts


def _check_space(sources: list[Source], encoder: Encoder, folder: Path) -> None:
    text_bytes = sum(
        path.stat().st_size * _EXPANSION.get(path.suffix.lower(), 1.0)
        for source in sources
        for path in source.files
    )
    needed = text_bytes / encoder.bytes_per_token * encoder.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free; the tokens of {text_bytes / 2**30:.1f} GiB "
            f"of text need about {needed / 2**30:.1f} GiB. Free space, or choose another disk with "
            "--cache_dir or --output."
        )


def _write_manifest(folder: Path, facts: dict[str, Any], sources: Facts) -> None:
    totals = {
        name: sum(source[name] for source in sources.values())
        for name in ("documents", "tokens", "bytes")
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump({**facts, **totals, "sources": sources}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        # On a shared disk without locks another node may have been first; its folder is as good.
        if not is_prepared(folder):
            raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _report(folder: Path, training: Facts, held_out: Facts, engine: str) -> None:
    def total(facts: Facts, name: str) -> int:
        return sum(source[name] for source in facts.values())

    print(
        f"prepared {folder} with {engine}: {len(training)} sources, "
        f"{total(training, 'documents'):,} documents, {total(training, 'tokens'):,} tokens; "
        f"{total(held_out, 'documents'):,} documents, {total(held_out, 'tokens'):,} tokens "
        "held out for evaluation",
        file=sys.stderr,
    )
    for facts in training.values():
        for file in facts["files"]:
            if file["bad_lines"]:
                print(f"{file['name']}: {file['bad_lines']} bad lines left out", file=sys.stderr)

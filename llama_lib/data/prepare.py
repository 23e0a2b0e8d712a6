"""Prepare text for training: one process per node tokenises, the others wait for the result.

Invariant: a prepared dataset appears whole, under its final name, or not at all; the same input,
tokenizer and options give the same folder, which is prepared once and opened ever after.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_lib.data.assemble import assemble
from llama_lib.data.once import once
from llama_lib.data.prepared import (
    MANIFEST,
    VERSION,
    PreparedDataset,
    check_tokenizer,
    is_prepared,
)
from llama_lib.data.sources import Source, resolve
from llama_lib.data.tokenizer import (
    DEFAULT_CACHE_DIR,
    check_vocabulary,
    load_tokenizer,
    tokenizer_hash,
)
from llama_lib.errors import UserError

_MIB = 1 << 20


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare, and for which model; names and defaults as the options of pretrain.py.

    `tokenizer` is a folder, a hub id or `sample`; None takes the one of a prepared dataset or of
    the sample. `output` replaces the cache. `vocab_size` is the model's, checked if given.
    """

    datasets: Sequence[str]
    tokenizer: str | None = None
    eval_data: Sequence[str] = ()
    eval_ratio: float = 0.005
    cache_dir: str | Path = DEFAULT_CACHE_DIR
    output: str | Path | None = None
    seed: int = 42
    workers: int = 0
    skip_bad_lines: bool = False
    add_bos: bool = False
    vocab_size: int | None = None


def prepare(request: PrepareRequest) -> PreparedDataset:
    """The prepared dataset of a request: opened if it exists, else made first.

    Needs no process group and may be called by every process of a node at once. `held_out` of
    the result is the evaluation text. Raises UserError with all problems of the request.
    """
    _check(request)
    prepared = [name for name in request.datasets if is_prepared(name)]
    if prepared:
        if len(request.datasets) > 1:
            raise UserError(
                f"{prepared[0]} is a prepared dataset and has to be the only one given; got "
                f"{len(request.datasets)}. Prepare the texts together: "
                "python -m llama_lib prepare -d A B --output DIR"
            )
        return _open_prepared(request, prepared[0])

    cache_dir = Path(request.cache_dir).expanduser()
    _make_folder(cache_dir, "--cache_dir")
    name = request.tokenizer or ("sample" if list(request.datasets) == ["sample"] else None)
    if name is None:
        raise UserError("no tokenizer is given: pass a folder, a hub id or `sample`: --tokenizer.")
    tokenizer = load_tokenizer(name, cache_dir)
    if request.vocab_size is not None and (
        problems := check_vocabulary(tokenizer, request.vocab_size)
    ):
        raise UserError(problems)

    eval_prepared = [path for path in request.eval_data if is_prepared(path)]
    texts = [] if eval_prepared else list(request.eval_data)
    sources, eval_sources = _resolve_once(list(request.datasets), texts, cache_dir)
    options = {
        "eval_ratio": 0.0 if request.eval_data else request.eval_ratio,
        "eval_data": [source.name for source in eval_sources],
        "add_bos": request.add_bos,
        "skip_bad_lines": request.skip_bad_lines,
    }
    key = _key(options, sources, eval_sources, tokenizer_hash(tokenizer))
    if request.output is None:
        folder = cache_dir / "prepared" / key[:32]
    else:
        folder = Path(request.output).expanduser().resolve()
        _check_output(folder, key)
    _make_folder(folder.parent, "--output" if request.output else "--cache_dir")
    with once(cache_dir, str(folder), "tokenisation") as turn:
        if "failed" in turn.before:
            raise UserError(turn.before["failed"])
        if not is_prepared(folder):
            try:
                assemble(request, options, sources, eval_sources, tokenizer, key, folder, turn)
            except UserError as error:
                turn.report(failed=error.problems)
                raise
    dataset = PreparedDataset.open(folder)
    return _with_eval_data(dataset, request) if eval_prepared else dataset


def _check(request: PrepareRequest) -> None:
    problems = []
    if not request.datasets:
        problems.append("no dataset is given: pass one with -d.")
    if not 0 <= request.eval_ratio < 1:
        problems.append(f"--eval_ratio {request.eval_ratio} is not a share: expected 0 <= r < 1.")
    if request.workers < 0:
        problems.append(f"--workers {request.workers} is negative; 0 means all cores.")
    if problems:
        raise UserError(problems)


def _open_prepared(request: PrepareRequest, path: str) -> PreparedDataset:
    dataset = PreparedDataset.open(path)
    problems = []
    if request.output is not None:
        problems.append(f"{path} is prepared already: --output has nothing to do.")
    if request.tokenizer is not None:
        given = tokenizer_hash(load_tokenizer(request.tokenizer, request.cache_dir))
        problems += check_tokenizer(dataset, given)
    if request.vocab_size is not None and dataset.vocab_size > request.vocab_size:
        problems.append(
            f"{path} was prepared with a tokenizer of {dataset.vocab_size} ids, the model's "
            f"vocab_size is {request.vocab_size}: ids >= {request.vocab_size} have no embedding. "
            "Prepare the text with the model's own tokenizer, or choose another --config."
        )
    if problems:
        raise UserError(problems)
    return _with_eval_data(dataset, request) if request.eval_data else dataset


def _with_eval_data(dataset: PreparedDataset, request: PrepareRequest) -> PreparedDataset:
    """The dataset with --eval_data as its held-out text, prepared with the same tokenizer."""
    held_out = prepare(
        replace(
            request,
            datasets=request.eval_data,
            eval_data=(),
            eval_ratio=0.0,
            output=None,
            tokenizer=str(dataset.tokenizer_path),
        )
    )
    return replace(dataset, held_out=held_out)


def _resolve_once(
    datasets: list[str], eval_data: list[str], cache_dir: Path
) -> tuple[list[Source], list[Source]]:
    """Sources of both; one process downloads, those that waited for it take its answer."""
    key = json.dumps(["resolve", datasets, eval_data, os.getcwd()])
    with once(cache_dir, key, "the download of the data") as turn:
        if "failed" in turn.before:
            raise UserError(turn.before["failed"])
        if "sources" not in turn.before:
            try:
                found = [resolve(datasets, cache_dir)]
                found.append(resolve(eval_data, cache_dir) if eval_data else [])
            except UserError as error:
                turn.report(failed=error.problems)
                raise
            turn.before["sources"] = [
                [(source.name, [str(path) for path in source.files]) for source in sources]
                for sources in found
            ]
            turn.report(**turn.before)
        training, held_out = (
            [Source(name, tuple(map(Path, files))) for name, files in sources]
            for sources in turn.before["sources"]
        )
        return training, held_out


def _key(
    options: dict[str, Any], sources: list[Source], eval_sources: list[Source], tokenizer: str
) -> str:
    content = {
        "version": VERSION,
        "tokenizer": tokenizer,
        "options": options,
        "sources": [[s.name, [_file_key(f) for f in s.files]] for s in sources],
        "eval": [[s.name, [_file_key(f) for f in s.files]] for s in eval_sources],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_key(path: Path) -> list[Any]:
    """Path, size, mtime and a hash of the first and last MiB: cheap for any size of file."""
    facts = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_MIB))
        file.seek(max(0, facts.st_size - _MIB))
        digest.update(file.read(_MIB))
    return [str(path), facts.st_size, facts.st_mtime_ns, digest.hexdigest()]


def _check_output(folder: Path, key: str) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_prepared(folder):
        raise UserError(f"{folder} exists and is not empty: choose another --output.")
    if json.loads((folder / MANIFEST).read_text()).get("key") != key:
        raise UserError(
            f"{folder} holds a dataset prepared from other text, tokenizer or options: choose "
            "another --output or delete it."
        )


def _make_folder(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose {flag}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"no permission to write in {folder}: choose another {flag}.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib prepare", description="Tokenise text into a prepared dataset."
    )
    add = parser.add_argument
    add(
        "-d", "--dataset", nargs="+", required=True, help="files, folders, globs, hub names, sample"
    )
    add("--tokenizer", help="folder, hub id or `sample` (the default for -d sample)")
    add("--output", required=True, help="folder to write")
    add("--eval_data", nargs="+", default=[], help="held-out text, never trained on")
    add("--eval_ratio", type=float, default=0.005, help="share of documents held out (0.005)")
    add("--workers", type=int, default=0, help="threads that tokenise (0: all cores)")
    add("--skip_bad_lines", action="store_true", help="drop and count bad lines")
    add("--add_bos", action="store_true", help="begin each document with the BOS token")
    add("--seed", type=int, default=42, help="recorded in the manifest (42)")
    add("--cache_dir", default=DEFAULT_CACHE_DIR, help="locks, the sample and its tokenizer")
    arguments = vars(parser.parse_args(argv))
    dataset = prepare(PrepareRequest(datasets=arguments.pop("dataset"), **arguments))
    print(dataset.path)
    return 0

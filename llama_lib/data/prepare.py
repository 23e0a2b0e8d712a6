"""Prepare text for training: one process per node tokenises, the others wait for the result.

Invariant: a prepared dataset appears whole, under its final name, or not at all; the same input,
tokenizer and options give the same folder, which is prepared once and opened ever after.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_lib.data.build import Plan, build
from llama_lib.data.entries import Entry
from llama_lib.data.join import joined, subset
from llama_lib.data.mixture import MIXTURES, load_mixture
from llama_lib.data.once import failure_reported, once, raise_failure
from llama_lib.data.opening import is_tokenised, needs_tokenizer, open_tokens
from llama_lib.data.prepare_checks import check, check_command
from llama_lib.data.prepared import (
    MANIFEST,
    VERSION,
    PreparedDataset,
    check_tokenizer,
    is_prepared,
)
from llama_lib.data.sources import Source, is_on_hub, resolve
from llama_lib.data.tokenizer import (
    DEFAULT_CACHE_DIR,
    adds_bos,
    check_vocabulary,
    load_tokenizer,
    tokenizer_hash,
)
from llama_lib.data.work_folder import alone_at
from llama_lib.errors import RunError, UserError
from llama_lib.private import open_folders

_MIB = 1 << 20


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare, and for which model; names and defaults as the options of pretrain.py.

    `datasets` are words of -d: `name[N]:weight`. `tokenizer` is a folder, a hub id or `sample`;
    None takes the one of a prepared dataset or of the sample. `output` replaces the cache.
    `vocab_size` is the model's, checked if given. `workers` are processes, 0 for one per core.
    `add_bos` None: documents begin with BOS if the tokenizer puts it in front of a text.
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
    add_bos: bool | None = None
    vocab_size: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    dedup: bool = False
    num_token: Sequence[str] = ()
    mixture: str | None = None


def prepare(request: PrepareRequest) -> PreparedDataset:
    """The prepared dataset of a request: opened if it exists, else made first.

    Needs no process group and may be called by every process of a node at once. `held_out` of
    the result is the evaluation text. Raises UserError with all problems of the request.
    """
    entries = check(request)
    ready = {n: entry for n, entry in enumerate(entries) if is_tokenised(entry.name)}
    texts = {n: entry for n, entry in enumerate(entries) if n not in ready}
    tokens = [name for name in request.eval_data if is_tokenised(name)]
    if tokens and texts:
        print(
            f"warning: --eval_data {', '.join(tokens)} holds tokens: text of -d that stands there "
            "too is not found and not left out",
            file=sys.stderr,
        )
    if not ready:
        dataset = _prepare_texts(request, entries)
        names = dataset.sources_of_entry
    else:
        dataset, names = _open_ready(request, ready, texts)
    if tokens or (ready and request.eval_data):
        dataset = _with_eval_data(dataset, request)
    if entries[0].weight is None:
        return dataset
    empty = [entry.text for n, entry in enumerate(entries) if not names.get(n)]
    if empty:
        raise UserError(f"-d {', '.join(empty)}: no document is left to give a weight to.")
    weights = tuple((entry.weight or 0.0, names[n]) for n, entry in enumerate(entries))
    return replace(dataset, weights=weights)


def _prepare_texts(request: PrepareRequest, entries: Sequence[Entry]) -> PreparedDataset:
    """The dataset of text alone, from the cache or made."""
    cache_dir = Path(request.cache_dir).expanduser()
    make_folder(cache_dir, "--cache_dir")
    datasets = [entry.name for entry in entries]
    name = request.tokenizer or ("sample" if datasets == ["sample"] else None)
    if name is None:
        raise UserError("no tokenizer is given: pass a folder, a hub id or `sample`: --tokenizer.")
    tokenizer = load_tokenizer(name, cache_dir)
    if request.add_bos is None:
        request = replace(request, add_bos=adds_bos(tokenizer))
    if request.vocab_size is not None and (
        problems := check_vocabulary(tokenizer, request.vocab_size)
    ):
        raise UserError(problems)

    texts = [name for name in request.eval_data if not is_tokenised(name)]
    apart = any(entry.limit is not None or entry.weight is not None for entry in entries)
    sources, eval_sources = _resolve_once(datasets, texts, cache_dir, apart)
    limits = {n: entry.limit for n, entry in enumerate(entries) if entry.limit is not None}
    options = _options(request, eval_sources, limits)
    digest = tokenizer_hash(tokenizer)
    files = _files_key(sources, eval_sources, digest)
    key = _hash({**files, "options": options})
    text_options = {name: options[name] for name in ("add_bos", "skip_bad_lines")}
    text_key = _hash({**files, "options": text_options})
    if request.output is None:
        folder = cache_dir / "prepared" / key[:32]
    else:
        folder = Path(request.output).expanduser().resolve()
        _check_output(folder, key)
    make_folder(folder.parent, "--output" if request.output else "--cache_dir")
    plan = Plan(request, options, sources, eval_sources, limits, digest, key, text_key)
    with once(cache_dir, str(folder), "tokenisation") as turn:
        raise_failure(turn)
        if not is_prepared(folder):
            # Those with another --cache_dir, or on another host, take turns by a lock of their own.
            with failure_reported(turn), alone_at(folder):
                if request.output is not None:
                    _check_output(folder, key)
                if not is_prepared(folder):
                    build(plan, tokenizer, folder, turn)
    return PreparedDataset.open(folder)


def _options(
    request: PrepareRequest, eval_sources: Sequence[Source], limits: Mapping[int, int]
) -> dict[str, Any]:
    """What decides the result besides the text and the tokenizer."""
    options = {
        "eval_ratio": 0.0 if request.eval_data else request.eval_ratio,
        "eval_data": [source.name for source in eval_sources],
        "add_bos": request.add_bos,
        "skip_bad_lines": request.skip_bad_lines,
        "min_length": request.min_length,
        "max_length": request.max_length,
        "dedup": request.dedup,
    }
    if limits:
        options["limits"] = {str(entry): limit for entry, limit in limits.items()}
    if request.num_token:
        options["num_token"] = list(request.num_token)
        options["mixture"] = load_mixture(request.mixture) if request.mixture else None
    if limits or request.num_token:
        # Only here does the seed decide what is in the files.
        options["drawn_with_seed"] = request.seed
    return options


def _open_ready(
    request: PrepareRequest, ready: Mapping[int, Entry], texts: Mapping[int, Entry]
) -> tuple[PreparedDataset, dict[int, tuple[str, ...]]]:
    """Tokens that are there already, and text prepared with their tokenizer, as one dataset.

    Also the names of the sources of each entry.
    """
    problems = []
    if request.output is not None:
        problems.append(
            f"{ready[min(ready)].name} is prepared already: --output has nothing to do."
        )
    if request.num_token and not texts:
        problems.append("--num_token takes text: what is prepared already stays as it is.")
    tokenizer = request.tokenizer
    if tokenizer is None:
        own = [entry.name for entry in ready.values() if not needs_tokenizer(entry.name)]
        if own:
            tokenizer = str(open_tokens(own[0], None, request.cache_dir).tokenizer_path)
        else:
            problems.append(
                f"{ready[min(ready)].name} has no tokenizer beside it: pass the one that made it, "
                "a folder or a hub id: --tokenizer."
            )
    if problems:
        raise UserError(problems)
    opened: dict[int, PreparedDataset] = {}
    taken: dict[tuple[Path, str], str] = {}
    for number, entry in ready.items():
        dataset = open_tokens(entry.name, tokenizer, request.cache_dir)
        problems += _problems(request, entry.name, dataset)
        opened[number] = dataset
        places = [(dataset.path.resolve(), name) for name in dataset.sources]
        if twice := {taken[place] for place in places if place in taken}:
            problems.append(
                f"-d {', '.join(sorted(twice))} and -d {entry.text} name the same data: name it "
                "once."
            )
        taken |= dict.fromkeys(places, entry.text)
    if problems:
        raise UserError(problems)
    for number, entry in ready.items():
        if entry.limit is not None:
            opened[number] = subset(opened[number], entry.limit, request.seed)
    datasets: list[PreparedDataset] = []
    numbers: list[dict[int, int]] = []
    for number in sorted([*ready, *list(texts)[:1]]):
        if number in opened:
            datasets.append(opened[number])
            numbers.append(dict.fromkeys(opened[number].sources_of_entry, number))
        else:
            # All text together, so that a text that comes twice is held out or left out once.
            plain = replace(request, tokenizer=tokenizer, output=None)
            datasets.append(_prepare_texts(plain, list(texts.values())))
            numbers.append(dict(enumerate(texts)))
    whole = datasets[0] if len(datasets) == 1 else joined(datasets, numbers)
    if len(datasets) == 1:
        names = {min(ready): tuple(whole.sources)}
    else:
        names = whole.sources_of_entry
    return whole, names


def _problems(request: PrepareRequest, name: str, dataset: PreparedDataset) -> list[str]:
    problems = []
    if request.tokenizer is not None and not needs_tokenizer(name):
        given = tokenizer_hash(load_tokenizer(request.tokenizer, request.cache_dir))
        problems += check_tokenizer(dataset, given)
    if request.vocab_size is not None and dataset.vocab_size > request.vocab_size:
        problems.append(
            f"{name} was prepared with a tokenizer of {dataset.vocab_size} ids, the model's "
            f"vocab_size is {request.vocab_size}: ids >= {request.vocab_size} have no embedding. "
            "Prepare the text with the model's own tokenizer, or choose another --config."
        )
    return problems


def _with_eval_data(dataset: PreparedDataset, request: PrepareRequest) -> PreparedDataset:
    """The dataset with --eval_data as its held-out text, prepared with the same tokenizer."""
    held_out = prepare(
        PrepareRequest(
            request.eval_data,
            tokenizer=str(dataset.tokenizer_path),
            eval_ratio=0.0,
            cache_dir=request.cache_dir,
            workers=request.workers,
            skip_bad_lines=request.skip_bad_lines,
            add_bos=request.add_bos,
            vocab_size=request.vocab_size,
        )
    )
    return replace(dataset, held_out=held_out)


def _resolve_once(
    datasets: list[str], eval_data: list[str], cache_dir: Path, entries_apart: bool
) -> tuple[list[Source], list[Source]]:
    """Sources of both; one process downloads, those that waited for it take its answer."""
    key = json.dumps(["resolve", datasets, eval_data, os.getcwd(), entries_apart])
    work = "another process, which looks through the data"
    if any(map(is_on_hub, [*datasets, *eval_data])):
        work = "the download of the data"
    with once(cache_dir, key, work) as turn:
        raise_failure(turn)
        if "sources" not in turn.before:
            with failure_reported(turn):
                found = [resolve(datasets, cache_dir, entries_apart)]
                found.append(resolve(eval_data, cache_dir) if eval_data else [])
            turn.before["sources"] = [
                [(s.name, [str(path) for path in s.files], s.entry) for s in sources]
                for sources in found
            ]
            turn.report(**turn.before)
        training, held_out = (
            [Source(name, tuple(map(Path, files)), entry) for name, files, entry in sources]
            for sources in turn.before["sources"]
        )
        return training, held_out


def _files_key(sources: list[Source], eval_sources: list[Source], tokenizer: str) -> dict[str, Any]:
    return {
        "version": VERSION,
        "tokenizer": tokenizer,
        "sources": [[s.name, s.entry, [file_key(f) for f in s.files]] for s in sources],
        "eval": [[s.name, [file_key(f) for f in s.files]] for s in eval_sources],
    }


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_key(path: Path) -> list[Any]:
    """Path, size, mtime and a hash of the first and last MiB: what names a file of any size."""
    try:
        facts = path.stat()
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_MIB))
            file.seek(max(0, facts.st_size - _MIB))
            digest.update(file.read(_MIB))
    except (PermissionError, FileNotFoundError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}.") from error
    return [str(path), facts.st_size, facts.st_mtime_ns, digest.hexdigest()]


def _check_output(folder: Path, key: str) -> None:
    """That the dataset in --output, if there is one, is the one asked for."""
    if is_prepared(folder) and json.loads((folder / MANIFEST).read_text()).get("key") != key:
        raise UserError(
            f"{folder} holds a dataset prepared from other text, tokenizer or options: choose "
            "another --output or delete it."
        )


def make_folder(folder: Path, flag: str) -> None:
    """A folder to write in; UserError names the option that chooses another."""
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
        "-d",
        "--dataset",
        nargs="+",
        required=True,
        metavar="NAME[N]",
        help="files, folders, globs, hub names, sample; at most N documents, drawn at random",
    )
    add("--tokenizer", help="folder, hub id or `sample` (the default for -d sample)")
    add("--output", required=True, help="folder to write")
    add("--eval_data", nargs="+", default=[], help="held-out text, never trained on")
    add("--eval_ratio", type=float, default=0.005, help="share of documents held out (0.005)")
    add("--workers", type=int, default=0, help="processes that tokenise (0: one per core)")
    add("--skip_bad_lines", action="store_true", help="drop and count bad lines")
    add(
        "--add_bos",
        action=argparse.BooleanOptionalAction,
        help="begin each document with BOS (untyped: if the tokenizer puts it before a text)",
    )
    add("--min_length", type=int, help="leave out documents of fewer tokens, ends included")
    add("--max_length", type=int, help="leave out documents of more tokens, ends included")
    add("--dedup", action="store_true", help="keep only the first of equal texts")
    add(
        "--num_token",
        nargs="+",
        default=[],
        metavar="LENGTH:NUMBER",
        help="cut rows of these lengths until so many tokens: 8192:1.8b 16384:200m",
    )
    add("--mixture", help=f"percent per source for --num_token: {', '.join(MIXTURES)}, or a file")
    add("--seed", type=int, default=42, help="draws the documents of [N] and the row lengths (42)")
    add("--cache_dir", default=DEFAULT_CACHE_DIR, help="locks, the sample and its tokenizer")
    arguments = vars(parser.parse_args(argv))
    request = PrepareRequest(datasets=arguments.pop("dataset"), **arguments)
    check_command(request)
    if "transformers" not in sys.modules:
        # Only a tokenizer is loaded here: without torch that takes 0.7 s and 80 MB instead of 1.9 s
        # and 260 MB (measured). The advice is that no model can be loaded then.
        os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    folders = {"--output": request.output or "", "--cache_dir": request.cache_dir}
    for line in open_folders(folders):
        print(line, file=sys.stderr)
    dataset = prepare(request)
    print(dataset.path)
    return 0

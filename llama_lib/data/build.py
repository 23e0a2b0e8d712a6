"""Make the folder of a prepared dataset: tokenise into a work folder, assemble there, rename.

Invariant: the manifest is written last and the folder is renamed after everything is on the disk,
so what carries the final name is whole; a killed attempt is continued by the next.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_lib.data.assemble import Facts, assemble
from llama_lib.data.budget import Budget
from llama_lib.data.estimate import check_space, probes, text_bytes
from llama_lib.data.fates import HASHES, Fates, Rules
from llama_lib.data.indexed import token_dtype
from llama_lib.data.mixture import entry_of, load_mixture
from llama_lib.data.once import Turn
from llama_lib.data.prepared import (
    EVAL_FOLDER,
    FORMAT,
    MANIFEST,
    TOKENIZER_FOLDER,
    VERSION,
    is_prepared,
)
from llama_lib.data.progress import Progress
from llama_lib.data.sources import Source
from llama_lib.data.tokenise import Proof, prove
from llama_lib.data.tokenised import DOCUMENT, Tokenised, documents_path, tokenise
from llama_lib.data.tokenizer import vocabulary_size
from llama_lib.data.work_folder import remove_others, work_folder
from llama_lib.errors import RunError, UserError

if TYPE_CHECKING:
    from llama_lib.data.prepare import PrepareRequest

# Percent of the time that tokenising takes; putting together reads and writes only. Chosen.
_FIRST_STAGE = 90


class _Refused(UserError):
    """Options that the text does not go with; with others what is tokenised is of use."""


@dataclass(frozen=True)
class Plan:
    """What to make: sources, options as they go into the manifest, and the key of it all.

    `limits` are documents per entry of -d. `text_key` is of all that decides the parts of the
    first stage.
    """

    request: PrepareRequest
    options: dict[str, Any]
    sources: Sequence[Source]
    eval_sources: Sequence[Source]
    limits: dict[int, int]
    tokenizer_hash: str
    key: str
    text_key: str


def build(plan: Plan, tokenizer: Any, folder: Path, turn: Turn) -> None:
    """Make `folder`; the work folder beside it stays if this process is killed on the way."""
    request = plan.request
    sizes = text_bytes([*plan.sources, *plan.eval_sources], request.skip_bad_lines)
    budget = _budget(plan, {source.name: sizes[source.name] for source in plan.sources})
    if budget:
        # What the mixture does not ask for need not be read.
        percents = load_mixture(request.mixture or "")
        wanted = [s for s in plan.sources if percents.get(entry_of(s.name, percents) or "")]
        plan = replace(plan, sources=wanted)
    every = [*plan.sources, *plan.eval_sources]
    proof = prove(tokenizer, request.add_bos, probes(every, request.skip_bad_lines))
    if proof.note:
        print(f"tokenising with tokenizers, 10 to 50 times slower: {proof.note}", file=sys.stderr)
    if budget:
        for line in budget.expected(proof.bytes_per_token):
            print(line, file=sys.stderr)
    work = work_folder(folder, plan.text_key)
    remove_others(folder, work)
    check_space(
        sum(sizes[source.name] for source in every),
        proof.bytes_per_token,
        token_dtype(proof.recipe.vocab_size).itemsize,
        work,
        "--output" if request.output else "--cache_dir",
    )
    try:
        training, held_out = _make(plan, proof, tokenizer, work, turn)
    except _Refused:
        raise
    except UserError:
        # The text has to change, and then none of this is of use.
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk of {work} is full. Free space and"
        else:
            reason = f"{error}. Mend it and"
        raise RunError(f"{reason} start again: what is tokenised is kept.") from error
    publish(work / "result", folder)
    shutil.rmtree(work, ignore_errors=True)
    _report(folder, training, held_out, proof.recipe.engine)


def _make(
    plan: Plan, proof: Proof, tokenizer: Any, work: Path, turn: Turn
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both stages; a refusal of the second keeps what other options can still use."""
    request = plan.request
    every = tokenise(
        [*plan.sources, *plan.eval_sources],
        work,
        proof.recipe,
        workers=request.workers or len(os.sched_getaffinity(0)),
        skip_bad_lines=request.skip_bad_lines,
        on_percent=lambda percent: turn.report(percent=percent * _FIRST_STAGE // 100),
    )
    try:
        return _assemble(plan, proof, tokenizer, work, every, turn)
    except UserError as error:
        if request.output is None:
            raise  # with other options the cache makes another folder
        shutil.rmtree(work / "result", ignore_errors=True)
        raise _Refused(
            [*error.problems, f"What is tokenised is kept in {work} for other options."]
        ) from error


def _assemble(
    plan: Plan,
    proof: Proof,
    tokenizer: Any,
    work: Path,
    every: Sequence[Tokenised],
    turn: Turn,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write everything into `work/result`, the manifests last; returns them."""
    request = plan.request
    sources, eval_sources = every[: len(plan.sources)], every[len(plan.sources) :]
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    (result / EVAL_FOLDER).mkdir(parents=True)
    dtype = token_dtype(proof.recipe.vocab_size)
    progress = Progress(
        "assembling",
        sum(s.total("tokens") for s in every) * dtype.itemsize,
        lambda percent: turn.report(percent=_FIRST_STAGE + percent * (100 - _FIRST_STAGE) // 100),
    )

    def written(part: Any) -> None:
        progress.show(part.number, part.tokens * dtype.itemsize)

    eval_facts: Facts = {}
    rules = Rules(
        min_length=request.min_length,
        max_length=request.max_length,
        dedup=request.dedup,
        limits=plan.limits,
        seed=request.seed,
    )
    if eval_sources:
        fates = Fates(eval_sources, work, Rules())
        eval_facts, _ = assemble(
            eval_sources, fates, work, result / EVAL_FOLDER, None, dtype, on_part=written
        )
        rules = replace(rules, excluded=_hashes(eval_sources, work))
    elif ratio := plan.options["eval_ratio"]:
        rules = replace(rules, cut=max(1, int(ratio * HASHES)))
    fates = Fates(sources, work, rules)
    if not fates.num_kept:
        raise UserError(_nothing_left(fates, sources))
    trained = {s.source.name: fates.trained_tokens(s) for s in sources}
    budget = _budget(plan, trained)
    if budget and not budget.makes_a_row(trained):
        raise UserError(["no row could be made.", *budget.shortfall()])
    training, held_out = assemble(
        sources,
        fates,
        work,
        result,
        None if eval_sources else result / EVAL_FOLDER,
        dtype,
        budget,
        on_part=written,
    )
    progress.close()
    if not training:
        raise UserError(["no row could be made.", *(budget.shortfall() if budget else ())])
    facts = _facts(plan, tokenizer)
    held_out = eval_facts or held_out
    if held_out:
        tokenizer.save_pretrained(result / EVAL_FOLDER / TOKENIZER_FOLDER)
        eval_manifest = _write_manifest(result / EVAL_FOLDER, facts, held_out)
    else:
        eval_manifest = {}
        shutil.rmtree(result / EVAL_FOLDER)
    if budget:
        facts["budget"] = budget.facts()
        for line in budget.shortfall():
            print(line, file=sys.stderr)
    facts["left_out"] = _left_out(fates, sources)
    tokenizer.save_pretrained(result / TOKENIZER_FOLDER)
    return _write_manifest(result, facts, training), eval_manifest


def _budget(plan: Plan, sizes: Mapping[str, float]) -> Budget | None:
    request = plan.request
    if not request.num_token:
        return None
    return Budget(request.num_token, request.mixture, sizes, request.seed)


def _hashes(sources: Sequence[Tokenised], work: Path) -> np.ndarray:
    """Hashes of all texts of these sources, sorted."""
    found = [
        np.fromfile(documents_path(work, part.number), DOCUMENT)["hash"]
        for source in sources
        for part in source.parts
    ]
    return np.unique(np.concatenate(found))


def _left_out(fates: Fates, sources: Sequence[Tokenised]) -> dict[str, int]:
    totals = {name: sum(s.total(name) for s in sources) for name in ("bad_lines", "empty_texts")}
    for source in sources:
        for reason, count in fates.left_out(source).items():
            totals[reason] = totals.get(reason, 0) + count
    return totals


def _nothing_left(fates: Fates, sources: Sequence[Tokenised]) -> str:
    counts = _left_out(fates, sources)
    reasons = {
        "empty_texts": "are empty",
        "too_short": "are shorter than --min_length",
        "too_long": "are longer than --max_length",
        "in_eval_data": "of -d are in --eval_data too",
    }
    if {name for name, count in counts.items() if count} <= {"bad_lines", "empty_texts"}:
        return "no document is left to train on: every text is empty."
    found = [f"{counts[name]} {text}" for name, text in reasons.items() if counts[name]]
    return f"no document is left to train on: {', '.join(found)}."


def _facts(plan: Plan, tokenizer: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "hash": plan.tokenizer_hash,
            "vocab_size": vocabulary_size(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "options": plan.options,
        "seed": plan.request.seed,
        "key": plan.key,
    }


def _write_manifest(folder: Path, facts: dict[str, Any], sources: Facts) -> dict[str, Any]:
    totals = {
        name: sum(source[name] for source in sources.values())
        for name in ("documents", "tokens", "bytes")
    }
    manifest = {**facts, **totals, "sources": sources}
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    return manifest


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its final name."""
    try:
        temporary.rename(folder)
    except OSError as error:
        # On a shared disk without locks another node may have been first; its folder is as good.
        if not is_prepared(folder):
            raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """What was created or renamed in it is on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _report(folder: Path, training: dict[str, Any], held_out: dict[str, Any], engine: str) -> None:
    print(
        f"prepared {folder} with {engine}: {len(training['sources'])} sources, "
        f"{training['documents']:,} documents, {training['tokens']:,} tokens; "
        f"{held_out.get('documents', 0):,} documents, {held_out.get('tokens', 0):,} tokens "
        "held out for evaluation",
        file=sys.stderr,
    )
    left_out = [
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in training["left_out"].items()
        if count
    ]
    if left_out:
        print(f"left out: {', '.join(left_out)}", file=sys.stderr)
    for facts in training["sources"].values():
        for file in facts["files"]:
            if file["bad_lines"]:
                print(f"{file['name']}: {file['bad_lines']} bad lines left out", file=sys.stderr)

"""What can be refused of a request to prepare before any data is looked at.

Invariant: all problems are told in one message.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lib.data.budget import parse_budgets
from llama_lib.data.entries import Entry, parse_entries
from llama_lib.data.mixture import MIXTURES, load_mixture
from llama_lib.data.opening import is_tokenised
from llama_lib.data.prepared import is_prepared
from llama_lib.errors import UserError

if TYPE_CHECKING:
    from llama_lib.data.prepare import PrepareRequest


def check(request: PrepareRequest) -> list[Entry]:
    """The words of -d; raises UserError with all problems that can be seen without the data."""
    problems = []
    entries: list[Entry] = []
    try:
        entries = parse_entries(request.datasets)
        for entry in parse_entries(request.eval_data):
            if entry.limit is not None or entry.weight is not None:
                problems.append(f"--eval_data {entry.text}: takes no [N] and no :weight.")
    except UserError as error:
        problems += error.problems
    if not request.datasets:
        problems.append("no dataset is given: pass one with -d.")
    if not 0 <= request.eval_ratio < 1:
        problems.append(f"--eval_ratio {request.eval_ratio} is not a share: expected 0 <= r < 1.")
    if request.workers < 0:
        problems.append(f"--workers {request.workers} is negative; 0 means all cores.")
    shortest, longest = request.min_length, request.max_length
    for flag, value in (("--min_length", shortest), ("--max_length", longest)):
        if value is not None and value < 1:
            problems.append(f"{flag} {value} is no number of tokens: expected 1 or more.")
    if shortest is not None and longest is not None and shortest > longest:
        problems.append(f"--min_length {shortest} is above --max_length {longest}.")
    if not 0 <= request.seed < 1 << 32:
        problems.append(f"--seed {request.seed}: expected 0 to {(1 << 32) - 1}.")
    problems += _output_problems(request)
    if request.mixture is not None:
        problems += _problems_of(load_mixture, request.mixture)
    if request.num_token:
        problems += _problems_of(parse_budgets, request.num_token)
        if request.mixture is None:
            problems.append(
                "--num_token needs --mixture, the percentage of each source: "
                f"{', '.join(MIXTURES)}, or a .json or .yaml file"
            )
        if any(entry.weight is not None for entry in entries):
            problems.append("--num_token and weights in -d both say how much of what: choose one.")
    elif request.mixture is not None:
        problems.append("--mixture needs --num_token, which it shares out: --num_token 8192:1.8b")
    if problems:
        raise UserError(problems)
    return entries


def check_command(request: PrepareRequest) -> None:
    """What a request may ask for but the command has no use for, with all other problems."""
    problems = []
    try:
        weighted = [e.text for e in parse_entries(request.datasets) if e.weight is not None]
    except UserError:
        weighted = []  # which the check of all requests tells
    if weighted:
        problems.append(
            f"-d {', '.join(weighted)}: weights are not part of what is prepared: they belong to "
            "pretrain.py -d, with one prepared folder, or one source of it, for each."
        )
    problems += _problems_of(check, request)
    if problems:
        raise UserError(problems)


def _problems_of(check: Callable[[Any], object], value: Any) -> list[str]:
    try:
        check(value)
    except UserError as error:
        return error.problems
    return []


def _output_problems(request: PrepareRequest) -> list[str]:
    """What is wrong with --output whatever the data is."""
    if request.output is None:
        return []
    problems = []
    folder = Path(request.output).expanduser()
    try:
        is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        if not is_free and not is_prepared(folder):
            problems.append(f"{folder} exists and is not empty: choose another --output.")
    except OSError as error:
        problems.append(f"{folder} cannot be read ({error.strerror}): choose another --output.")
    tokens = [name for name in request.eval_data if is_tokenised(name)]
    if tokens:
        problems.append(
            f"--eval_data {', '.join(tokens)} is prepared already and is not copied into --output: "
            "leave it out here and give it where the data is used: pretrain.py --eval_data "
            f"{' '.join(tokens)}"
        )
    return problems

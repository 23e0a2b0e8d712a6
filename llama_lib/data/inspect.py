"""Show what a prepared dataset holds: manifest, documents, rows and ways of packing; what a step of
a run was trained on; or what is trained on in conversations.

Invariant: what is shown comes from the files that training reads, which are never changed.
"""

import argparse
from collections.abc import Sequence

from llama_lib.data.arrange import arrange
from llama_lib.data.chat import show
from llama_lib.data.opening import is_tokenised, open_tokens
from llama_lib.data.order import Order
from llama_lib.data.packing_report import packing_report, packing_table
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.tokenizer import DEFAULT_CACHE_DIR, load_tokenizer
from llama_lib.errors import UserError

# Ways of pretrain.py.
_PACKINGS = ("concat", "best_fit")
_COLUMNS = "{:<32} {:>12} {:>16} {:>16} {:>12}"
# These are named by file.
_OF_FILES = ("bad_lines", "empty_texts")


def summary(dataset: PreparedDataset) -> str:
    """One line per source: documents, tokens, UTF-8 bytes of text, bytes per token."""
    lines = [_COLUMNS.format("source", "documents", "tokens", "bytes", "bytes/token")]
    parts = [("", dataset)]
    if dataset.held_out is not None:
        parts.append((" (held out)", dataset.held_out))
    for label, part in parts:
        for name, facts in part.manifest["sources"].items():
            lines.append(_row(name + label, facts))
        if len(part.readers) > 1:
            lines.append(_row("all" + label, part.manifest))
    tokenizer, options = dataset.manifest["tokenizer"], dataset.manifest["options"]
    lines.append(f"tokenizer: {tokenizer['vocab_size']} ids, hash {tokenizer['hash'][:16]}")
    lines.append("options: " + ", ".join(f"{key}={value}" for key, value in options.items()))
    for name, facts in dataset.manifest["sources"].items():
        for file in facts["files"]:
            if file["bad_lines"] or file["empty_texts"]:
                lines.append(
                    f"{name}, {file['name']}: left out {file['bad_lines']} bad lines, "
                    f"{file['empty_texts']} empty texts"
                )
        reasons = [
            f"{count:,} {reason.replace('_', ' ')}"
            for reason, count in facts.get("left_out", {}).items()
            if count and reason not in _OF_FILES
        ]
        if reasons:
            lines.append(f"{name}: left out {', '.join(reasons)}")
    lines += _budget_lines(dataset)
    lines.append(f"manifest hash {dataset.manifest_hash}")
    return "\n".join(lines)


def _row(name: str, facts: dict[str, int]) -> str:
    counts = [f"{facts[key]:,}" for key in ("documents", "tokens", "bytes")]
    if not facts["bytes"]:
        # Ready-made rows and Megatron's files: the text they were made of is not there.
        return _COLUMNS.format(name, *counts[:2], "-", "-")
    return _COLUMNS.format(name, *counts, f"{facts['bytes'] / max(facts['tokens'], 1):.2f}")


def _budget_lines(dataset: PreparedDataset) -> list[str]:
    """Rows that --num_token asked for and got."""
    return [
        f"rows of {length} tokens, {entry}: {rows['made']:,} of {rows['asked']:,}"
        for entry, by_length in dataset.manifest.get("budget", {}).get("rows", {}).items()
        for length, rows in by_length.items()
    ]


def document_text(dataset: PreparedDataset, document: int) -> str:
    """A document decoded by the tokenizer that is kept beside the ids, special tokens shown."""
    if not 0 <= document < dataset.num_documents:
        raise UserError(
            f"--document {document} does not exist: {dataset.path} has documents 0 to "
            f"{dataset.num_documents - 1}."
        )
    tokenizer = load_tokenizer(str(dataset.tokenizer_path))
    return tokenizer.decode(dataset.tokens(document).tolist())


def row_text(dataset: PreparedDataset, order: Order, sample: int) -> str:
    """A row in the order of training: each piece with its document, decoded."""
    if sample < 0:
        raise UserError(f"--row {sample} does not exist: rows count from 0.")
    pieces = order.row_documents(sample)
    filled = sum(piece.length for piece in pieces)
    lines = [
        f"row {sample} (epoch {order.epoch_of(sample)}): {filled} tokens in {len(pieces)} "
        f"piece(s), {order.max_length - filled} padding"
    ]
    tokenizer = load_tokenizer(str(dataset.tokenizer_path))
    for document, start, length in pieces:
        source, number = dataset.locate(document)
        lines += [
            f"\ndocument {document} (number {number} of {source}, in "
            f"{dataset.file_of(source, number)}), tokens {start} to {start + length - 1} of "
            f"{len(dataset.tokens(document))}:",
            tokenizer.decode(dataset.tokens(document, start, length).tolist()),
        ]
    return "\n".join(lines)


def packing_text(dataset: PreparedDataset, orders: dict[str, Order]) -> str:
    """What each way of packing gives, and what it costs."""
    reports = {
        name: packing_report(order, dataset.document_lengths) for name, order in orders.items()
    }
    max_length = next(iter(orders.values())).max_length
    return "\n".join(
        [
            f"{dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens in rows of "
            f"{max_length}, one epoch:",
            *packing_table(reports, dataset.num_documents),
            "would fit: documents that are split although they are no longer than a row;",
            "left over: tokens behind the last whole row, with which the next epoch begins;",
            "across documents: share of the pairs of attention that --document_mask leaves out",
        ]
    )


def given(arguments: argparse.Namespace, name: str) -> bool:
    return getattr(arguments, name) not in (None, False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib inspect",
        description="Show a prepared dataset, conversations, or what a step was trained on.",
    )
    add = parser.add_argument
    add(
        "folder",
        help="prepared dataset, one of its sources or a Megatron prefix; with --step the "
        "--save_dir of a run, with --labels what finetune.py takes with -d",
    )
    add("--tokenizer", help="of a Megatron prefix, which has none beside it, and for --labels")
    add("--document", type=int, help="number of a document to decode")
    add("--packing", action="store_true", help="compare the ways of packing (with -l)")
    add("--row", type=int, help="number of a row of the training order to decode (with -l)")
    add("--packing_of", choices=_PACKINGS, default="concat", help="packing of --row (concat)")
    add("-l", "--max_length", type=int, help="tokens in a row; with --labels as of finetune.py")
    add("--seed", type=int, default=42, help="the --seed of the run (42)")
    add("--step", type=int, help="number of a step of a run: the documents it was trained on")
    add("--cache_dir", default=DEFAULT_CACHE_DIR, help="where packings are kept")
    show.add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    of_data = [f"--{name}" for name in ("document", "packing", "row") if given(arguments, name)]
    if arguments.step is not None and of_data:
        raise UserError(f"--step shows a run, {', '.join(of_data)} a dataset: ask one at a time.")
    if arguments.labels and (arguments.step is not None or of_data):
        others = ", ".join(of_data or ["--step"])
        raise UserError(f"--labels shows conversations, {others} does not: ask one at a time.")
    if problems := show.option_problems(arguments):
        raise UserError(problems)
    if arguments.labels:
        show.show_labels(arguments)
    elif arguments.step is not None:
        # Training imports far more than showing a dataset needs.
        from llama_lib.step_view import show_step

        show_step(arguments.folder, arguments.step)
    else:
        _show_dataset(arguments)
    return 0


def _show_dataset(arguments: argparse.Namespace) -> None:
    wants_rows = arguments.packing or arguments.row is not None
    if wants_rows and (arguments.max_length is None or arguments.max_length < 1):
        raise UserError(
            "--packing and --row need the number of tokens in a row: give -l N as to pretrain.py."
        )
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: expected 0 .. 2^32 - 1.")
    if is_tokenised(arguments.folder):
        dataset = open_tokens(arguments.folder, arguments.tokenizer, arguments.cache_dir)
    else:
        dataset = PreparedDataset.open(arguments.folder)  # says what a prepared dataset is

    def order(packing: str) -> Order:
        length, seed = arguments.max_length, arguments.seed
        return arrange(dataset, length, seed, packing, arguments.cache_dir)

    if not wants_rows or arguments.document is not None:
        print(summary(dataset))
    if arguments.document is not None:
        text = document_text(dataset, arguments.document)
        source, number = dataset.locate(arguments.document)
        print(f"\ndocument {arguments.document} (number {number} of {source}):\n{text}")
    if arguments.packing:
        print(packing_text(dataset, {name: order(name) for name in _PACKINGS}))
    if arguments.row is not None:
        print(row_text(dataset, order(arguments.packing_of), arguments.row))

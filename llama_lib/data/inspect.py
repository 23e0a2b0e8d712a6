"""Show what a prepared dataset holds: the manifest per source, and one document as text.

Invariant: reads only; what is shown comes from the files that training reads.
"""

import argparse
from collections.abc import Sequence

from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.tokenizer import load_tokenizer
from llama_lib.errors import UserError

_COLUMNS = "{:<32} {:>12} {:>16} {:>16} {:>12}"


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
    lines.append(f"manifest hash {dataset.manifest_hash}")
    return "\n".join(lines)


def _row(name: str, facts: dict[str, int]) -> str:
    rate = facts["bytes"] / max(facts["tokens"], 1)
    counts = [f"{facts[key]:,}" for key in ("documents", "tokens", "bytes")]
    return _COLUMNS.format(name, *counts, f"{rate:.2f}")


def document_text(dataset: PreparedDataset, document: int) -> str:
    """A document decoded by the tokenizer that is kept beside the ids, special tokens shown."""
    if not 0 <= document < dataset.num_documents:
        raise UserError(
            f"--document {document} does not exist: {dataset.path} has documents 0 to "
            f"{dataset.num_documents - 1}."
        )
    tokenizer = load_tokenizer(str(dataset.tokenizer_path))
    return tokenizer.decode(dataset.tokens(document).tolist())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib inspect", description="Show a prepared dataset."
    )
    parser.add_argument("prepared", help="folder of a prepared dataset")
    parser.add_argument("--document", type=int, help="number of a document to decode")
    arguments = parser.parse_args(argv)
    dataset = PreparedDataset.open(arguments.prepared)
    print(summary(dataset))
    if arguments.document is not None:
        text = document_text(dataset, arguments.document)
        source, number = dataset.locate(arguments.document)
        print(f"\ndocument {arguments.document} (number {number} of {source}):\n{text}")
    return 0

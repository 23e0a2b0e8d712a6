"""Token files made by Megatron's own tools, `<prefix>.bin` and `.idx`, as a dataset.

Invariant: opening costs the same for any size; each sequence of the files is a document.
"""

import hashlib
from pathlib import Path
from typing import Any

from llama_lib.data.indexed import IndexedReader
from llama_lib.data.prepared import FORMAT, VERSION, PreparedDataset
from llama_lib.errors import UserError

_SUFFIXES = (".bin", ".idx")
_PROBED_IDS = 1 << 20
_PROBED_BYTES = 1 << 20


def megatron_prefix(name: str) -> Path | None:
    """The prefix of a pair of files named by it, or by one of the two; None for anything else."""
    path = Path(name).expanduser()
    prefix = path.with_suffix("") if path.suffix in _SUFFIXES else path
    if all(Path(f"{prefix}{suffix}").is_file() for suffix in _SUFFIXES):
        return prefix
    return None


def open_megatron(
    prefix: Path, tokenizer: dict[str, Any], tokenizer_folder: Path
) -> PreparedDataset:
    """The documents of a pair of files; `tokenizer` is what a manifest says about one.

    That the ids are those of the tokenizer cannot be known; ids it does not have at the beginning
    or the end of the file are refused.
    """
    reader = IndexedReader(prefix)
    if not reader.num_tokens:
        raise UserError(f"{prefix}.bin holds no tokens.")
    vocab_size = tokenizer["vocab_size"]
    for ids in (reader.ids[:_PROBED_IDS], reader.ids[-_PROBED_IDS:]):
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise UserError(
                f"{prefix}.bin holds the id {wrong}; the tokenizer has the ids 0 to "
                f"{vocab_size - 1}. Give the tokenizer that made the file: --tokenizer."
            )
    counts = {"documents": len(reader), "tokens": reader.num_tokens}
    source = {
        **counts,
        "bytes": 0,
        "sha256": None,
        "files": [
            {"name": f"{prefix.name}.bin", "bad_lines": 0, "empty_texts": 0}
            | {"documents": len(reader)}
        ],
        "entry": 0,
        "rows": False,
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer,
        "options": {"megatron": True, "fingerprint": _fingerprint(prefix)},
        **counts,
        "bytes": 0,
        "sources": {prefix.name: source},
    }
    return PreparedDataset(
        prefix.parent, manifest, {prefix.name: reader}, tokenizer_folder=tokenizer_folder
    )


def _fingerprint(prefix: Path) -> str:
    """Hash of the sizes and of both ends of both files: equal for copies of them."""
    digest = hashlib.sha256()
    for suffix in _SUFFIXES:
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_PROBED_BYTES))
            file.seek(max(0, size - _PROBED_BYTES))
            digest.update(file.read(_PROBED_BYTES))
    return digest.hexdigest()

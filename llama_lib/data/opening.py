"""Words of -d that stand for tokens: a prepared folder, one of its sources, or a Megatron pair.

Invariant: finding out reads no more than a manifest; what is opened is opened where it lies.
"""

from pathlib import Path

from llama_lib.data.join import one_source
from llama_lib.data.megatron import megatron_prefix, open_megatron
from llama_lib.data.once import once
from llama_lib.data.prepared import PreparedDataset, is_prepared
from llama_lib.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from llama_lib.errors import UserError


def is_tokenised(name: str) -> bool:
    """Whether a name stands for tokens rather than text."""
    if name == "sample":
        return False
    path = Path(name).expanduser()
    return is_prepared(path) or megatron_prefix(name) is not None or _is_source(path)


def needs_tokenizer(name: str) -> bool:
    """Whether these tokens have no tokenizer beside them: files of Megatron's own tools."""
    prefix = megatron_prefix(name)
    return prefix is not None and not is_prepared(prefix.parent)


def open_tokens(name: str, tokenizer: str | None, cache_dir: str | Path) -> PreparedDataset:
    """The dataset; `tokenizer` is for files that have none beside them."""
    path = Path(name).expanduser()
    if is_prepared(path):
        return PreparedDataset.open(path)
    prefix = megatron_prefix(name) or path
    if is_prepared(prefix.parent):
        dataset = PreparedDataset.open(prefix.parent)
        if prefix.name not in dataset.readers:
            raise UserError(
                f"{prefix.parent} has no source {prefix.name}; it has {', '.join(dataset.sources)}."
            )
        return one_source(dataset, prefix.name)
    if tokenizer is None:
        raise UserError(f"{name} has no tokenizer beside it: pass the one that made it.")
    loaded = load_tokenizer(tokenizer, cache_dir)
    digest = tokenizer_hash(loaded)
    # A run keeps its tokenizer with its checkpoints, so there has to be a folder of it.
    folder = Path(cache_dir).expanduser() / "tokenizers" / digest[:32]
    with once(Path(cache_dir).expanduser(), str(folder), "the copy of the tokenizer"):
        if not (folder / "tokenizer.json").is_file():
            save_tokenizer(loaded, folder)
    about = {
        "hash": digest,
        "vocab_size": vocabulary_size(loaded),
        "bos_token_id": loaded.bos_token_id,
        "eos_token_id": loaded.eos_token_id,
    }
    return open_megatron(prefix, about, folder)


def _is_source(path: Path) -> bool:
    # A file of this name would be text that somebody put beside the tokens.
    return is_prepared(path.parent) and not path.exists() and path.name != ""

"""Load a tokenizer, train one, and name it by a hash of all that decides its ids.

Invariant: no token is ever added to a loaded tokenizer; training the same text gives the same
tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lib.data.once import beside, once
from llama_lib.data.sample import write_sample
from llama_lib.data.sources import Source, records
from llama_lib.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_VOCAB_SIZE = 4096
DEFAULT_CACHE_DIR = "~/.cache/llama_lib"
_LONGEST_REASON = 200  # characters of a message that is not ours. Chosen.

# <unk> <s> </s> are 0 1 2 as in every Llama tokenizer, so LlamaConfig's default ids hold.
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"


def load_tokenizer(
    name_or_path: str, cache_dir: str | Path = DEFAULT_CACHE_DIR
) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder or hub id; `sample` is the embedded corpus' own.

    Raises UserError when there is none, when it has no fast form, or no end-of-text token.
    """
    tokenizer = fast_tokenizer(name_or_path, cache_dir)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name_or_path!r} has no eos_token, which ends each document. Set it "
            "in its tokenizer_config.json or choose another with --tokenizer."
        )
    return tokenizer


def fast_tokenizer(
    name_or_path: str, cache_dir: str | Path = DEFAULT_CACHE_DIR, flag: str = "--tokenizer"
) -> PreTrainedTokenizerBase:
    """As load_tokenizer, but it need not end documents; `flag` is named in the errors."""
    if name_or_path == "sample":
        name_or_path = str(sample_tokenizer(cache_dir))
    name_or_path = os.path.expanduser(name_or_path)
    try:
        # Said, because where nothing is said transformers asks on the terminal, and a y runs it.
        tokenizer = _class_of(name_or_path).from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        # A damaged tokenizer.json is a plain Exception of the tokenizers library.
        raise UserError(
            f"no tokenizer can be loaded from {name_or_path!r}: {_reason(error)} Expected a folder "
            f"with tokenizer.json, a hub id, or `sample`: pass it with {flag}."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name_or_path!r} has no fast form (tokenizer.json), which preparing "
            f"data needs. Choose another with {flag}."
        )
    # Its name for the code beside it is not handed on to whoever loads what is saved.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _reason(error: Exception) -> str:
    """The first line, shortened: transformers lists every kind of model that there is."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    if "trust_remote_code" in line:
        return "it is code that comes with the model, which is never run."
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."


def _class_of(name_or_path: str) -> Any:
    """AutoTokenizer, or the class it would come to where the folder says so.

    Importing all that AutoTokenizer chooses from takes longer than tokenising 10 MB (measured).
    """
    settings = Path(name_or_path) / "tokenizer_config.json"
    if settings.is_file():
        chosen = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
        if chosen == "PreTrainedTokenizerFast":
            from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """The sample's: byte-level BPE with `<unk> <s> </s>` = 0 1 2; any text comes back exactly.

    Padding is `<unk>`: bytes cover every text, so `<unk>` never occurs and masking it is safe,
    whereas padding with `</s>` would mask the real ends of documents.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [_UNKNOWN, _BEGIN, _END]
    if vocab_size < len(alphabet) + len(special):
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 256 bytes and {len(special)} special tokens "
            f"need at least {len(alphabet) + len(special)}."
        )
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BEGIN,
        eos_token=_END,
        unk_token=_UNKNOWN,
        pad_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
        # Llama models take no token_type_ids.
        model_input_names=["input_ids", "attention_mask"],
    )
    return trained


def sample_tokenizer(cache_dir: str | Path, vocab_size: int = SAMPLE_VOCAB_SIZE) -> Path:
    """Folder of the tokenizer trained on the sample; trained once per cache and Python release."""
    cache_dir = Path(cache_dir).expanduser()
    files = write_sample(cache_dir / "sample")
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    folder = cache_dir / "tokenizers" / f"sample-{vocab_size}-{key}"
    with once(cache_dir, str(folder), "the training of the sample's tokenizer"):
        if not (folder / "tokenizer.json").is_file():
            texts = (text for path in files for text in records(Source(path.stem, (path,))))
            save_tokenizer(train_tokenizer(texts, vocab_size), folder)
    return folder


def save_tokenizer(tokenizer: Any, folder: Path, more: Mapping[str, str] | None = None) -> None:
    """Write the Hugging Face folder in another place first, so that it is whole or absent.

    `more` are files to put beside the tokenizer's: name and text.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        _name_class(tokenizer, temporary / "tokenizer_config.json")
        for name, text in (more or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _name_class(tokenizer: Any, path: Path) -> None:
    """Call the plain fast class by its own name: save_pretrained writes that of the slow one."""
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = PreTrainedTokenizerFast.__name__
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the serialised tokenizer (tokenizer.json) and the ids of its special tokens.

    The files around it are left out: they change with the version of transformers, the ids do not.
    """
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
    }
    content = bare_backend(tokenizer).to_str() + json.dumps(special, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def bare_backend(tokenizer: Any) -> Any:
    """A copy of the `tokenizers.Tokenizer` inside, without truncation and padding."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def adds_bos(tokenizer: Any) -> bool:
    """Whether it puts BOS in front of a text: then prompts will begin with it when the model is
    used, and documents have to in training."""
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id the tokenizer can give."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: Any, vocab_size: int) -> list[str]:
    """The problem, if the tokenizer has ids that the model's embedding has no row for."""
    ids = vocabulary_size(tokenizer)
    if ids <= vocab_size:
        return []
    return [
        f"the tokenizer has {ids} ids, the model's vocab_size is {vocab_size}: ids >= {vocab_size} "
        f"have no embedding. Use the model's own tokenizer (--tokenizer) or a --config with "
        f"vocab_size >= {ids}."
    ]

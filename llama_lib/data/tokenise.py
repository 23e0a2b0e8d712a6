"""Texts to ids: gigatoken where its ids are proven equal to the tokenizer's own, else tokenizers.

Invariant: the ids depend on the text and the tokenizer alone, never on the process that makes them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.indexed import token_dtype
from llama_lib.errors import UserError

Ids = npt.NDArray[np.integer]
Lengths = npt.NDArray[np.int64]
Encode = Callable[[Sequence[str]], list[Ids]]

_PROBE_CHARACTERS = 1 << 18  # compared at a time; chosen
# Gigatoken remembers every distinct word for good: about 12 bytes for each byte of random words.
# Beginning anew costs 0.07 s and some words again, so it is done only where memory has grown and
# not often. Measured 2026-11.
_MOST_GROWTH = 256 << 20
_LEAST_CHARACTERS = 16 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# What tokenizers tend to disagree on: blanks, line ends, digits, scripts, combining marks, emoji,
# control characters, contractions in either case, long runs. Special tokens come on top.
_PROBES = (
    "Hello, world! It's 12345 o'clock, they'LL say: don't.\n\n\tif x:\r\n        return x  \n",
    "   leading and trailing   \n\n\n",
    "na\u00efve caf\u00e9 \u4f60\u597d\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 e\u0301 \ufb01 \u00bd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2581 \u00a0 \u3000 \u2028 \ufeff "
    "\x00\x07\x1a\x7f",
    "http://a.b/c?d=e&f=1_000.5e-10 {'k': [1, 2, 3]} <div>&amp;</div> // --> !!!???...",
    "a" * 500 + " " * 100 + "\n" * 50 + "=-" * 60,
)


def text_hash(text: bytes) -> int:
    """The 64 bits that decide whether a text is held out."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


@dataclass(frozen=True)
class Recipe:
    """All that decides the ids of a text, to be sent to other processes.

    `engine` is gigatoken or tokenizers; each document begins with `prefix` and ends with `suffix`.
    """

    tokenizer_json: str
    vocab_size: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    engine: str


@dataclass(frozen=True)
class Proof:
    """Which engine may be used for a tokenizer, and why not gigatoken if it may not.

    `bytes_per_token` is that of the probes: UTF-8 bytes, for estimates.
    """

    recipe: Recipe
    note: str
    bytes_per_token: float


def prove(tokenizer: Any, add_bos: bool | None = None, probes: Iterable[str] = ()) -> Proof:
    """Try gigatoken on `probes`, texts of the data, and on the built-in ones.

    It is used only if it gives the ids of the tokenizer itself on each of them; a few are in
    memory at a time. Documents begin with BOS if `add_bos`; None: if the tokenizer itself puts it
    there.
    """
    from llama_lib.data.tokenizer import adds_bos, bare_backend, vocabulary_size

    if add_bos is None:
        add_bos = adds_bos(tokenizer)
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no bos_token to begin documents with")
    content = bare_backend(tokenizer).to_str()
    special = " ".join(f"x{token}y {token} " for token in tokenizer.all_special_tokens)
    encode = reference_encoder(content)
    loaded = cache(lambda: gigatoken_encoder(content))
    own_texts = [*_PROBES, special]
    own_ids = encode(own_texts)
    note = _difference(loaded, own_texts, own_ids)
    num_bytes = num_tokens = 0
    for texts in _batches(probes):
        reference = encode(texts)
        note = note or _difference(loaded, texts, reference)
        num_bytes += _num_bytes(texts)
        num_tokens += sum(map(len, reference))
    if not num_tokens:
        num_bytes, num_tokens = _num_bytes(own_texts), sum(map(len, own_ids))
    recipe = Recipe(
        tokenizer_json=content,
        vocab_size=vocabulary_size(tokenizer),
        prefix=(tokenizer.bos_token_id,) if add_bos else (),
        suffix=(tokenizer.eos_token_id,),
        engine="tokenizers" if note else "gigatoken",
    )
    return Proof(recipe, note, max(num_bytes, 1) / max(num_tokens, 1))


class Encoder:
    """Encode batches of documents, each with its ends. `dtype` holds every id."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dtype = token_dtype(recipe.vocab_size)
        self._begin()
        self._prefix = np.array(recipe.prefix, np.uint32)
        self._suffix = np.array(recipe.suffix, np.uint32)

    def _begin(self) -> None:
        """Load the engine, in place of one that remembers too many words."""
        self.__dict__.pop("_encode", None)  # the old one goes before the new one comes
        is_gigatoken = self.recipe.engine == "gigatoken"
        load = gigatoken_encoder if is_gigatoken else reference_encoder
        self._encode = load(self.recipe.tokenizer_json)
        self._characters = 0
        self._memory = _resident()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """Ids of all documents one after another, and the length of each, ends included."""
        if self.recipe.engine == "gigatoken" and self._characters >= _LEAST_CHARACTERS:
            self._characters = 0
            if not self._memory or _resident() - self._memory > _MOST_GROWTH:
                self._begin()
        self._characters += sum(map(len, texts))
        rows = self._encode(texts)
        extra = len(self._prefix) + len(self._suffix)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + extra
        pieces = [piece for row in rows for piece in (self._prefix, row, self._suffix)]
        if not pieces:
            return np.empty(0, self.dtype), lengths
        return np.concatenate(pieces, dtype=self.dtype, casting="unsafe"), lengths


def reference_encoder(tokenizer_json: str) -> Encode:
    """Ids by the tokenizers library, which is the truth that gigatoken is held against."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer_json)

    def encode(texts: Sequence[str]) -> list[Ids]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    return encode


def gigatoken_encoder(tokenizer_json: str) -> Encode:
    """Ids by gigatoken, on the calling thread.

    One call per document: its batches come as awkward arrays, a library that would add 60 MB and
    a third of a second to every process (measured), and they are no faster.
    """
    import gigatoken

    encode = gigatoken.Tokenizer.from_json(tokenizer_json).backend.encode
    return lambda texts: [encode(text) for text in texts]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _PROBE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def _difference(
    loaded: Callable[[], Encode], texts: Sequence[str], reference: Sequence[Ids]
) -> str:
    """Why gigatoken cannot be used; empty if its ids are those of the reference."""
    try:
        found = loaded()(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except ImportError as error:
        return f"gigatoken cannot be imported ({error})"
    except BaseException as error:  # a panic in its Rust code is not an Exception
        return f"gigatoken cannot load this tokenizer ({str(error).splitlines()[0]})"
    for text, ids, expected in zip(texts, found, reference, strict=True):
        if not np.array_equal(ids, expected):
            return f"gigatoken's ids differ, first on the text {text[:40]!r}"
    return ""

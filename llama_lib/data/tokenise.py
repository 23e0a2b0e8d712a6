"""Texts to ids: gigatoken where its ids are proven equal to the tokenizer's own, else tokenizers.

Invariant: the ids depend on the text and the tokenizer alone, never on the number of workers.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llama_lib.data.indexed import token_dtype
from llama_lib.data.tokenizer import bare_backend, vocabulary_size
from llama_lib.errors import UserError

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]

Batch = TypeVar("Batch")
Result = TypeVar("Result")

# What tokenizers tend to disagree on: blanks, line ends, digits, scripts, combining marks, emoji,
# control characters, contractions in either case, long runs. Special tokens come on top.
_PROBES = (
    "Hello, world! It's 12345 o'clock, they'LL say: don't.\n\n\tif x:\r\n        return x  \n",
    "   leading and trailing   \n\n\n",
    "na\u00efve caf\u00e9 \u4f60\u597d\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 e\u0301 \ufb01 \u00bd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2581 \u00a0 \u3000 \u2028 \ufeff "
    "\x00\x07\x7f",
    "http://a.b/c?d=e&f=1_000.5e-10 {'k': [1, 2, 3]} <div>&amp;</div> // --> !!!???...",
    "a" * 500 + " " * 100 + "\n" * 50 + "=-" * 60,
)


class Encoder:
    """Encode batches of documents, each ended by EOS (and begun by BOS with `add_bos`).

    `probes` are texts of the data: gigatoken is used only if it gives the same ids on them and on
    the built-in ones. `engine` says which is used, `note` why it is not gigatoken.
    `dtype` holds every id.
    """

    def __init__(
        self, tokenizer: Any, workers: int, add_bos: bool = False, probes: Sequence[str] = ()
    ) -> None:
        if add_bos and tokenizer.bos_token_id is None:
            raise UserError("the tokenizer has no bos_token to begin documents with")
        self.dtype = token_dtype(vocabulary_size(tokenizer))
        self._workers = workers
        self._prefix = [tokenizer.bos_token_id] if add_bos else []
        self._suffix = [tokenizer.eos_token_id]
        self._backend = bare_backend(tokenizer)
        special = " ".join(f"x{token}y {token} " for token in tokenizer.all_special_tokens)
        texts = [*_PROBES, special, *probes]
        reference = [self._with_backend([text])[0] for text in texts]
        self._probe_bytes = sum(len(text.encode("utf-8")) for text in probes or texts)
        self._probe_tokens = sum(len(ids) for ids in reference[-len(probes or texts) :])
        self._gigatoken, self.note = _proven_gigatoken(self._backend, texts, reference)
        self.engine = "gigatoken" if self._gigatoken else "tokenizers"
        # gigatoken spreads one batch over its own threads, so a single caller keeps it busy.
        self.threads = 1 if self._gigatoken else workers
        if not self._gigatoken:
            # Ours are the threads: a pool within each of them would ignore `workers`.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token on the probes: what an estimate of the size goes by."""
        return max(self._probe_bytes, 1) / max(self._probe_tokens, 1)

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Lengths]:
        """Ids of all documents one after another, and the length of each, ends included."""
        if self._gigatoken:
            flat, lengths = self._gigatoken(texts, self._workers > 1)
        else:
            rows = self._with_backend(texts)
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            flat = np.concatenate(rows) if rows else np.empty(0, np.uint32)
        # Borders are set in one pass: every id moves on by the ends inserted before it.
        extra = len(self._prefix) + len(self._suffix)
        wrapped = lengths + extra
        out = np.empty(len(flat) + extra * len(lengths), np.uint32)
        ends = np.cumsum(wrapped)
        inside = np.ones(len(out), bool)
        for back, token in enumerate(reversed(self._suffix), start=1):
            out[ends - back] = token
            inside[ends - back] = False
        for ahead, token in enumerate(self._prefix):
            out[ends - wrapped + ahead] = token
            inside[ends - wrapped + ahead] = False
        out[inside] = flat
        return out, wrapped

    def _with_backend(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def in_order(
    work: Callable[[Batch], Result], batches: Iterable[Batch], threads: int
) -> Iterator[Result]:
    """`map` on threads: results in the order of the batches, at most two per thread in memory."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                pending.append(pool.submit(work, batch))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _proven_gigatoken(
    backend: Any, texts: Sequence[str], reference: Sequence[Ids]
) -> tuple[Callable[[Sequence[str], bool], tuple[Ids, Lengths]] | None, str]:
    """gigatoken's batch encoder if it gives the reference's ids, else None and the reason."""
    try:
        import awkward
        import gigatoken
    except ImportError as error:
        return None, f"gigatoken cannot be imported ({error})"

    def encode(texts: Sequence[str], parallel: bool) -> tuple[Ids, Lengths]:
        ids = fast.encode_batch(list(texts), parallel=parallel)
        lengths = awkward.to_numpy(awkward.num(ids, axis=1))
        return awkward.to_numpy(awkward.flatten(ids, axis=1)), lengths

    try:
        fast = gigatoken.Tokenizer.from_json(backend.to_str())
        flat, lengths = encode(texts, False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in its Rust code is not an Exception
        return None, f"gigatoken cannot load this tokenizer ({str(error).splitlines()[0]})"
    ends = np.cumsum(lengths)
    for text, end, length, expected in zip(texts, ends, lengths, reference, strict=True):
        if not np.array_equal(flat[end - length : end], expected):
            return None, f"gigatoken's ids differ, first on the text {text[:40]!r}"
    return encode, ""

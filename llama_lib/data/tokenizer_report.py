"""What a tokenizer makes of each source, side by side with another one.

Invariant: every number is counted on the same documents for every tokenizer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from llama_lib.data.tokenizer import bare_backend, vocabulary_size

_BATCH_BYTES = 1 << 20
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_TOTAL = "all"


class Counting:
    """Counts what a tokenizer makes of texts: tokens, unknown ones, texts that do not come back."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = bare_backend(tokenizer)
        self._unknown = np.zeros(vocabulary_size(tokenizer), bool)
        self._unk_token = tokenizer.unk_token
        if self._unk_token is not None:
            self._unknown[tokenizer.unk_token_id] = True
        model = json.loads(self._backend.to_str())["model"]
        if model.get("byte_fallback"):
            for token, number in tokenizer.get_vocab().items():
                if _BYTE_TOKEN.fullmatch(token):
                    self._unknown[number] = True

    def of(self, texts: Sequence[str]) -> Counter[str]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        decoded = self._backend.decode_batch(rows, skip_special_tokens=False)
        ids = np.concatenate([np.array(row, np.int64) for row in rows])
        # A text that spells <unk> out (WikiText does) is not unknown for that.
        spelt = sum(text.count(self._unk_token) for text in texts) if self._unk_token else 0
        return Counter(
            tokens=len(ids),
            unknown=max(int(self._unknown[ids].sum()) - spelt, 0),
            changed=sum(text != back for text, back in zip(texts, decoded, strict=True)),
        )


def report(
    sources: Mapping[str, tuple[Mapping[str, int], Iterable[str]]],
    tokenizers: Mapping[str, Any],
    num_bytes: int,
) -> dict[str, Any]:
    """For each source (what it was counted to hold, its texts) the measures of each tokenizer.

    Measured on the first documents of a source, until they make up `num_bytes` of UTF-8.
    Tokens are without BOS and EOS; a word is what stands between whitespace; unknown are <unk>
    and byte-fallback tokens; changed are documents that decoding does not give back exactly.
    """
    counting = {name: Counting(tokenizer) for name, tokenizer in tokenizers.items()}
    totals: dict[str, Counter[str]] = {name: Counter() for name in ["", "held", *counting]}
    content: dict[str, Any] = {}
    for source, (held, texts) in sources.items():
        measured: Counter[str] = Counter()
        tokens: dict[str, Counter[str]] = {name: Counter() for name in counting}
        for batch in _batches(texts, num_bytes):
            measured["documents"] += len(batch)
            measured["bytes"] += sum(len(text.encode("utf-8")) for text in batch)
            measured["words"] += sum(len(text.split()) for text in batch)
            for name, counter in counting.items():
                tokens[name] += counter.of(batch)
        content[source] = _entry(held, measured, tokens)
        totals["held"] += Counter(held)
        totals[""] += measured
        for name in counting:
            totals[name] += tokens[name]
    total = _entry(totals.pop("held"), totals.pop(""), totals)
    return {
        "report_bytes": num_bytes,
        "vocab_sizes": {name: vocabulary_size(item) for name, item in tokenizers.items()},
        "sources": content,
        "total": total,
    }


def _entry(
    held: Mapping[str, int], measured: Mapping[str, int], tokens: Mapping[str, Counter[str]]
) -> dict[str, Any]:
    return {
        **{name: held.get(name, 0) for name in ("documents", "bytes", "bad_lines")},
        "measured": {name: measured.get(name, 0) for name in ("documents", "bytes", "words")},
        "tokenizers": {
            name: {
                "tokens": counts["tokens"],
                "bytes_per_token": measured.get("bytes", 0) / max(counts["tokens"], 1),
                "tokens_per_word": counts["tokens"] / max(measured.get("words", 0), 1),
                "unknown_rate": counts["unknown"] / max(counts["tokens"], 1),
                "changed_documents": counts["changed"],
            }
            for name, counts in tokens.items()
        },
    }


def _batches(texts: Iterable[str], num_bytes: int) -> Iterator[list[str]]:
    """The first texts until `num_bytes` are reached, about 1 MiB at a time."""
    batch: list[str] = []
    taken = in_batch = 0
    for text in texts:
        if taken >= num_bytes:
            break
        size = len(text.encode("utf-8"))
        batch.append(text)
        taken += size
        in_batch += size
        if in_batch >= _BATCH_BYTES:
            yield batch
            batch, in_batch = [], 0
    if batch:
        yield batch


def report_table(content: Mapping[str, Any]) -> list[str]:
    """The report as lines: a row for each source, four columns for each tokenizer."""
    names = list(content["total"]["tokenizers"])
    heads = ["bytes/token", "tokens/word", "unknown %", "changed"]
    rows = [["source", "documents", "bytes", *(head for _ in names for head in heads)]]
    entries = {**content["sources"]}
    if len(entries) > 1:
        entries[_TOTAL] = content["total"]
    for source, entry in entries.items():
        row = [source, f"{entry['documents']:,}", f"{entry['bytes']:,}"]
        for measures in entry["tokenizers"].values():
            row += [
                f"{measures['bytes_per_token']:.3f}",
                f"{measures['tokens_per_word']:.3f}",
                f"{100 * measures['unknown_rate']:.3f}",
                f"{measures['changed_documents']:,}",
            ]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    # Names above their columns.
    above = " " * (sum(widths[:3]) + 4)
    for place, name in enumerate(names):
        block = widths[3 + 4 * place : 7 + 4 * place]
        title = f"{name} ({content['vocab_sizes'][name]} ids)"
        above += "  " + title.ljust(sum(block) + 6)
    lines.insert(0, above.rstrip())
    if partly := [
        source
        for source, entry in content["sources"].items()
        if entry["measured"]["bytes"] < entry["bytes"]
    ]:
        lines.append(
            f"measured on the first {content['report_bytes'] / 2**20:g} MiB of "
            + ", ".join(islice(partly, 5))
            + (f" and {len(partly) - 5} more" if len(partly) > 5 else "")
        )
    return lines

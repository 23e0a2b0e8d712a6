"""Train a tokenizer on text, in the style of Llama 2 or of Llama 3, or after a reference.

Invariant: the same text gives the same tokenizer; without a reference, decoding what was encoded
gives back the text, whatever it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llama_lib.data.tokenizer import bare_backend
from llama_lib.errors import UserError

Texts = Callable[[], Iterable[str]]

# The share of all characters that get a token of their own; SentencePiece's option of this name,
# with the value in Llama 2's tokenizer.model. The others are spelt in bytes.
CHARACTER_COVERAGE = 0.99995
# SentencePiece's max_sentencepiece_length, inclusive; the trainer's own option is exclusive.
_LONGEST_PIECE = 16
# In bytes: the longest token of cl100k, from which Llama 3's vocabulary comes, a run of blanks.
_LONGEST_TOKEN = 128

_MARK = "\u2581"
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))

# A blank is written as U+2581, so a U+2581 of the text itself needs another form. It becomes
# 0x1A, which no piece holds, so it ends as the byte token <0x1A>; the decoder turns that token
# back into U+2581. A 0x1A of the text is an added token, matched before anything else.
_SUBSTITUTE = "\x1a"

# What may become one piece, after SentencePiece's splitting by whitespace, script and digits with
# the blank in front of a word. No piece holds a blank behind another character (so gigatoken may
# cut texts at blanks), and none reads like a byte token, since "<", "0" and "x" never meet.
_BLANK = "[\u2581 ]"
_IDEOGRAPHS = r"\p{Han}\p{Hiragana}\p{Katakana}"
_UNITS = "|".join(
    [
        rf"{_BLANK}+(?={_BLANK})",
        rf"{_BLANK}?[{_IDEOGRAPHS}]+",
        rf"{_BLANK}?[\p{{L}}\p{{M}}&&[^{_IDEOGRAPHS}]]+",
        rf"{_BLANK}?[^\s{_MARK}\p{{L}}\p{{M}}\p{{N}}]+",
        r"\p{N}",
        r"[^\S ]+",
        _BLANK,
    ]
)

# From Llama 3's tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Style:
    """The special tokens of a style: their ids are their places in `special`."""

    special: tuple[str, ...]
    bos: str
    eos: str
    pad: str
    unk: str | None = None

    @property
    def other(self) -> list[str]:
        return [token for token in self.special if token not in (self.bos, self.eos, self.pad)]


# In both, BOS and EOS are 1 and 2 as in LlamaConfig's defaults. Padding is a token of its own:
# padding with EOS would mask the real ends of documents.
STYLES = {
    "llama2": Style(("<unk>", "<s>", "</s>", "<pad>"), "<s>", "</s>", "<pad>", "<unk>"),
    # Llama 3's names; the last three are what its chat template needs.
    "llama3": Style(
        (
            "<|finetune_right_pad_id|>",
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
    ),
}


def train_style(
    texts: Texts,
    vocab_size: int,
    style: str | None = None,
    reference: Any = None,
    character_coverage: float = CHARACTER_COVERAGE,
    name: str = "the reference",
) -> Any:
    """A tokenizer of a style, as a PreTrainedTokenizerFast; default the reference's, or llama3.

    `texts` is called once for each pass: llama2 counts the characters first. Memory holds the
    count of every distinct word (or run of punctuation) of the text, never the text. Normalizer,
    pre-tokenizer, decoder and post-processor are those of `reference` if one is given.
    """
    copied = json.loads(bare_backend(reference).to_str()) if reference is not None else None
    if copied is not None:
        kind = _style_of(copied, name)
        if style not in (None, kind):
            raise UserError(
                f"{name} is a tokenizer in the style of {kind}: got --style {style}, expected "
                f"--style {kind} or none with this --reference."
            )
        style = kind
    style = style or "llama3"
    if style not in STYLES:
        raise UserError(f"unknown --style: got {style!r}, expected one of {', '.join(STYLES)}.")
    check_vocab_size(vocab_size, style, copied is not None)
    if style == "llama2":
        backend = _train_llama2(texts, vocab_size, copied, character_coverage)
    else:
        backend = _train_llama3(texts, vocab_size, copied)
    if copied is not None:
        backend = _with_parts(backend, copied, name, style)
    return _wrapped(backend, STYLES[style])


def check_vocab_size(vocab_size: int, style: str, has_reference: bool) -> None:
    """Raises UserError for a size too small for any text."""
    reserved = _reserved(style, has_reference)
    least = reserved + (style == "llama2")
    if vocab_size < least:
        what = "256 bytes and " if style == "llama3" else "a character, 256 byte tokens and "
        raise UserError(
            f"--vocab_size {vocab_size} is too small: {what}{reserved - 256} special tokens need "
            f"at least {least}."
        )


def _reserved(style: str, has_reference: bool) -> int:
    """The ids that no text decides: of bytes and of special tokens."""
    # llama2 without a reference has the substitute, too.
    return len(STYLES[style].special) + 256 + (style == "llama2" and not has_reference)


def _train_llama2(
    texts: Texts, vocab_size: int, copied: dict[str, Any] | None, coverage: float
) -> Any:
    """BPE over characters with byte fallback, as SentencePiece trains it, without dummy prefix.

    A dummy prefix (a blank in front of each text) cannot be told from a real one behind a special
    token, so decoding would not be exact.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    style = STYLES["llama2"]
    units = pre_tokenizers.Split(Regex(_UNITS), "isolated")
    tokenizer = Tokenizer(models.BPE())
    if copied is None:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(_MARK, _SUBSTITUTE), normalizers.Replace(" ", _MARK)]
        )
        tokenizer.pre_tokenizer = units
    else:
        reference = Tokenizer.from_str(json.dumps(copied))
        tokenizer.normalizer = reference.normalizer
        parts = [reference.pre_tokenizer] if reference.pre_tokenizer else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, units])
    alphabet = _alphabet(texts(), coverage, None if copied is None else tokenizer)
    reserved = _reserved("llama2", copied is not None)
    if vocab_size < reserved + len(alphabet):
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 256 byte tokens, {reserved - 256} special "
            f"tokens and the text's {len(alphabet)} characters need at least "
            f"{reserved + len(alphabet)}. Raise it or lower --character_coverage."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (copied is None),
        special_tokens=[*style.special, *_BYTE_TOKENS],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=_LONGEST_PIECE + 1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts()), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    trained = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token=style.unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # No pre-tokenizer from here on, as in Llama 2: no piece crosses two units anyway.
    trained.add_special_tokens([AddedToken(token, special=True) for token in style.special])
    if copied is None:
        trained.normalizer = tokenizer.normalizer
        trained.decoder = decoders.Sequence(
            [
                decoders.Replace(_MARK, " "),
                decoders.Replace(_BYTE_TOKENS[ord(_SUBSTITUTE)], _MARK),
                decoders.ByteFallback(),
                decoders.Fuse(),
            ]
        )
        trained.post_processor = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A <s>:1 $B:1",
            special_tokens=[("<s>", style.special.index("<s>"))],
        )
        # Behind the model's own ids: a character with a piece would not fall back to its byte.
        trained.add_tokens([AddedToken(_SUBSTITUTE, normalized=False, special=False)])
    return trained


def _alphabet(texts: Iterable[str], coverage: float, referring: Any) -> list[str]:
    """The mark, and the most frequent characters that make up `coverage` of the text.

    `referring` is the tokenizer with a reference's normalizer and pre-tokenizer, if there is one.
    """
    counts: Counter[str] = Counter()
    normalize = referring.normalizer.normalize_str if referring and referring.normalizer else str
    for text in texts:
        counts.update(normalize(text))
    if not counts:
        raise _no_text()
    if referring is None:
        # The text's own marks become the substitute, which must have no piece.
        del counts[_MARK], counts[_SUBSTITUTE]
    kept: list[str] = []
    covered = 0
    total = counts.total()
    if referring is None or _marks_blanks(referring):
        # Kept even where the text has no blank: bytes of the mark are decoded as the mark.
        kept.append(_MARK)
        covered = counts.pop(_MARK, 0) + counts.pop(" ", 0)
    # Ties by code point: the order of counting must not decide.
    for character, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if covered >= coverage * total:
            break
        kept.append(character)
        covered += count
    return kept


def _marks_blanks(tokenizer: Any) -> bool:
    """Whether normalizer and pre-tokenizer leave no blank, as all of SentencePiece's kind do."""
    text = "a b"
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    return all(" " not in piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))


def _train_llama3(texts: Texts, vocab_size: int, copied: dict[str, Any] | None) -> Any:
    """Byte-level BPE behind Llama 3's pre-tokenization."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )

    style = STYLES["llama3"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    if copied is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        begin = style.bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin}:1 $B:1",
            special_tokens=[(begin, style.special.index(begin))],
        )
    else:
        reference = Tokenizer.from_str(json.dumps(copied))
        tokenizer.normalizer = reference.normalizer
        tokenizer.pre_tokenizer = reference.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(style.special),
        initial_alphabet=alphabet,
        max_token_length=_LONGEST_TOKEN + 1,
        show_progress=False,
    )
    seen = _Seen(texts())
    tokenizer.train_from_iterator(seen, trainer)
    if not seen.any:
        raise _no_text()
    return tokenizer


class _Seen:
    """Iterates over texts and knows whether there was any."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = iter(texts)
        self.any = False

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.any = True
            yield text


def _no_text() -> UserError:
    return UserError(
        "there is no text to train a tokenizer on: every document is empty or was left out. "
        "Pass others with --input, or raise --sample_ratio."
    )


def _style_of(copied: dict[str, Any], name: str) -> str:
    """The style whose vocabulary fits the reference's normalizer, pre-tokenizer and decoder."""
    model = copied["model"]
    if model.get("type") == "BPE":
        if model.get("byte_fallback"):
            return "llama2"
        if "ByteLevel" in _types([copied["normalizer"], copied["pre_tokenizer"]]):
            return "llama3"
    raise UserError(
        f"{name} fits no style: its model is {model.get('type')}, expected BPE with byte fallback "
        "(llama2) or over bytes (llama3). Choose another --reference."
    )


def _types(part: Any) -> set[str]:
    """Every "type" anywhere inside a part of a tokenizer.json."""
    if isinstance(part, dict):
        found = {part["type"]} if isinstance(part.get("type"), str) else set()
        return found | _types(list(part.values()))
    if isinstance(part, list):
        return set().union(*map(_types, part))
    return set()


def _with_parts(backend: Any, copied: dict[str, Any], name: str, style: str) -> Any:
    """The trained vocabulary with the reference's four parts around it."""
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        content[part] = copied[part]
    missing: set[str] = set()

    def number(token: str) -> int:
        found = backend.token_to_id(token)
        if found is None:
            missing.add(token)
        return found

    content["post_processor"] = _renumbered(content["post_processor"], number)
    if missing:
        raise UserError(
            f"{name} puts {', '.join(sorted(missing))} around each text, which --style {style} "
            f"does not have: its special tokens are {', '.join(STYLES[style].special)}. "
            "Choose another --reference."
        )
    return Tokenizer.from_str(json.dumps(content))


def _renumbered(post: Any, number: Callable[[str], int]) -> Any:
    """A post-processor with the id of each special token looked up anew by its text."""
    if post is None:
        return None
    post = dict(post)
    if post["type"] == "Sequence":
        post["processors"] = [_renumbered(part, number) for part in post["processors"]]
    elif post["type"] == "TemplateProcessing":
        post["special_tokens"] = {
            key: {**token, "ids": [number(text) for text in token["tokens"]]}
            for key, token in post["special_tokens"].items()
        }
    else:
        for end in ("sep", "cls"):  # BertProcessing and RobertaProcessing
            if end in post:
                post[end] = [post[end][0], number(post[end][0])]
    return post


def _wrapped(backend: Any, style: Style) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": style.bos, "eos_token": style.eos, "pad_token": style.pad}
    if style.unk:
        names["unk_token"] = style.unk
    other = [token for token in style.other if token != style.unk]
    # The plain fast class takes tokenizer.json as it is; LlamaTokenizerFast would put its own
    # parts in place of ours. Llama models take no token_type_ids.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
        **({"additional_special_tokens": other} if other else {}),
    )

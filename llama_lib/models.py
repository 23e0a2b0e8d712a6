"""The table of model shapes, and where else a shape may come from.

Invariant: a name of the table is the published model to the unit; a `Shape` is read without torch
and transformers, and has what transformers' configuration of the same source has.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lib.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig

LLAMA_TOKENIZER = "hf-internal-testing/llama-tokenizer"

# ColossalAI pads the vocabulary to a multiple of this times tp (its make_vocab_size_divisible_by).
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class Shape:
    """What memory, time and layout depend on in a Llama or Mistral model.

    The names are those of transformers' configurations, so that code which reads one reads the
    other too.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    sliding_window: int | None = None
    attention_dropout: float = 0.0


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> Shape:
    return Shape(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        **others,
    )


@dataclass(frozen=True)
class _Model:
    """A row of the table; `settings` are the rest of transformers' configuration."""

    shape: Shape
    settings: dict[str, Any]

    def config(self) -> LlamaConfig | MistralConfig:
        from transformers import LlamaConfig, MistralConfig

        values = asdict(self.shape) | self.settings
        if values.pop("model_type") == "llama":
            del values["sliding_window"]
            return LlamaConfig(**values)
        del values["attention_bias"], values["mlp_bias"]
        return MistralConfig(**values)


def _llama1(hidden: int, intermediate: int, layers: int, heads: int) -> _Model:
    """LLaMA, arXiv 2302.13971, table 2."""
    shape = _shape(
        hidden,
        intermediate,
        layers,
        heads,
        heads,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    return _Model(shape, {"rms_norm_eps": 1e-6})


def _llama2(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    context: int = 4096,
    vocabulary: int = 32000,
) -> _Model:
    """Llama 2, arXiv 2307.09288, and the small models of its shape."""
    shape = _shape(
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
    )
    return _Model(shape, {"rms_norm_eps": 1e-5})


def _llama3(hidden: int, intermediate: int, layers: int, heads: int) -> _Model:
    """Llama 3, arXiv 2407.21783, table 3; the first release, with its context of 8192."""
    shape = _shape(
        hidden,
        intermediate,
        layers,
        heads,
        8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    settings = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return _Model(shape, settings)


def _mistral_7b() -> _Model:
    """Mistral 7B v0.1, arXiv 2310.06825."""
    shape = _shape(
        4096,
        14336,
        32,
        32,
        8,
        vocab_size=32000,
        max_position_embeddings=32768,
        model_type="mistral",
        sliding_window=4096,
    )
    return _Model(shape, {"rms_norm_eps": 1e-5})


_TABLE: dict[str, _Model] = {
    "llama1-7b": _llama1(4096, 11008, 32, 32),
    "llama1-13b": _llama1(5120, 13824, 40, 40),
    "llama1-30b": _llama1(6656, 17920, 60, 52),
    "llama1-65b": _llama1(8192, 22016, 80, 64),
    "llama2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama3-8b": _llama3(4096, 14336, 32, 32),
    "llama3-70b": _llama3(8192, 28672, 80, 64),
    "mistral-7b": _mistral_7b(),
    # Chosen for a CPU; heads and key-value heads divide by 2 and 4, so it runs under tp and sp.
    "tiny": _llama2(256, 688, 4, 8, 4, context=512, vocabulary=4096),
    # 160m and 460m are the shapes of TeenyTinyLlama, 1.1b that of TinyLlama.
    "160m": _llama2(768, 3072, 12, 12, 12, context=2048),
    "460m": _llama2(1024, 4096, 24, 16, 16, context=2048),
    "1.1b": _llama2(2048, 5632, 22, 32, 4, context=2048),
}

# The names of the original recipe: LLaMA-2 where the two share a size.
ALIASES = {
    "7b": "llama2-7b",
    "13b": "llama2-13b",
    "30b": "llama1-30b",
    "65b": "llama1-65b",
    "70b": "llama2-70b",
}
_TABLE |= {alias: _TABLE[name] for alias, name in ALIASES.items()}

SHAPES: dict[str, Shape] = {name: model.shape for name, model in _TABLE.items()}
MODELS: dict[str, Callable[[], LlamaConfig | MistralConfig]] = {
    name: model.config for name, model in _TABLE.items()
}

# "sample" is the tokenizer trained on the built-in sample.
DEFAULT_TOKENIZERS: dict[str, str] = dict.fromkeys(MODELS, LLAMA_TOKENIZER) | {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "tiny": "sample",
}


def model_config(name_or_path: str) -> LlamaConfig | MistralConfig:
    """The configuration behind a table name, a config.json, a Hugging Face folder or a hub id.

    Raises UserError when there is none, when it is of another kind than llama and mistral, or when
    a value that a `Shape` has makes no sense.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path]()
    content = _hugging_face_config(name_or_path)
    shape = _shape_of(name_or_path, content)

    from transformers import LlamaConfig, MistralConfig

    # Code beside a model is not run; nor is its name handed on to whoever loads what is saved.
    content.pop("auto_map", None)
    kinds: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig}
    return kinds[shape.model_type].from_dict(content)


def _hugging_face_config(name_or_path: str) -> dict[str, Any]:
    path = _local_config(name_or_path)
    if path is not None:
        _read_object(name_or_path, path)

    from transformers import PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(name_or_path if path is None else str(path))
    except (OSError, ValueError) as error:
        if path is not None:
            raise UserError(f"model {name_or_path}: not a model configuration: {error}") from error
        reason = str(error).splitlines()[0]
        raise UserError(f"{_not_found(name_or_path)}; the hub said: {reason}") from error
    return content


def _local_config(name_or_path: str) -> Path | None:
    """The config.json of a file or folder on this machine; None for a hub id."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        inside = path / "model"
        found = (inside / "config.json").is_file()
        raise UserError(
            f"model {name_or_path}: the folder has no config.json; expected a Hugging Face folder"
            + (f", did you mean {inside}?" if found else "")
        )
    if path.exists():
        return path
    if not _is_hub_id(name_or_path):
        raise UserError(_not_found(name_or_path))
    return None


# What transformers takes for a key that a config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
# Keys of the other kind mean nothing to transformers' model.
_UNUSED = {"llama": ["sliding_window"], "mistral": ["attention_bias", "mlp_bias"]}


def model_shape(name_or_path: str) -> Shape:
    """The shape behind a table name, a config.json, a Hugging Face folder or a hub id.

    Of a hub id only what an earlier run has left in the cache is read: nothing is downloaded.

    Raises:
        UserError: there is no such model here, or it is of another kind than llama and mistral.
    """
    if name_or_path in SHAPES:
        return SHAPES[name_or_path]
    path = _local_config(name_or_path) or _cached_config(name_or_path)
    return _shape_of(name_or_path, _read_object(name_or_path, path))


def _read_object(name_or_path: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {name_or_path}: not a model configuration: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"model {name_or_path}: not a model configuration: {path} is no object")
    return content


def _shape_of(name_or_path: str, content: dict[str, Any]) -> Shape:
    """The shape in a config.json; one UserError for every value that cannot be one."""
    kind = _known_kind(name_or_path, content.get("model_type"))
    given = {name: content[name] for name in Shape.__dataclass_fields__ if name in content}
    values = _DEFAULTS[kind] | given | {"model_type": kind}
    for name in _UNUSED[kind]:
        values.pop(name, None)
    problems = [
        f"model {name_or_path}: {name} is {values[name]!r} in its configuration, expected "
        f"{expected}"
        for expected, (names, is_right) in _EXPECTED.items()
        for name in names
        if name in values and not is_right(values[name])
    ]
    if problems:
        raise UserError(problems)
    heads = values["num_attention_heads"]
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        values["head_dim"] = values["hidden_size"] // heads
    if heads % values["num_key_value_heads"]:
        raise UserError(
            f"model {name_or_path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {values['num_key_value_heads']}; each of these serves equally "
            "many of those"
        )
    return Shape(**values)


def _is_whole(value: Any) -> bool:
    # True is an int to Python.
    return type(value) is int and value > 0


def _is_whole_or_none(value: Any) -> bool:
    return value is None or _is_whole(value)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


# What a value has to be, and of which keys.
_EXPECTED: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "a whole number above 0": (tuple(_DEFAULTS["llama"]), _is_whole),
    "a whole number above 0, or null": (
        ("num_key_value_heads", "head_dim", "sliding_window"),
        _is_whole_or_none,
    ),
    "true or false": (
        ("tie_word_embeddings", "attention_bias", "mlp_bias"),
        lambda value: isinstance(value, bool),
    ),
    "a number from 0 to 1": (("attention_dropout",), _is_share),
}


def _cached_config(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise UserError(f"{_not_found(name)}; the hub said: {error}") from error
    if not isinstance(found, str):
        raise UserError(
            f"{_not_found(name)}; of a hub id only the cache is read here, and {name} is not in it"
        )
    return Path(found)


def _known_kind(name_or_path: str, kind: Any) -> str:
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(
            f"model {name_or_path}: got the model type {kind!r}, expected one of "
            f"{', '.join(_DEFAULTS)}; give a Llama-like model to --config or --model_path"
        )
    return kind


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding and of the head under hybrid_parallel, all tensor-parallel ranks."""
    multiple = VOCABULARY_MULTIPLE * tp
    return math.ceil(vocab_size / multiple) * multiple


def _is_hub_id(name: str) -> bool:
    """owner/name; everything else with a slash, or without one, is a path or a misspelt name."""
    owner, slash, model = name.partition("/")
    is_path = name.startswith((".", "~", os.sep)) or name.endswith(".json")
    return bool(slash and owner and model) and "/" not in model and not is_path


def _not_found(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), MODELS, n=1)
    return (
        f"no model {name!r}; expected one of {', '.join(MODELS)}, or a config.json, a Hugging Face "
        "folder or a hub id" + (f"; did you mean --config {near[0]}?" if near else "")
    )

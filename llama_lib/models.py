"""The table of model shapes, and where else a shape may come from.

Invariant: a name of the table is the published model to the unit; nothing here imports transformers
before a configuration is asked for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lib.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig

LLAMA_TOKENIZER = "hf-internal-testing/llama-tokenizer"


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **others,
    )


def _llama1(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """LLaMA, arXiv 2302.13971, table 2."""
    return _llama(
        hidden,
        intermediate,
        layers,
        heads,
        heads,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )


def _llama2(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    context: int = 4096,
    vocabulary: int = 32000,
) -> LlamaConfig:
    """Llama 2, arXiv 2307.09288, and the small models of its shape."""
    return _llama(
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
    )


def _llama3(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """Llama 3, arXiv 2407.21783, table 3; the first release, with its context of 8192."""
    return _llama(
        hidden,
        intermediate,
        layers,
        heads,
        8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128001,
    )


def _mistral_7b() -> MistralConfig:
    """Mistral 7B v0.1, arXiv 2310.06825."""
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
    )


MODELS: dict[str, Callable[[], LlamaConfig | MistralConfig]] = {
    "llama1-7b": lambda: _llama1(4096, 11008, 32, 32),
    "llama1-13b": lambda: _llama1(5120, 13824, 40, 40),
    "llama1-30b": lambda: _llama1(6656, 17920, 60, 52),
    "llama1-65b": lambda: _llama1(8192, 22016, 80, 64),
    "llama2-7b": lambda: _llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": lambda: _llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": lambda: _llama2(8192, 28672, 80, 64, 8),
    "llama3-8b": lambda: _llama3(4096, 14336, 32, 32),
    "llama3-70b": lambda: _llama3(8192, 28672, 80, 64),
    "mistral-7b": _mistral_7b,
    # Chosen for a CPU; heads and key-value heads divide by 2 and 4, so it runs under tp and sp.
    "tiny": lambda: _llama2(256, 688, 4, 8, 4, context=512, vocabulary=4096),
    # 160m and 460m are the shapes of TeenyTinyLlama, 1.1b that of TinyLlama.
    "160m": lambda: _llama2(768, 3072, 12, 12, 12, context=2048),
    "460m": lambda: _llama2(1024, 4096, 24, 16, 16, context=2048),
    "1.1b": lambda: _llama2(2048, 5632, 22, 32, 4, context=2048),
}

# The names of the original recipe: LLaMA-2 where the two share a size.
ALIASES = {
    "7b": "llama2-7b",
    "13b": "llama2-13b",
    "30b": "llama1-30b",
    "65b": "llama1-65b",
    "70b": "llama2-70b",
}
MODELS |= {alias: MODELS[name] for alias, name in ALIASES.items()}

# "sample" is the tokenizer trained on the built-in sample.
DEFAULT_TOKENIZERS: dict[str, str] = dict.fromkeys(MODELS, LLAMA_TOKENIZER) | {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "tiny": "sample",
}


def model_config(name_or_path: str) -> LlamaConfig | MistralConfig:
    """The configuration behind a table name, a config.json, a Hugging Face folder or a hub id.

    Raises UserError when there is none, or when it is of another kind than llama and mistral.
    """
    if name_or_path in MODELS:
        return MODELS[name_or_path]()
    content = _hugging_face_config(name_or_path)

    from transformers import LlamaConfig, MistralConfig

    kinds: dict[Any, Any] = {"llama": LlamaConfig, "mistral": MistralConfig}
    kind = content.get("model_type")
    if kind not in kinds:
        raise UserError(
            f"model {name_or_path}: got the model type {kind!r}, expected one of "
            f"{', '.join(kinds)}; give a Llama-like model to --config or --model_path"
        )
    return kinds[kind].from_dict(content)


def _hugging_face_config(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path).expanduser()
    is_local = path.exists()
    if path.is_dir() and not (path / "config.json").is_file():
        inside = path / "model"
        found = (inside / "config.json").is_file()
        raise UserError(
            f"model {name_or_path}: the folder has no config.json; expected a Hugging Face folder"
            + (f", did you mean {inside}?" if found else "")
        )
    if not is_local and not _is_hub_id(name_or_path):
        raise UserError(_not_found(name_or_path))

    from transformers import PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(str(path) if is_local else name_or_path)
    except (OSError, ValueError) as error:
        if is_local:
            raise UserError(f"model {name_or_path}: not a model configuration: {error}") from error
        reason = str(error).splitlines()[0]
        raise UserError(f"{_not_found(name_or_path)}; the hub said: {reason}") from error
    return content


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

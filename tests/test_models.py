"""The model table against transformers' own models and the published sizes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from llama_lib.errors import UserError
from llama_lib.flops import num_parameters
from llama_lib.models import DEFAULT_TOKENIZERS, MODELS, model_config

# As counted on the published weights (Hugging Face model cards).
PUBLISHED = {
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-30b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "160m": 162_417_408,
    "460m": 468_239_360,
    "1.1b": 1_100_048_384,
    "tiny": 4_999_424,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_to_the_unit(name):
    config = MODELS[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == PUBLISHED[name]
    assert num_parameters(config) == PUBLISHED[name]


def test_table_is_complete():
    aliases = {"7b", "13b", "30b", "65b", "70b"}
    assert set(MODELS) == set(PUBLISHED) | aliases
    assert set(DEFAULT_TOKENIZERS) == set(MODELS)
    # LLaMA-2 where the two generations share a size.
    assert {name: MODELS[name]().max_position_embeddings for name in aliases} == {
        "7b": 4096,
        "13b": 4096,
        "70b": 4096,
        "30b": 2048,
        "65b": 2048,
    }


@pytest.mark.parametrize(
    ("name", "context", "vocabulary", "kv_heads", "theta", "epsilon"),
    [
        ("llama1-65b", 2048, 32000, 64, 1e4, 1e-6),
        ("llama2-7b", 4096, 32000, 32, 1e4, 1e-5),
        ("llama2-70b", 4096, 32000, 8, 1e4, 1e-5),
        ("llama3-8b", 8192, 128256, 8, 5e5, 1e-5),
        ("llama3-70b", 8192, 128256, 8, 5e5, 1e-5),
        ("mistral-7b", 32768, 32000, 8, 1e4, 1e-5),
        ("1.1b", 2048, 32000, 4, 1e4, 1e-5),
        ("tiny", 512, 4096, 4, 1e4, 1e-5),
    ],
)
def test_published_settings(name, context, vocabulary, kv_heads, theta, epsilon):
    config = model_config(name)
    assert config.max_position_embeddings == context
    assert config.vocab_size == vocabulary
    assert config.num_key_value_heads == kv_heads
    assert config.rope_theta == theta
    assert config.rms_norm_eps == epsilon


def test_every_call_makes_a_new_config():
    model_config("tiny").hidden_size = 1
    assert model_config("tiny").hidden_size == 256


def test_config_from_file_and_folder(tmp_path):
    config = MODELS["mistral-7b"]()
    config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        loaded = model_config(str(source))
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert type(loaded) is type(config)


def refusal(name_or_path: str) -> str:
    with pytest.raises(UserError) as caught:
        model_config(name_or_path)
    return str(caught.value)


def test_misspelt_name_names_the_nearest():
    message = refusal("lama2-7b")
    assert "did you mean --config llama2-7b?" in message
    assert "mistral-7b" in message


def test_other_model_types_are_refused_by_name(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    assert "'gpt2', expected one of llama, mistral" in refusal(str(tmp_path))


def test_remote_code_is_never_run(tmp_path):
    content = LlamaConfig().to_dict() | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    assert type(model_config(str(tmp_path))) is LlamaConfig


def test_paths_that_hold_no_config(tmp_path):
    assert "no config.json" in refusal(str(tmp_path))
    assert "no model" in refusal(str(tmp_path / "missing"))
    assert "no model" in refusal("configs/missing.json")
    (tmp_path / "bad.json").write_text("{")
    assert "not a model configuration" in refusal(str(tmp_path / "bad.json"))
    shutil.copytree(tmp_path, tmp_path / "checkpoint" / "model")
    MODELS["tiny"]().save_pretrained(tmp_path / "checkpoint" / "model")
    assert f"did you mean {tmp_path}/checkpoint/model?" in refusal(str(tmp_path / "checkpoint"))


def test_hub_id_without_a_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/no-such-model")
    assert "no model 'nobody/no-such-model'" in message
    assert "the hub said: " in message

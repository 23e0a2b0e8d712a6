"""The model table against transformers' own models and the published sizes."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from llama_lib.errors import UserError
from llama_lib.flops import num_parameters
from llama_lib.models import DEFAULT_TOKENIZERS, MODELS, Shape, model_config, model_shape

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


# -- shapes, read without transformers -------------------------------------------------------------


def described(config) -> Shape:
    """What transformers' configuration says, as a Shape."""
    names = [field.name for field in fields(Shape)]
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if config.model_type == "llama":
        values.pop("sliding_window", None)
    return Shape(**values)


@pytest.mark.parametrize("name", MODELS)
def test_shape_of_the_table_is_its_config(name):
    assert model_shape(name) == described(MODELS[name]())
    assert num_parameters(model_shape(name)) == num_parameters(MODELS[name]())


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "llama"},
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 4},
        {"model_type": "mistral", "num_key_value_heads": None},
        {"model_type": "llama", "head_dim": 64, "num_key_value_heads": 8},
        {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
        {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
        {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "mlp_bias": True},
        {"model_type": "llama", "sliding_window": 512, "attention_dropout": 0.1},
        {"model_type": "mistral", "attention_bias": True},
    ],
)
def test_shape_of_a_file_is_what_transformers_makes_of_it(tmp_path, content):
    """Keys that are left out have transformers' defaults."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    expected = described(model_config(str(path)))
    if content["model_type"] == "mistral":
        expected = replace(expected, attention_bias=False, mlp_bias=False)
    assert model_shape(str(path)) == model_shape(str(tmp_path)) == expected


def test_shapes_are_refused_as_configs_are(tmp_path):
    def shape_refusal(name) -> str:
        with pytest.raises(UserError) as caught:
            model_shape(str(name))
        return str(caught.value)

    assert shape_refusal("lama2-7b") == refusal("lama2-7b")
    assert shape_refusal(tmp_path) == refusal(str(tmp_path))
    GPT2Config().save_pretrained(tmp_path)
    assert shape_refusal(tmp_path) == refusal(str(tmp_path))
    path = tmp_path / "other.json"
    for text in ("{", "[]"):
        path.write_text(text)
        assert "not a model configuration" in shape_refusal(path)
        assert "not a model configuration" in refusal(str(path))
    path.write_text('{"model_type": "llama", "hidden_size": "4096", "num_hidden_layers": 0}')
    assert "hidden_size is '4096'" in shape_refusal(path)
    assert "num_hidden_layers is 0" in shape_refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_key_value_heads": "8"}, "num_key_value_heads is '8'"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 8.0}, "num_key_value_heads is 8.0"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": "128"}, "head_dim is '128'"),
        ({"head_dim": [128]}, r"head_dim is \[128\]"),
        ({"num_key_value_heads": 5}, "32 is no multiple of num_key_value_heads 5"),
        ({"num_attention_heads": 30, "num_key_value_heads": 4}, "30 is no multiple of"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'.*expected true or"),
        ({"attention_bias": 1}, "attention_bias is 1.*expected true or false"),
        ({"mlp_bias": None}, "mlp_bias is None.*expected true or false"),
        ({"vocab_size": None}, "vocab_size is None.*expected a whole number above 0"),
        ({"attention_dropout": "no"}, "attention_dropout is 'no'.*a number from 0 to 1"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window is '4096'"),
        ({"model_type": ["llama"]}, r"got the model type \['llama'\]"),
        ({"model_type": {"name": "llama"}}, "got the model type {'name': 'llama'}"),
        ({"model_type": None}, "got the model type None"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(tmp_path, content, message):
    """By the reader without transformers and by the one with it, in one message each."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama"} | content))
    for reader in (model_shape, model_config):
        with pytest.raises(UserError, match=message):
            reader(str(path))


def test_all_wrong_values_are_named_at_once(tmp_path):
    path = tmp_path / "config.json"
    content = {"model_type": "llama", "head_dim": -1, "hidden_size": "x", "mlp_bias": "no"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        model_shape(str(path))
    for name in ("head_dim is -1", "hidden_size is 'x'", "mlp_bias is 'no'"):
        assert name in str(caught.value)


def test_shape_of_a_hub_id_is_read_from_the_cache_only(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/some-llama is not in it"):
        model_shape("nobody/some-llama")
    folder = tmp_path / "models--nobody--some-llama"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    MODELS["160m"]().save_pretrained(folder / "snapshots" / "abc")
    assert model_shape("nobody/some-llama") == model_shape("160m")
    with pytest.raises(UserError, match="the hub said"):
        model_shape("no..body/some--llama")

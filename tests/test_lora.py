"""Adapters in one process: what is refused, what a checkpoint remembers of its base, and peft."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_lib import host
from llama_lib.errors import UserError

host.install()

from llama_lib.checkpoint import store, verify, writing  # noqa: E402
from llama_lib.checkpoint.adapters import other_base  # noqa: E402
from llama_lib.config import Options, parse_options  # noqa: E402
from llama_lib.layout import layout_of  # noqa: E402
from llama_lib.lora import adapter_parameters, merge, new_token_problems  # noqa: E402
from llama_lib.option_checks import adapter_problems  # noqa: E402
from tests.distributed.lora_checks import (  # noqa: E402
    adapter_hash,
    base_folder,
    build,
    save,
    train_step,
)

if torch.cuda.is_available():
    pytest.skip("tests/gpu has these on a GPU", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def base(one_process, tmp_path_factory) -> Path:
    return base_folder("zero2", tmp_path_factory.mktemp("base"))


# -- refused ---------------------------------------------------------------------------------------


def problems(flags: str, world_size: int = 4, new_tokens: int = 0) -> list[str]:
    options: Options = parse_options("finetune", f"-d unused --model_path unused {flags}".split())
    layout = layout_of(options, world_size)
    return adapter_problems(options, layout) + new_token_problems(options, new_tokens)


@pytest.mark.parametrize(
    "plugin", ["zero2", "zero2_cpu", "hybrid_parallel", "hybrid_parallel --zero_stage 2"]
)
def test_nothing_is_said_where_adapters_work(plugin):
    assert problems(f"--lora_rank 8 -p {plugin}") == []
    assert problems("-p gemini", new_tokens=2) == [], "without adapters nothing is asked"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--lora_rank 8 -p gemini",
            "with -p gemini: .* use -p zero2, zero2_cpu or hybrid_parallel",
        ),
        ("--lora_rank 8 -p gemini_auto", "with -p gemini_auto: "),
        ("--lora_rank 8 -p hybrid_parallel --tp 2", "with --tp 2: .* use --tp 1"),
        ("--lora_rank 8 -p hybrid_parallel --pp 2", "with --pp 2: .* use --pp 1"),
        (
            "--lora_rank 8 -p hybrid_parallel --sp 2 --sp_mode all_to_all",
            "with --sp 2: .* use --sp 1",
        ),
        (
            "--lora_rank 8 -p hybrid_parallel --tp 2 --sp_mode split_gather",
            "with --tp 2: .* use --tp 1",
        ),
        (
            "--lora_rank 8 -p zero2 --lora_targets q_proj query lm_head",
            "--lora_targets query lm_head: no linear layer .* valid: q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj",
        ),
        ("--merge_lora -p zero2", "--merge_lora has no adapters to merge: give --lora_rank"),
    ],
)
def test_what_cannot_work_is_refused_by_name(flags, said):
    (found,) = problems(flags)
    assert re.search(said, found)


def test_no_targets_at_all_are_refused():
    """As a file can give them: with adapters nowhere, nothing would be trained."""
    options = parse_options("finetune", ["-p", "zero2", "--lora_rank", "8"])
    options.model.lora_targets = []
    (found,) = adapter_problems(options, layout_of(options, 1))
    assert re.search("--lora_targets: got no layer, expected some of q_proj, k_proj, ", found)


def test_new_tokens_are_refused_because_nothing_would_train_them():
    (found,) = problems("--lora_rank 8 -p zero2", new_tokens=2)
    assert "adds 2 token(s)" in found and "--chat_template" in found


# -- the same as peft ------------------------------------------------------------------------------


def test_adapters_begin_as_peft_would_begin_them(base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    engine = build("zero2", "fp32", base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    targets = sorted(engine.options.model.lora_targets)
    reference = get_peft_model(plain, LoraConfig(r=4, lora_alpha=32, target_modules=targets))
    theirs = dict(adapter_parameters(reference.get_base_model()))
    ours = dict(adapter_parameters(engine.module))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.shape == theirs[name].shape, name
        if ".lora_B." in name:
            assert not parameter.any()
        else:  # a uniform distribution within the same bound
            largest, spread = theirs[name].abs().max().item(), theirs[name].std().item()
            assert parameter.abs().max().item() == pytest.approx(largest, rel=0.1)
            assert parameter.std().item() == pytest.approx(spread, rel=0.25)
    assert len({float(p.flatten()[0]) for n, p in ours.items() if ".lora_A." in n}) == len(ours) / 2
    other = build("zero2", "fp32", base)
    assert adapter_hash(other) == adapter_hash(engine)


def test_merging_is_what_peft_merges(base, tmp_path):
    from peft import AutoPeftModelForCausalLM

    engine = build("zero2", "fp32", base)
    for step in (1, 2, 3):
        train_step(engine, step)
    adapter = save(engine, tmp_path, 3) / "adapter"
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    for name, expected in theirs.named_parameters():
        layer = name.replace(".weight", "")
        plain = engine.module.get_submodule(layer)
        weight = getattr(plain, "base_layer", plain).weight
        torch.testing.assert_close(merge(engine.module, name, weight), expected)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def saved(base, tmp_path) -> tuple[Any, Path]:
    engine = build("zero2", "bf16", base)
    train_step(engine, 1)
    return engine, save(engine, tmp_path, 1)


def adapter_config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())


def test_a_checkpoint_of_adapters_is_small_and_names_its_base(saved, base):
    engine, path = saved
    assert verify.checkpoint_problems(path) == []
    assert not (path / "model").exists()
    assert adapter_config(path)["base_model_name_or_path"] == str(base.resolve())
    assert adapter_config(path)["r"] == 4
    trained = sum(shape[0] * shape[1] for shape in engine.trained.values())
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    assert trained * 14 < size < trained * 14 * 1.25
    assert writing.checkpoint_bytes(engine) < size * 1.1


def test_damaged_adapters_are_found(saved):
    _, path = saved
    file = path / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert verify.checkpoint_problems(path) == [
        "adapter/adapter_model.safetensors: contents changed (SHA-256 differs)"
    ]


def load(engine: Any, path: Path) -> None:
    store.load(engine, path, store.read_state(path))


def test_adapters_on_another_base_are_refused(saved, base, tmp_path):
    _, path = saved
    other = base_folder("zero2", tmp_path, seed=8)
    engine = build("zero2", "bf16", other)
    with pytest.raises(UserError) as raised:
        load(engine, path)
    assert f"trained on {base.resolve()}" in str(raised.value)
    assert f"--model_path {other.resolve()} is another" in str(raised.value)


def test_the_same_base_in_another_precision_is_no_other(saved, base):
    trained, path = saved
    engine = build("zero2", "fp32", base)
    load(engine, path)
    assert adapter_hash(engine) == adapter_hash(trained)


@pytest.mark.parametrize("size", [1.0, 6e-5, 1e-6, 1e-8])
def test_the_same_base_is_known_in_16_bits_of_either_kind(size):
    """fp16 has no relative precision below 6e-5: a slack in shares refused the right base."""
    torch.manual_seed(0)
    weights = torch.randn(2000).bfloat16() * size
    in_bf16, in_fp16 = (
        {"weight": weights.to(kind).tolist()} for kind in (weights.dtype, torch.half)
    )
    assert other_base(in_bf16, in_fp16, same_precision=False) is None
    assert other_base(in_fp16, in_bf16, same_precision=False) is None


def test_another_base_of_small_values_is_still_found():
    for one, other, same in [
        (1e-6, 1.01e-6, True),
        (1e-6, 1.1e-6, False),
        (1e-5, 1.01e-5, False),
        (0.02, 0.0202, False),
    ]:
        assert other_base({"weight": [one]}, {"weight": [other]}, same) == "weight"


def test_a_run_continued_without_naming_its_base_still_names_it(saved, base, tmp_path):
    _, path = saved
    engine = build("zero2", "bf16", base)
    engine_config = engine.model.unwrap(unwrap_peft=False).peft_config["default"]
    engine_config.base_model_name_or_path = None  # as with --load and no --model_path
    load(engine, path)
    again = save(engine, tmp_path / "again", 2)
    assert adapter_config(again)["base_model_name_or_path"] == str(base.resolve())


def test_other_adapters_and_whole_models_do_not_load(saved, base, tmp_path, monkeypatch):
    from tests.distributed import checks, lora_checks

    _, path = saved
    monkeypatch.setattr(lora_checks, "RANK", 2)
    smaller = build("zero2", "bf16", base)
    with pytest.raises(UserError, match=r"do not fit the model: .*shape \[4, 64\].*--lora_rank"):
        load(smaller, path)
    whole = checks.build("zero2", "bf16")
    state = store.TrainerState(1, 0, 0, 0, 42, {})
    full = store.save(whole, state, None, str(tmp_path / "whole"), None)
    with pytest.raises(UserError, match="has no adapters"):
        load(smaller, full)

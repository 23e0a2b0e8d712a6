"""FLOP formulas against torch's own counter on real models, and against published rows."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lib import flops
from llama_lib.models import MODELS
from llama_lib.recompute import use_recompute

BATCH, SEQUENCE = 2, 24


def config(**changes) -> LlamaConfig:
    shape = {
        "vocab_size": 72,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
        "use_cache": False,
    }
    return LlamaConfig(**(shape | changes))


def counted(model: LlamaForCausalLM) -> int:
    """FLOPs of a forward and backward pass, without the outer product that makes rotary angles."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, SEQUENCE))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as rotary:
        model.model.rotary_emb(torch.zeros(1), torch.arange(SEQUENCE)[None])
    return counter.get_total_flops() - rotary.get_total_flops()


SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1},
    {"head_dim": 16},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_model_flops_are_what_torch_counts(changes):
    shape = config(**changes)
    expected = BATCH * SEQUENCE * flops.model_flops_per_token(shape, SEQUENCE)
    assert counted(LlamaForCausalLM(shape)) == expected


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_hardware_flops_are_what_torch_counts(changes, mode):
    shape = config(**changes)
    model = LlamaForCausalLM(shape).train()
    use_recompute(model, mode)
    expected = BATCH * SEQUENCE * flops.hardware_flops_per_token(shape, SEQUENCE, mode)
    assert counted(model) == expected


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_lora_flops_are_what_torch_counts(changes, targets):
    from peft import LoraConfig, get_peft_model

    shape = config(**changes)
    model = LlamaForCausalLM(shape)
    # As for the inputs of every other layer; without, the first one does less than the formula.
    model.enable_input_require_grads()
    # peft puts the adapters into `model` itself.
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = wrapped.get_nb_trainable_parameters()[0]
    assert trained == sum(each.numel() for each in model.parameters() if each.requires_grad)
    per_token = flops.lora_flops_per_token(shape, SEQUENCE, trained)
    assert counted(model) == BATCH * SEQUENCE * per_token
    assert per_token < flops.model_flops_per_token(shape, SEQUENCE)


@pytest.mark.parametrize("changes", [*SHAPES, {"attention_bias": True}, {"mlp_bias": True}])
def test_parameters_are_those_of_the_model(changes):
    shape = config(**changes)
    model = LlamaForCausalLM(shape)
    assert flops.num_parameters(shape) == sum(each.numel() for each in model.parameters())
    linear = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
    assert flops.matmul_parameters(shape) == sum(each.weight.numel() for each in linear)


def test_causal_counts_half_of_the_attention():
    shape = MODELS["7b"]()
    full = flops.model_flops_per_token(shape, 4096)
    causal = flops.causal_flops_per_token(shape, 4096)
    assert full - causal == 6 * 32 * 4096 * 4096
    # The orders of magnitude that the field quotes for this model at this length.
    assert full / 1e9 == pytest.approx(46.1, abs=0.05)
    assert causal / 1e9 == pytest.approx(42.9, abs=0.05)


@pytest.mark.parametrize(
    ("model", "sequence", "gpus", "samples_per_second", "formula", "published"),
    [
        ("7b", 4096, 32, 24.26, "colossalai_8n", 167.43),
        ("65b", 2048, 32, 5.29, "colossalai_8n", 176.84),
        ("7b", 4096, 8, 17.13, "megatron_2021", 534.18),
        ("7b", 4096, 8, 25.83, "megatron_2021", 805.69),
        ("70b", 4096, 16, 3.27, "megatron_2021", 469.1),
        ("70b", 4096, 16, 5.66, "megatron_2021", 811.79),
    ],
)
def test_published_rows(model, sequence, gpus, samples_per_second, formula, published):
    """ColossalAI's rows: samples per second of all GPUs, and the TFLOPS per GPU beside them."""
    shape = MODELS[model]()
    if formula == "colossalai_8n":
        per_token = flops.colossalai_8n(shape, checkpointing=True)
    else:
        per_token = flops.megatron_2021(shape, sequence, checkpointing=True)
    # The published rate has two decimals, which is all the freedom there is.
    low, high = (
        flops.tflops_per_gpu(per_token, (samples_per_second + off) * sequence, gpus)
        for off in (-0.005, 0.005)
    )
    assert low < published < high


@pytest.mark.parametrize(
    ("model", "sequence", "tokens_per_second", "formula", "published"),
    [
        # NeMo's tables, Llama-3 8B and 70B
        ("llama3-8b", 8192, 14_451, "causal", 744),
        ("llama3-8b", 8192, 14_079, "causal", 725),
        ("llama3-8b", 8192, 30_624, "causal", 1576),
        ("llama3-70b", 4096, 1_638, "causal", 710),
        # torchtitan, fms-fsdp, ColossalAI: the full-attention column of reference/performance.md
        ("llama3-8b", 8192, 2_973, "model", 172.2),
        ("llama3-8b", 8192, 5_762, "model", 333.7),
        ("7b", 4096, 9_600, "model", 442.4),
        ("7b", 4096, 8_771, "model", 404.2),
        ("70b", 4096, 837, "model", 372),
    ],
)
def test_published_model_flops(model, sequence, tokens_per_second, formula, published):
    """Tokens per second and GPU, and the TFLOPS that others count for them."""
    shape = MODELS[model]()
    count = {"causal": flops.causal_flops_per_token, "model": flops.model_flops_per_token}[formula]
    found = flops.tflops_per_gpu(count(shape, sequence), tokens_per_second, 1)
    assert found == pytest.approx(published, rel=1e-3)


def test_the_same_run_under_four_names():
    """ColossalAI's H200 row, 7B: one rate, and what each convention makes of it (TFLOPS)."""
    shape, rate = MODELS["7b"](), 17.13 * 4096 / 8
    counts = [
        flops.megatron_2021(shape, 4096, True),
        flops.colossalai_8n(shape, True),
        flops.model_flops_per_token(shape, 4096),
        flops.causal_flops_per_token(shape, 4096),
    ]
    found = [round(flops.tflops_per_gpu(count, rate, 1)) for count in counts]
    assert found == [534, 473, 404, 376]


def test_legacy_formulas_without_checkpointing():
    shape = MODELS["7b"]()
    assert flops.colossalai_8n(shape, False) == 6 * 6_738_415_616
    with_it = flops.megatron_2021(shape, 4096, True)
    assert flops.megatron_2021(shape, 4096, False) == pytest.approx(with_it * 3 / 4)


def test_utilization_is_known_or_none():
    assert flops.peak_tflops("NVIDIA H200", "bf16") == 989.4
    assert flops.peak_tflops("NVIDIA A800-SXM4-80GB", "fp16") == 312
    assert flops.model_flops_utilization(494.7, "NVIDIA H200", "bf16") == pytest.approx(0.5)
    for device, precision in [
        ("NVIDIA H20", "bf16"),
        ("NVIDIA H200 NVL", "bf16"),
        ("cpu", "bf16"),
        ("NVIDIA H200", "fp32"),
        ("Tesla V100-SXM2-32GB", "bf16"),
    ]:
        assert flops.model_flops_utilization(100.0, device, precision) is None
    assert flops.peak_tflops("Tesla V100-SXM2-32GB", "fp16") == 125

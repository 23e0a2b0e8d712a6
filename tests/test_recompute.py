"""Recomputation in transformers' own models: same bits, known memory, no product twice."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llama_lib import recompute
from llama_lib.config import parse_options
from llama_lib.layout import layout_of
from llama_lib.option_checks import recompute_problems

BATCH, LENGTH = 2, 24
SHAPE: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def model(
    mode: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(**(SHAPE | {"attn_implementation": attention} | changes))
    built = LlamaForCausalLM(config).to(dtype).train()
    recompute.use_recompute(built, mode)
    return built


def ids() -> torch.Tensor:
    return torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % SHAPE["vocab_size"]


def loss_of(built: Any) -> torch.Tensor:
    return built(input_ids=ids(), labels=ids()).loss


def outcome(built: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, gradients, FLOPs) of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(built)
        loss.backward()
    gradients = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    return loss.item(), gradients, counter.get_total_flops()


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in found if not torch.equal(found[name], expected[name])]
    assert differing == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_are_the_same_to_the_bit(attention, dtype):
    loss, gradients, flops = outcome(model("none", attention, dtype))
    assert len(gradients) == 3 + 9 * SHAPE["num_hidden_layers"]
    for mode in ("selective", "full"):
        again = outcome(model(mode, attention, dtype))
        assert again[0] == loss
        assert_same_bits(again[1], gradients)
        if mode == "selective":
            assert again[2] == flops, "a product was computed twice"
        else:
            assert again[2] > flops, "nothing was computed again"


def test_dropout_in_attention_falls_on_the_same_weights():
    """With dropout CPU attention is made of products, and its random mask comes again."""
    reference = model("none", attention_dropout=0.5)
    torch.manual_seed(3)
    loss, gradients, _ = outcome(reference)
    assert loss != outcome(model("none"))[0]
    for mode in ("selective", "full"):
        other = model(mode, attention_dropout=0.5)
        torch.manual_seed(3)
        again = outcome(other)
        assert again[0] == loss
        assert_same_bits(again[1], gradients)


def test_biases_and_mistral():
    for changes in ({"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}):
        loss, gradients, flops = outcome(model("none", **changes))
        again = outcome(model("selective", **changes))
        assert (again[0], again[2]) == (loss, flops)
        assert_same_bits(again[1], gradients)
    results = []
    for mode in ("none", "selective"):
        torch.manual_seed(1)
        built = MistralForCausalLM(MistralConfig(**SHAPE, attn_implementation="sdpa")).train()
        recompute.use_recompute(built, mode)
        results.append(outcome(built))
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2]
    assert_same_bits(results[1][1], results[0][1])


def test_adapters():
    from peft import LoraConfig, get_peft_model

    results = []
    for mode in ("none", "selective", "full"):
        built = model(mode)
        # peft asks for this by itself where layers are recomputed: one gradient more.
        built.enable_input_require_grads()
        # peft puts the adapters into `built` itself; B is zero at first and would hide A's.
        get_peft_model(built, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
        results.append(outcome(built))
    none, selective, full = results
    assert len(none[1]) == 2 * 7 * SHAPE["num_hidden_layers"]
    assert none[0] == selective[0] == full[0]
    assert_same_bits(selective[1], none[1])
    assert_same_bits(full[1], none[1])
    assert none[2] == selective[2] < full[2]


# -- memory ----------------------------------------------------------------------------------------


@contextmanager
def kept_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What every layer keeps beside autograd's saved tensors."""
    kept: list[Any] = []
    plain = recompute.selective_contexts

    def noted() -> Any:
        keeping, serving = plain()
        kept.append(keeping.results)
        return keeping, serving

    with monkeypatch.context() as patch:
        patch.setattr(recompute, "selective_contexts", noted)
        yield kept


def held_bytes(monkeypatch: pytest.MonkeyPatch, mode: str, layers: int, dtype: torch.dtype) -> int:
    """Bytes that wait for the backward pass, every storage once, without the weights."""
    with kept_results(monkeypatch) as kept:
        built = model(mode, dtype=dtype, num_hidden_layers=layers)
        held: dict[int, torch.UntypedStorage] = {}

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss_of(built)
        for result in (each for results in kept for _, each in results):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    hold(tensor)
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    return sum(each.nbytes() for where, each in held.items() if where not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_held_by_a_layer(monkeypatch, dtype):
    per_layer = {
        mode: held_bytes(monkeypatch, mode, 3, dtype) - held_bytes(monkeypatch, mode, 2, dtype)
        for mode in ("none", "selective", "full")
    }
    hidden, heads = SHAPE["hidden_size"], SHAPE["num_attention_heads"]
    key_and_value = 2 * hidden // heads * SHAPE["num_key_value_heads"]
    tokens, size = BATCH * LENGTH, dtype.itemsize
    assert per_layer["full"] == tokens * hidden * size
    # The layer's input; q, attention's output and o_proj's; k and v; gate and up. fp32: SDPA's
    # logarithm of the sum of exponentials. down_proj's result is nobody's input.
    elements = 4 * hidden + key_and_value + 2 * SHAPE["intermediate_size"]
    assert per_layer["selective"] == tokens * (elements * size + 4 * heads)
    assert per_layer["full"] < per_layer["selective"] < per_layer["none"]


def test_nothing_is_held_after_the_backward_pass(monkeypatch):
    with kept_results(monkeypatch) as kept:
        loss = loss_of(model("selective"))
        assert len(kept) == SHAPE["num_hidden_layers"]
        # q, k, v, attention, o, gate, up
        assert all(len(results) == 7 for results in kept)
        tensor = weakref.ref(kept[0][0][1])
        loss.backward()
    assert not any(kept)
    assert tensor() is None


def test_a_layer_that_does_something_else_the_second_time_is_an_error():
    built = model("selective")
    loss = loss_of(built)
    # One product more at the beginning of a layer.
    built.model.layers[1].input_layernorm.register_forward_pre_hook(
        lambda _, inputs: (torch.baddbmm(inputs[0], inputs[0], torch.zeros(2, 48, 48)),)
    )
    with pytest.raises(RuntimeError, match="a layer computed again did"):
        loss.backward()


# -- options ---------------------------------------------------------------------------------------


def problems(flags: str, processes: int = 2, has_gpu: bool = False) -> list[str]:
    options = parse_options("pretrain", f"-d unused {flags}".split())
    return recompute_problems(options, layout_of(options, processes), has_gpu)


def test_what_is_refused():
    split = "-p hybrid_parallel --tp 2 --sp_mode split_gather"
    assert problems(f"{split} --recompute full") == []
    (message,) = problems(f"{split} --recompute selective")
    assert "--sp_mode split_gather" in message
    assert problems("-p gemini --recompute selective --document_mask") == []
    assert problems("-p gemini --recompute selective", has_gpu=True) == []
    assert problems("-p gemini -g --document_mask", has_gpu=True) == []
    (message,) = problems("-p gemini --recompute selective --document_mask", has_gpu=True)
    assert "documents" in message

"""--document_mask: kernels against a mask written pair by pair, models against documents alone."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llama_lib import document_attention
from llama_lib.document_attention import (
    KERNELS,
    block_mask,
    document_ends,
    document_kernel,
    document_positions,
    use_document_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "use_cache": False,
}
# Lengths of the documents of each row; 200 is no multiple of FlexAttention's blocks.
ROWS = ([60, 1, 1, 130, 8], [200], [64, 64, 72])


def numbered(rows=ROWS):
    lengths = [torch.tensor(row) for row in rows]
    return torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in lengths]).int()


def random_documents(rows, length, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, length, generator=generator) < share).cumsum(1).int()


def pairs(documents):
    """Which token sees which, [rows, length, length], pair by pair."""
    rows, length = documents.shape
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for row, numbers in enumerate(documents.tolist()):
        for query in range(length):
            for key in range(query + 1):
                seen[row, query, key] = numbers[query] == numbers[key]
    return seen


@pytest.fixture
def every_kernel(monkeypatch):
    """FlexAttention uncompiled, and flash-attn's function in plain torch, document by document."""
    calls = []

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **rest):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        assert rest["causal"] is True and q.dim() == 3 and k.shape[1] < q.shape[1]
        calls.append(len(cu_seqlens_q) - 1)
        output = torch.empty_like(q)
        for start, stop in itertools.pairwise(cu_seqlens_q):
            part = [states[start:stop].transpose(0, 1) for states in (q, k, v)]
            output[start:stop] = scaled_dot_product_attention(
                *part, is_causal=True, scale=rest["softmax_scale"], enable_gqa=True
            ).transpose(0, 1)
        return output

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(document_attention, "compiled_flex_attention", lambda: flex_attention)
    return calls


# -- masks -----------------------------------------------------------------------------------------


def test_the_dense_mask_is_that_of_every_pair():
    documents = numbered(([5, 1, 7], [13], [1, 11, 1]))
    assert torch.equal(
        document_attention.DenseMask.of(documents, CPU).allowed[:, 0], pairs(documents)
    )


@pytest.mark.parametrize("length", [5, 128, 200, 384])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.05, 0.5])
def test_blocks_are_those_torch_makes_from_every_pair(length, share):
    documents = random_documents(2, length, share)
    seen = pairs(documents)

    def mask_mod(row, head, query, key):
        return seen[row, query, key]

    expected = create_block_mask(mask_mod, 2, None, length, length, device="cpu")
    found = block_mask(documents)
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):  # what the backward pass walks through, too
        for table in (f"{kind}_num_blocks", f"{kind}_indices"):
            assert torch.equal(getattr(found, table), getattr(expected, table)), table
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    index = torch.arange(length)
    rows = torch.arange(2)[:, None, None]
    assert torch.equal(found.mask_mod(rows, 0, index[:, None], index), seen)


def test_ends_and_positions_of_documents():
    documents = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0], [0, 1, 1, 1, 2]], dtype=torch.int32)
    # The last document of a row and the first of the next have equal numbers in one place.
    assert document_ends(documents).tolist() == [0, 2, 3, 5, 10, 11, 14, 15]
    assert document_ends(documents).dtype == torch.int32
    assert document_positions(documents).tolist() == [
        [0, 1, 0, 0, 1],
        [0, 1, 2, 3, 4],
        [0, 0, 1, 2, 0],
    ]
    assert document_positions(documents).dtype == torch.int64


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_attends_within_documents(kernel, dtype, every_kernel):
    torch.manual_seed(0)
    documents = numbered()
    query = torch.randn(3, 4, 200, 16)
    key, value = torch.randn(2, 3, 2, 200, 16)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    scores = scores.masked_fill(~pairs(documents)[:, None], -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    mask = KERNELS[kernel](documents, CPU)
    found = mask.attend(query.to(dtype), key.to(dtype), value.to(dtype), 0.3)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        found.float(), expected.transpose(1, 2), rtol=tolerance, atol=tolerance
    )


def test_the_kernel_follows_from_device_and_precision(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it is an ImportError
    document_attention._has_flash_attn.cache_clear()
    gpu = torch.device("cuda", 0)
    assert document_kernel(CPU, torch.bfloat16) == "sdpa_block_mask"
    assert document_kernel(gpu, torch.bfloat16) == "flex_attention"
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    document_attention._has_flash_attn.cache_clear()
    assert document_kernel(gpu, torch.bfloat16) == "flash_attn_varlen"
    assert document_kernel(gpu, torch.float16) == "flash_attn_varlen"
    assert document_kernel(gpu, torch.float32) == "flex_attention"
    assert document_kernel(CPU, torch.bfloat16) == "sdpa_block_mask"
    document_attention._has_flash_attn.cache_clear()


def test_other_documents_are_not_compiled_again():
    """A mask is new in every micro-batch: a compilation each would take longer than training."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=False, backend=counter)
    query, key = torch.randn(2, 4, 256, 16), torch.randn(2, 2, 256, 16)
    for seed in range(5):
        blocks = block_mask(random_documents(2, 256, 0.02, seed))
        compiled(query, key, key, block_mask=blocks, enable_gqa=True)
    assert counter.frame_count == 1


# -- models ----------------------------------------------------------------------------------------


def plain_model(kind="llama"):
    torch.manual_seed(0)
    if kind == "mistral":  # the window is as long as a row, the most it may be
        return MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=200))
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def masked_model(kind="llama"):
    model = plain_model(kind)
    use_document_attention(model)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_packed_row_has_the_logits_of_its_documents_alone(kernel, kind, every_kernel):
    model, plain = masked_model(kind), plain_model(kind)
    ids = torch.randint(0, 101, (3, 200))
    documents = numbered()
    mask = KERNELS[kernel](documents, CPU)
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=document_positions(documents)
        ).logits
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                alone = plain(input_ids=ids[row : row + 1, start : start + length]).logits[0]
                torch.testing.assert_close(
                    found[row, start : start + length], alone, rtol=1e-4, atol=1e-5
                )
                start += length
    if kernel == "flash_attn_varlen":
        assert every_kernel == [sum(len(row) for row in ROWS)] * CONFIG["num_hidden_layers"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_themselves_are_made_into_the_mask_of_the_kernel(dtype, monkeypatch):
    """What the stages of a pipeline are handed; once per forward pass, not once per layer."""
    model, documents = masked_model().to(dtype), numbered()
    ids = torch.randint(0, 101, (3, 200))
    chosen, made = [], []
    of = KERNELS["sdpa_block_mask"]
    monkeypatch.setattr(
        document_attention,
        "document_kernel",
        lambda *where: chosen.append(where) or "sdpa_block_mask",
    )
    monkeypatch.setitem(KERNELS, "sdpa_block_mask", lambda *given: made.append(given) or of(*given))
    positions = document_positions(documents)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=documents, position_ids=positions).logits
        assert chosen == [(CPU, dtype)] and len(made) == 1
        mask = of(documents, CPU)
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(found, expected)


def test_a_mask_of_padding_is_not_taken_for_documents():
    ids = torch.randint(0, 101, (1, 8))
    with pytest.raises(AssertionError, match="not a mask of padding"):
        masked_model()(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_without_documents_it_is_transformers_causal_attention():
    ids = torch.randint(0, 101, (2, 33))
    assert torch.equal(masked_model()(input_ids=ids).logits, plain_model()(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_is_handed_the_mask_of_its_micro_batch(dtype, monkeypatch):
    """Two micro-batches go forward before the first goes back; gradients stay the same."""
    model = masked_model().to(dtype)
    inputs = []
    for rows in (ROWS, ([1, 199], [100, 100], [7, 13, 180])):
        documents = numbered(rows)
        inputs.append(
            {
                "input_ids": torch.randint(0, 101, (3, 200)),
                "attention_mask": KERNELS["sdpa_block_mask"](documents, CPU),
                "position_ids": document_positions(documents),
            }
        )
    used = []
    attend = document_attention.DenseMask.attend

    def recorded(mask, *states):
        used.append(mask)
        return attend(mask, *states)

    monkeypatch.setattr(document_attention.DenseMask, "attend", recorded)

    def gradients():
        used.clear()
        model.zero_grad()
        losses = [model(**each).logits.float().logsumexp(-1).sum() for each in inputs]
        for loss in losses:
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    first, second = (each["attention_mask"] for each in inputs)
    layers = CONFIG["num_hidden_layers"]
    assert used == [first] * layers + [second] * layers
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert used == 2 * ([first] * layers + [second] * layers)


def test_a_saved_model_does_not_ask_for_it(tmp_path):
    model = masked_model()
    model.save_pretrained(tmp_path)
    served = LlamaForCausalLM.from_pretrained(tmp_path)
    assert served.config._attn_implementation == "sdpa"
    ids = torch.randint(0, 101, (1, 20))
    assert torch.equal(served(input_ids=ids).logits, model(input_ids=ids).logits)

"""Counts of parameters and floating-point operations, and the peaks they are measured against.

Invariant: plain arithmetic on a transformers configuration; every formula has one name, and numbers
of two formulas are never compared. FLOPs count one multiplication with its addition as two.
"""

from typing import Any, Literal, Protocol


class ModelShape(Protocol):
    """What is read of a LlamaConfig or MistralConfig, or of a `models.Shape`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer_matmul_parameters(config: ModelShape) -> int:
    hidden, head_dim = config.hidden_size, _head_dim(config)
    query_and_output = 2 * hidden * config.num_attention_heads * head_dim
    key_and_value = 2 * hidden * config.num_key_value_heads * head_dim
    gate_up_down = 3 * hidden * config.intermediate_size
    return query_and_output + key_and_value + gate_up_down


def matmul_parameters(config: ModelShape) -> int:
    """N_mm: linear weights, the output head included also when tied; no embedding, no norms."""
    head = config.vocab_size * config.hidden_size
    return config.num_hidden_layers * _layer_matmul_parameters(config) + head


def num_parameters(config: ModelShape) -> int:
    """All parameters of the model; a tied output head counts once."""
    embedding = config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    biases = 0
    if getattr(config, "attention_bias", False):
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        biases += heads * _head_dim(config) + config.hidden_size
    if getattr(config, "mlp_bias", False):
        biases += 2 * config.intermediate_size + config.hidden_size
    untied_embedding = 0 if config.tie_word_embeddings else embedding
    return matmul_parameters(config) + untied_embedding + norms + config.num_hidden_layers * biases


def _forward_attention(config: ModelShape, sequence: int) -> int:
    """Scores and weighted sum of one layer, forward, per token: 2 FLOPs each per head dimension."""
    return 4 * config.num_attention_heads * _head_dim(config) * sequence


def model_flops_per_token(config: ModelShape, sequence: int) -> int:
    """6*N_mm + 12*L*heads*head_dim*s: forward and backward, full attention, nothing recomputed."""
    attention = 3 * config.num_hidden_layers * _forward_attention(config, sequence)
    return 6 * matmul_parameters(config) + attention


def lora_flops_per_token(config: ModelShape, sequence: int, num_adapter: int) -> int:
    """4*N_mm + 6*N_adapter + 12*L*heads*head_dim*s: no gradients of the frozen weights.

    The inputs of the first layer count as if they needed gradients, as those of all others do.

    Args:
        num_adapter: N_adapter, parameters of all adapters.
    """
    frozen = 2 * matmul_parameters(config)
    return model_flops_per_token(config, sequence) - frozen + 6 * num_adapter


def causal_flops_per_token(config: ModelShape, sequence: int) -> int:
    """As `model_flops_per_token` with half of the attention, the part a causal mask leaves."""
    attention = 3 * config.num_hidden_layers * _forward_attention(config, sequence)
    return 6 * matmul_parameters(config) + attention // 2


def hardware_flops_per_token(
    config: ModelShape, sequence: int, recompute: Literal["none", "selective", "full"]
) -> int:
    """What the hardware computes: with `full`, every layer's forward pass once more, but for its
    last product, down_proj's, which no gradient needs.

    `selective` keeps the result of every product (llama_lib/recompute.py), so it adds nothing.
    """
    flops = model_flops_per_token(config, sequence)
    if recompute != "full":
        return flops
    products = _layer_matmul_parameters(config) - config.hidden_size * config.intermediate_size
    layer = 2 * products + _forward_attention(config, sequence)
    return flops + config.num_hidden_layers * layer


def colossalai_8n(config: ModelShape, checkpointing: bool) -> int:
    """ColossalAI's "TFLOPS per GPU" per token: 8N, or 6N without gradient checkpointing; N is all
    parameters, attention is left out (examples/language/performance_evaluator.py)."""
    return 2 * (3 + checkpointing) * num_parameters(config)


def megatron_2021(config: ModelShape, sequence: int, checkpointing: bool) -> float:
    """ColossalAI's "TFLOPS per GPU by Megatron" per token (arXiv 2104.04473, equation 3).

    It supposes an MLP of width 4h without gate and no grouped-query heads, so it is off for Llama.
    """
    layers, hidden = config.num_hidden_layers, config.hidden_size
    relative = 1 + sequence / (6 * hidden) + config.vocab_size / (16 * layers * hidden)
    return 24 * (3 + checkpointing) * layers * hidden**2 * relative


def tflops_per_gpu(flops_per_token: float, tokens_per_second: float, num_gpus: int) -> float:
    """1e12 FLOPs per second and GPU, `tokens_per_second` being that of all GPUs."""
    return flops_per_token * tokens_per_second / num_gpus / 1e12


# Dense peaks in TFLOPS (no sparsity, 32-bit accumulation) by torch.cuda.get_device_name, from the
# vendor's data sheets and white papers. Only cards whose name and peak are both beyond doubt.
_BF16_AND_FP16_PEAKS = {
    # Ampere: A100 data sheet; the A800 differs in NVLink only.
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA A800 80GB PCIe": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125.0,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 3090": 71.0,
    # Hopper: H100 white paper, SXM5 at 1830 MHz; H200 and H800 have the same cores.
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H800": 989.4,
    # Ada: data sheets of L40S, L40 and L4, RTX 4090 in the Ada white paper.
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    # Blackwell: HGX B200 data sheet, 4.5 PFLOPS with sparsity.
    "NVIDIA B200": 2250.0,
}
_FP16_PEAKS = {
    # Volta has no bf16 units: V100 data sheet.
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The card's dense peak in fp16 or bf16; None, never a guess, for other cards and fp32."""
    if precision not in ("fp16", "bf16"):
        return None
    half_only = _FP16_PEAKS.get(device_name) if precision == "fp16" else None
    return _BF16_AND_FP16_PEAKS.get(device_name, half_only)


def model_flops_utilization(tflops: float, device_name: str, precision: str) -> float | None:
    """`mfu`: model TFLOPS per GPU as a share of the card's peak; None where that is unknown."""
    peak = peak_tflops(device_name, precision)
    return None if peak is None else tflops / peak

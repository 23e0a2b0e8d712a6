"""The layouts that tests in real processes train, by name, as flags of pretrain.py.

Invariant: a name means the same flags in every test; nothing here imports torch or ColossalAI.
"""

from typing import Any

from llama_lib.config import Options, parse_options

# ids 0 .. 499: no multiple of ColossalAI's 64, nor of 64 * tp, so the vocabulary is always padded.
MODEL: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LENGTH = 32
STEPS = 20
LEARNING_RATE = 2e-3
WARMUP = 2
SEED = 42

LAYOUTS = {
    "zero2": "-p zero2",
    "zero2_accumulate": "-p zero2 --accumulation_steps 4",
    "zero2_cpu": "-p zero2_cpu",
    "zero2_cpu_accumulate": "-p zero2_cpu --accumulation_steps 4",
    "gemini": "-p gemini",
    "gemini_accumulate": "-p gemini --accumulation_steps 4",
    "gemini_offload_half": "-p gemini --offload_optim_frac 0.5",
    "gemini_offload_optimizer": "-p gemini --offload_optim_frac 1.0",
    "gemini_offload_all": "-p gemini --offload_optim_frac 1.0 --offload_param_frac 1.0",
    "gemini_auto": "-p gemini_auto",
    "gemini_auto_accumulate": "-p gemini_auto --accumulation_steps 4",
    "hybrid_zero0": "-p hybrid_parallel --zero_stage 0",
    "hybrid_zero0_accumulate": "-p hybrid_parallel --zero_stage 0 --accumulation_steps 4",
    "hybrid_zero1": "-p hybrid_parallel --zero_stage 1",
    "hybrid_zero1_accumulate": "-p hybrid_parallel --zero_stage 1 --accumulation_steps 4",
    "hybrid_zero2": "-p hybrid_parallel --zero_stage 2",
    "hybrid_zero2_accumulate": "-p hybrid_parallel --zero_stage 2 --accumulation_steps 4",
    "tp2": "-p hybrid_parallel --tp 2 -b 4",
    "tp2_accumulate": "-p hybrid_parallel --tp 2 --accumulation_steps 4",
    "pp2": "-p hybrid_parallel --pp 2 -b 4",
    "pp2_accumulate": "-p hybrid_parallel --pp 2 --accumulation_steps 4",
    "pp2_microbatch2": "-p hybrid_parallel --pp 2 -b 4 --microbatch_size 2",
    "pp2_interleaved": "-p hybrid_parallel --pp 2 -b 4 --pp_style interleaved --num_model_chunks 2",
    "pp2_interleaved_accumulate": "-p hybrid_parallel --pp 2 --accumulation_steps 4"
    " --pp_style interleaved --num_model_chunks 2",
    "pp2_interleaved_microbatch2": "-p hybrid_parallel --pp 2 -b 4 --microbatch_size 2"
    " --pp_style interleaved --num_model_chunks 2",
    "pp2_interleaved_recompute": "-p hybrid_parallel --pp 2 -b 4 -g"
    " --pp_style interleaved --num_model_chunks 2",
    "all_to_all": "-p hybrid_parallel --sp 2 --sp_mode all_to_all -b 4",
    "split_gather": "-p hybrid_parallel --tp 2 --sp_mode split_gather -b 4",
    "zero2_recompute": "-p zero2 -g",
    "gemini_recompute": "-p gemini -g",
    "tp2_recompute": "-p hybrid_parallel --tp 2 -b 4 -g",
    "all_to_all_recompute": "-p hybrid_parallel --sp 2 --sp_mode all_to_all -b 4 -g",
    "split_gather_recompute": "-p hybrid_parallel --tp 2 --sp_mode split_gather -b 4 -g",
    "pp2_recompute": "-p hybrid_parallel --pp 2 -b 4 -g",
    # four processes
    "tp2_pp2": "-p hybrid_parallel --tp 2 --pp 2 -b 4",
    "tp2_pp2_interleaved": "-p hybrid_parallel --tp 2 --pp 2 -b 4"
    " --pp_style interleaved --num_model_chunks 2",
    "dp2_pp2_interleaved_zero1": "-p hybrid_parallel --pp 2 --zero_stage 1"
    " --pp_style interleaved --num_model_chunks 2",
    "dp2_tp2": "-p hybrid_parallel --tp 2 --zero_stage 0",
    "dp2_tp2_zero1": "-p hybrid_parallel --tp 2 --zero_stage 1",
    "dp2_pp2": "-p hybrid_parallel --pp 2 --zero_stage 0",
    "dp2_pp2_zero1": "-p hybrid_parallel --pp 2 --zero_stage 1",
    "dp2_all_to_all": "-p hybrid_parallel --sp 2 --sp_mode all_to_all --zero_stage 0",
    "dp4_gemini": "-p gemini -b 1",
    "dp4_zero2": "-p zero2 -b 1",
}
# The others compute logits and loss in pieces where they can; these compute all logits at once.
LAYOUTS |= {
    f"{name}_whole": f"{LAYOUTS[name]} --no-chunked_loss"
    for name in ("zero2", "gemini", "hybrid_zero1", "all_to_all")
}
# A Mistral of the same shape.
LAYOUTS |= {f"{name}_mistral": LAYOUTS[name] for name in ("zero2", "gemini", "hybrid_zero1")}
# The same with a document mask.
MASKED = (
    *("zero2", "zero2_accumulate", "zero2_recompute", "zero2_cpu"),
    *("gemini", "gemini_accumulate", "gemini_recompute", "gemini_offload_all", "gemini_auto"),
    *("hybrid_zero0", "hybrid_zero1", "tp2", "tp2_accumulate", "tp2_recompute", "dp2_tp2_zero1"),
    *("pp2", "pp2_accumulate", "pp2_microbatch2", "pp2_recompute", "tp2_pp2", "dp2_pp2_zero1"),
    *("zero2_mistral", "gemini_mistral", "hybrid_zero1_mistral"),
)
LAYOUTS |= {f"{name}_documents": f"{LAYOUTS[name]} --document_mask" for name in MASKED}
FOUR_PROCESSES = ("tp2_pp2", "dp2_", "dp4_")


def model_type(layout: str) -> str:
    return "mistral" if "_mistral" in layout else "llama"


def num_processes(layout: str) -> int:
    return 4 if layout.startswith(FOUR_PROCESSES) else 2


def options_of(layout: str, precision: str) -> Options:
    """The options of a layout, as the real parser reads them; batch size 2 unless it says more."""
    flags = (
        f"-d unused -b 2 -l {LENGTH} --lr {LEARNING_RATE} -s {WARMUP} --seed {SEED} -x {precision}"
    )
    return parse_options("pretrain", f"{flags} {LAYOUTS[layout]}".split())

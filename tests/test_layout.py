"""Which arrangements of processes are taken and which refused, and how a global batch is cut."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llama_lib.config import Options, dump_yaml, parse_options
from llama_lib.errors import UserError
from llama_lib.layout import SEQUENCE_MODES, BatchPlan, layout_of, layout_problems, plan_batches
from tests.distributed.cases import MODEL as SMALL_MODEL

MODEL = SimpleNamespace(
    model_type="llama",
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=6,
    tie_word_embeddings=False,
)


def options(flags: str) -> Options:
    return parse_options("pretrain", f"-d unused {flags}".split())


def problems(flags: str, processes: int, **changes: object) -> list[str]:
    config = SimpleNamespace(**{**vars(MODEL), **changes})
    return layout_problems(options(flags), processes, config)


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ("-p gemini", 4, (4, 1, 1, 1, 3)),
        ("-p zero2", 2, (2, 1, 1, 1, 2)),
        ("-p hybrid_parallel -x bf16", 4, (4, 1, 1, 1, 1)),
        ("-p hybrid_parallel -x fp32", 4, (4, 1, 1, 1, 0)),
        ("-p hybrid_parallel -x bf16 --tp 2", 8, (4, 2, 1, 1, 1)),
        ("-p hybrid_parallel -x bf16 --tp 2 --pp 2", 4, (1, 2, 2, 1, 0)),
        ("-p hybrid_parallel -x bf16 --sp 2 --sp_mode all_to_all", 4, (2, 1, 1, 2, 1)),
        # split_gather uses the processes of the tensor group
        ("-p hybrid_parallel -x bf16 --tp 2 --sp_mode split_gather", 4, (2, 2, 1, 1, 1)),
    ],
)
def test_processes_are_divided(flags, processes, expected):
    layout = layout_of(options(flags), processes)
    assert problems(flags, processes) == []
    found = (layout.dp, layout.tp, layout.pp, layout.sequence_axis, layout.zero_stage)
    assert found == expected
    assert layout.dp * layout.tp * layout.pp * layout.sequence_axis == processes


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        ("-p hybrid_parallel --tp 3", 3, "8 attention heads and 4 key-value heads; valid values: "),
        ("-p hybrid_parallel --tp 8", 8, "valid values: [1, 2, 4]"),
        ("-p hybrid_parallel --pp 7", 7, "more than the model's 6 layers; valid values: 1 to 6"),
        ("-p hybrid_parallel --tp 2", 3, "valid numbers of processes are multiples of 2"),
        ("-p hybrid_parallel --tp 4", 2, "groups of tp 4 x pp 1 x sp 1 = 4"),
        ("-p hybrid_parallel --sp 8 --sp_mode all_to_all", 8, "--sp 8 does not divide"),
        ("-p hybrid_parallel --sp 2", 2, "--sp 2 needs --sp_mode"),
        ("-p hybrid_parallel --sp_mode all_to_all", 2, "needs --sp 2 or more"),
        ("-p hybrid_parallel --sp_mode split_gather", 2, "give --tp 2 or more"),
        ("-p hybrid_parallel --sp 4 --tp 2 --sp_mode split_gather", 8, "takes its size from --tp"),
        ("-p hybrid_parallel --tp 2 --sp 2 --sp_mode all_to_all", 4, "not tested; use --tp 1"),
        ("-p hybrid_parallel --pp 2 --tp 2 --sp_mode split_gather", 4, "use --pp 1"),
        ("-p zero2 --pp_style interleaved", 2, "--pp_style interleaved needs -p hybrid_parallel"),
        ("-p gemini --num_model_chunks 3", 2, "--num_model_chunks 3 needs -p hybrid_parallel"),
        ("-p hybrid_parallel --pp_style interleaved", 2, "needs --pp 2 or more"),
        ("-p hybrid_parallel --pp 2 --num_model_chunks 2", 2, "belongs to --pp_style interleaved"),
        ("-p hybrid_parallel --pp 2 --pp_style interleaved", 2, "needs --num_model_chunks, on"),
        ("-p hybrid_parallel --pp 2 --chunked_loss -b 2", 2, "takes the loss of logits"),
        ("-p hybrid_parallel --tp 2 --chunked_loss", 2, "has a part of the logits"),
        ("-p hybrid_parallel --zero_stage 1 -x fp32", 2, "needs -x bf16 or fp16"),
        ("-p hybrid_parallel --zero_stage 2 --pp 2", 2, "valid values: 0, 1"),
        ("-p hybrid_parallel --pp 2 -b 6 --microbatch_size 4", 2, "valid values: [1, 2, 3, 6]"),
        ("-p hybrid_parallel --microbatch_size 1", 2, "--microbatch_size belongs to --pp"),
        ("-p gemini --tp 2", 2, "miscounts the gradient norm"),
        ("-p zero2 --pp 2", 2, "--pp 2 needs -p hybrid_parallel; got -p zero2"),
        ("-p zero2 --zero_stage 1", 2, "zero2 fixes its own"),
        ("-p zero2 --offload_optim_frac 1.0", 2, "zero2_cpu offloads the optimizer"),
        ("-p gemini_auto --offload_optim_frac 1.0", 2, "use -p gemini for fractions"),
        ("-p gemini --offload_param_frac 0.5", 2, "needs --offload_optim_frac 1.0"),
        (
            "-p hybrid_parallel --tp 2 --sp_mode split_gather --document_mask",
            2,
            "leave out --sp_mode, or leave out --document_mask",
        ),
        ("-p gemini -a --document_mask", 2, "-a with --document_mask"),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(flags, processes, message):
    found = problems(f"-x bf16 {flags}" if "-x" not in flags else flags, processes)
    assert any(message in problem for problem in found), found


def test_sequence_modes_that_fail_the_truth_test_cannot_be_chosen():
    assert SEQUENCE_MODES == ("all_to_all", "split_gather")
    for mode in ("ring", "ring_attn"):
        with pytest.raises(UserError):
            raise UserError(problems(f"-p hybrid_parallel --sp 2 --sp_mode {mode} -x bf16", 2))


def test_all_problems_are_named_at_once():
    found = problems("-p hybrid_parallel --tp 3 --pp 9 --zero_stage 2 -x bf16", 5)
    assert len(found) >= 4


def test_models_that_are_not_tested_are_refused_by_name():
    tied = problems("-p hybrid_parallel --tp 2 -x bf16", 2, tie_word_embeddings=True)
    assert "tied embeddings" in tied[0]
    mistral = problems("-p hybrid_parallel --tp 2 -x bf16", 2, model_type="mistral")
    assert "mistral" in mistral[0]
    assert problems("-p gemini -x bf16", 2, model_type="mistral") == []


@pytest.mark.parametrize(
    "flags",
    [
        "-p gemini",
        "-p gemini_auto",
        "-p zero2",
        "-p zero2_cpu",
        "-p hybrid_parallel",
        "-p hybrid_parallel --tp 2",
        "-p hybrid_parallel --pp 2",
        "-p gemini -g --accumulation_steps 4",
    ],
)
def test_a_document_mask_goes_with_what_is_tested(flags):
    flags += " --document_mask -x bf16"
    assert problems(flags, 2) == []
    assert "model type qwen2" in problems(flags, 2, model_type="qwen2")[-1]
    assert "attention_dropout above 0" in problems(flags, 2, attention_dropout=0.1)[-1]


def test_a_document_mask_goes_with_mistral_inside_its_window():
    mistral = {"model_type": "mistral", "sliding_window": 512}
    flags = "-p zero2 -x bf16 --document_mask -l"
    assert problems(f"{flags} 512", 2, **mistral) == []
    (problem,) = problems(f"{flags} 513", 2, **mistral)
    assert "--max_length 513" in problem and "--max_length 512 at most" in problem
    assert problems("-p zero2 -x bf16 -l 513", 2, **mistral) == []
    assert problems(f"{flags} 513", 2, model_type="mistral", sliding_window=None) == []


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("-p hybrid_parallel --tp 2 --sp_mode split_gather", {}),
        ("-p gemini -a", {}),
        ("-p zero2", {"attention_dropout": 0.1}),
        ("-p zero2 -l 513", {"model_type": "mistral", "sliding_window": 512}),
    ],
)
def test_packed_conversations_that_would_leak_are_refused_with_no_packing(flags, changes):
    config = SimpleNamespace(**{**vars(MODEL), **changes})
    chosen = parse_options("finetune", f"-d unused -x bf16 {flags}".split())
    chosen.model.document_mask = True  # what preflight makes of packing
    (problem,) = layout_problems(chosen, 2, config)
    assert "packed conversations" in problem and "give --no_packing" in problem
    assert "--document_mask" not in problem
    chosen.model.document_mask = False
    assert layout_problems(chosen, 2, config) == []


def plan(flags: str, rows: int, processes: int = 2, length: int = 128):
    chosen = options(flags)
    return plan_batches(chosen, layout_of(chosen, processes), length, rows)


def test_a_global_batch_is_the_product_it_says():
    cut = plan("-p zero2 -b 3 --accumulation_steps 4", rows=100)
    assert cut.global_batch == 3 * 2 * 4
    assert (cut.num_steps, cut.dropped_rows) == (4, 4)
    assert cut.tokens_per_step == 24 * 128
    text = "\n".join(cut.describe())
    assert "batch_size 3 x dp 2 x accumulation 4 = 24 rows x 128 = 3,072 tokens per step" in text
    assert "4 row(s) at the end do not fill a batch" in text


def test_global_batch_tokens_set_the_accumulation():
    assert plan("-p zero2 -b 2 --global_batch_tokens 2048", rows=100).accumulation == 4
    with pytest.raises(UserError, match="nearest valid: 1536 or 2048"):
        plan("-p zero2 -b 2 --global_batch_tokens 2000", rows=100)
    with pytest.raises(UserError, match="nearest valid: 512"):
        plan("-p zero2 -b 2 --global_batch_tokens 100", rows=100)


def test_the_shortest_limit_ends_the_run():
    assert plan("-p zero2 -b 1 --max_steps 7", rows=100).num_steps == 7
    assert plan("-p zero2 -b 1 --max_tokens 1024", rows=100).num_steps == 4
    assert plan("-p zero2 -b 1 --max_steps 7 --max_tokens 1024", rows=100).num_steps == 4
    assert plan("-p zero2 -b 1 --max_steps 700", rows=100).num_steps == 50


def test_too_little_data_or_tokens_is_refused():
    with pytest.raises(UserError, match=r"gives 3 row\(s\) of 128 tokens, less than one global"):
        plan("-p zero2 -b 2", rows=3)
    with pytest.raises(UserError, match="less than one step of 512 tokens"):
        plan("-p zero2 -b 2 --max_tokens 511", rows=100)


def test_a_pipeline_needs_a_micro_batch_for_every_stage():
    with pytest.raises(UserError, match="at least 2 micro-batches per step; got 1"):
        plan("-p hybrid_parallel --pp 2 -b 4 --microbatch_size 4", rows=100)


def test_an_interleaved_pipeline_needs_a_multiple_of_its_stages():
    flags = "-p hybrid_parallel --pp 2 --pp_style interleaved --num_model_chunks 2"
    with pytest.raises(UserError, match="needs a multiple of 2 micro-batches per step; got 3"):
        plan(f"{flags} -b 3", rows=100)
    assert plan(f"{flags} -b 4", rows=100).num_steps > 0


@pytest.mark.parametrize("layout", ["--tp 2 -b 2", "--pp 2 -b 2"])
def test_a_run_accepts_its_own_saved_options(tmp_path, layout):
    """They name every option, --chunked_loss too, which these layouts refuse if it is typed."""
    flags = ["-d", "unused", "-p", "hybrid_parallel", "-x", "bf16", *layout.split()]
    dump_yaml(parse_options("pretrain", flags), tmp_path / "specs.yaml")
    again = parse_options("pretrain", ["--spec_file", str(tmp_path / "specs.yaml")])
    assert layout_problems(again, 2, MODEL) == []


def test_a_warm_up_longer_than_a_tenth_of_the_run_is_pointed_out():
    assert "more than 10%" in plan("-p zero2 -b 1 -s 6", rows=100).describe()[-1]
    assert "more than 10%" not in plan("-p zero2 -b 1 -s 5", rows=100).describe()[-1]


def test_colossalai_itself_has_no_fp32_under_hybrid_zero(tmp_path):
    """Why `--zero_stage 1 -x fp32` is refused; another ColossalAI may be able to."""
    from llama_lib import host

    host.install()
    from colossalai.booster.plugin import HybridParallelPlugin
    from transformers import LlamaConfig, LlamaForCausalLM

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plugin = HybridParallelPlugin(tp_size=1, pp_size=1, zero_stage=1, precision="fp32")
        model = LlamaForCausalLM(LlamaConfig(**SMALL_MODEL))
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(AssertionError, match="when using ZeRO"):
            plugin.configure(model, optimizer)
    finally:
        dist.destroy_process_group()


def test_tokens_of_a_run_resumed_with_another_batch_are_those_of_both():
    plan = BatchPlan(6, 1, 1, 128, num_steps=26, dropped_rows=0, warmup_steps=2)
    assert "26 steps = 19,968 tokens" in plan.describe()
    assert "26 steps = 9,728 tokens" in plan.describe(20 * 2 + 6 * 6)

"""The dataclass tree of all options: names, defaults, meanings.

Invariant: field name = flag = YAML key, unique across sections, with one meaning in all scripts.
"""

from dataclasses import dataclass

from llama_lib.option_readers import (
    FRACTION,
    NOT_NEGATIVE,
    PART,
    PATH,
    POSITIVE,
    STEP_RANGE,
    SWITCH,
    TEXT,
    TOKENS,
    choice,
    integer,
)
from llama_lib.options import option

PLUGINS = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "hybrid_parallel")
PRECISIONS = ("fp16", "bf16", "fp32")


@dataclass
class ModelOptions:
    config: str = option(
        "7b",
        "shape of a new model: a name of the model table, a config.json, a folder or a hub id",
        PATH,
        short="c",
        scripts=["pretrain", "benchmark"],
    )
    model_path: str | None = option(
        None, "Hugging Face folder, hub id or checkpoint whose weights training starts from", PATH
    )
    tokenizer: str | None = option(
        None, "tokenizer: a folder, a file or a hub id (none: the one of the model)", PATH
    )
    max_length: int = option(
        4096,
        "tokens per row (untyped: at most the model's context)",
        integer(at_least=2),
        short="l",
    )
    flash_attention: bool = option(
        False, "ColossalAI's flash attention kernel; refused where none exists", SWITCH, short="a"
    )
    document_mask: bool = option(
        False,
        "tokens attend and are predicted within their own document only",
        SWITCH,
        scripts=["pretrain", "benchmark"],
    )
    gradient_checkpoint: bool = option(
        False, "recompute activations in the backward pass: --recompute full", SWITCH, short="g"
    )
    recompute: str = option(
        "none",
        "activations computed again in the backward pass: none, selective (the cheap ones) or full",
        choice("none", "selective", "full"),
    )
    chunked_loss: bool = option(
        True, "logits and loss a piece at a time, where the layout allows it: less memory", SWITCH
    )
    compile: bool = option(False, "torch.compile the decoder layers", SWITCH)
    kernels: str = option(
        "auto",
        "RMSNorm, rotary and SwiGLU: torch's or Liger's (auto: Liger's on a GPU, if installed)",
        choice("auto", "torch", "liger"),
    )
    chat_template: str | None = option(
        None,
        "how turns become text: llama-2, llama-3, mistral, chatml, plain, tokenizer (its own) or a"
        " Jinja file (none: the tokenizer's own, else plain for prompts, chatml for conversations)",
        PATH,
        scripts=["finetune"],
    )
    lora_rank: int = option(
        0, "train adapters of this rank only (0: the whole model)", integer(0), scripts=["finetune"]
    )
    lora_alpha: float = option(
        16.0, "adapters count for lora_alpha / lora_rank", POSITIVE, scripts=["finetune"]
    )
    # option() is dataclasses.field and makes a new list each time.
    lora_targets: list[str] = option(  # noqa: RUF009
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "linear layers that get adapters",
        TEXT,
        many=True,
        scripts=["finetune"],
    )
    merge_lora: bool = option(
        False,
        "save the model with the adapters merged in, beside the adapters",
        SWITCH,
        scripts=["finetune"],
    )


@dataclass
class DataOptions:
    dataset: list[str] = option(  # noqa: RUF009
        ["togethercomputer/RedPajama-Data-1T-Sample"],
        "what to train on: sample, files, folders, globs, hub names; pretrain.py also takes"
        " prepared or Megatron token files; NAME[N] takes N of it, NAME:0.7 a share of the tokens;"
        " random, in benchmark.py only: rows of random ids",
        PATH,
        short="d",
        many=True,
        script_defaults={"finetune": ["yizhongw/self_instruct"], "benchmark": ["random"]},
    )
    task_name: str = option(
        "super_natural_instructions",
        "configuration of a dataset of the hub (untyped: of yizhongw/self_instruct only)",
        TEXT,
        scripts=["finetune"],
    )
    min_length: int = option(
        0,
        "leave out conversations of fewer tokens (0: none)",
        integer(at_least=0),
        scripts=["finetune"],
    )
    overlong: str = option(
        "cut",
        "conversations of more than --max_length tokens: cut their end off, or drop them",
        choice("cut", "drop"),
        scripts=["finetune"],
    )
    no_packing: bool = option(
        False,
        "one padded row for each conversation instead of several isolated from each other",
        SWITCH,
        scripts=["finetune"],
    )
    loss_role: str = option(
        "assistant",
        "whose tokens are trained on",
        choice("assistant", "user", "all"),
        scripts=["finetune"],
    )
    other_role_weight: float = option(
        0.0, "weight of the other roles' tokens in the loss", FRACTION, scripts=["finetune"]
    )
    eval_data: list[str] | None = option(  # noqa: RUF009
        None, "held-out data, given like --dataset (none: taken by --eval_ratio)", PATH, many=True
    )
    eval_ratio: float = option(0.005, "share of the documents held out, never trained on", PART)
    cache_dir: str = option(
        "~/.cache/llama_lib", "folder for datasets prepared from text given to --dataset", PATH
    )
    workers: int = option(
        0,
        "processes that tokenise (0: the cores of this process; with --streaming one thread)",
        integer(at_least=0),
    )
    skip_bad_lines: bool = option(False, "count bad input lines instead of stopping", SWITCH)
    packing: str = option(
        "concat",
        "how documents fill rows: concat cuts them where a row ends, best_fit keeps them whole",
        choice("concat", "best_fit"),
        scripts=["pretrain", "benchmark"],
    )
    streaming: bool = option(
        False,
        "tokenise while training, without preparing the data first",
        SWITCH,
        scripts=["pretrain", "benchmark"],
    )
    shuffle_window: int = option(
        16,
        "chunks of 1 MiB among which --streaming shuffles documents",
        integer(at_least=1),
        scripts=["pretrain", "benchmark"],
    )
    skip_steps: list[str] | None = option(  # noqa: RUF009
        None,
        "leave out the rows of these steps, STOP excluded, as counted without this option",
        STEP_RANGE,
        many=True,
        scripts=["pretrain", "finetune"],
    )


@dataclass
class ParallelOptions:
    plugin: str = option("gemini", "ColossalAI Booster plugin", choice(*PLUGINS), short="p")
    tp: int = option(1, "tensor-parallel processes (hybrid_parallel)", integer(at_least=1))
    pp: int = option(1, "pipeline stages (hybrid_parallel)", integer(at_least=1))
    sp: int = option(1, "sequence-parallel processes (hybrid_parallel)", integer(at_least=1))
    sp_mode: str | None = option(
        None,
        "how sequences are split (hybrid_parallel)",
        choice("all_to_all", "split_gather", also=("ring", "ring_attn")),
    )
    zero_stage: int | None = option(
        None, "ZeRO stage of hybrid_parallel (none: the plugin's own)", choice(0, 1, 2)
    )
    microbatch_size: int | None = option(
        None, "rows per pipeline micro-batch; needs --pp above 1", integer(at_least=1)
    )
    pp_style: str = option(
        "1f1b",
        "order of a pipeline's micro-batches; interleaved: several parts of the model per stage",
        choice("1f1b", "interleaved"),
    )
    num_model_chunks: int = option(
        1, "parts of the model per stage (--pp_style interleaved: 2 or more)", integer(at_least=1)
    )
    offload_optim_frac: float = option(
        0.0, "share of the optimizer state kept in host memory (gemini)", FRACTION
    )
    offload_param_frac: float = option(
        0.0, "share of the weights kept in host memory (gemini)", FRACTION
    )


@dataclass
class TrainingOptions:
    num_epochs: int = option(
        1, "passes over the data", integer(at_least=1), short="e", scripts=["pretrain", "finetune"]
    )
    batch_size: int = option(2, "rows per GPU and forward pass", integer(at_least=1), short="b")
    accumulation_steps: int = option(
        1, "forward and backward passes per optimizer step", integer(at_least=1)
    )
    global_batch_tokens: int | None = option(
        None, "tokens per optimizer step; sets --accumulation_steps", TOKENS
    )
    max_steps: int | None = option(
        None,
        "end after this many optimizer steps",
        integer(at_least=1),
        scripts=["pretrain", "finetune"],
    )
    max_tokens: int | None = option(
        None,
        "end after this many tokens, padding included",
        TOKENS,
        scripts=["pretrain", "finetune"],
    )
    lr: float = option(3e-4, "highest learning rate", POSITIVE)
    weight_decay: float = option(
        0.1, "decoupled weight decay, not on norms and biases", NOT_NEGATIVE, short="w"
    )
    warmup_steps: int = option(
        2000,
        "optimizer steps of linear warm-up (untyped in finetune.py: 3% of the steps)",
        integer(at_least=0),
        short="s",
        script_defaults={"benchmark": 0},
    )
    gradient_clipping: float = option(
        1.0, "largest gradient norm of a step (0: not clipped)", NOT_NEGATIVE
    )
    mixed_precision: str = option(
        "fp16", "working precision (untyped on a CPU: bf16)", choice(*PRECISIONS), short="x"
    )
    seed: int = option(
        42, "drives data order, initial weights, dropout and sampling", integer(at_least=0)
    )


@dataclass
class CheckpointOptions:
    save_interval: int | None = option(
        1000,
        "steps between checkpoints; the last step is always saved (benchmark.py: none untyped)",
        integer(1),
        short="i",
        script_defaults={"benchmark": None},
    )
    save_dir: str = option(
        "checkpoint",
        "folder of the run's checkpoints and logs",
        PATH,
        short="o",
        script_defaults={"benchmark": "benchmark_run"},
    )
    load: str | None = option(
        None,
        "checkpoint to resume from, or auto: the newest whole one",
        PATH,
        short="f",
        scripts=["pretrain", "finetune"],
    )
    keep_last: int | None = option(
        None, "newest checkpoints to keep (none: all)", integer(at_least=1)
    )
    async_save: bool = option(
        False, "copy to host memory and write checkpoints beside the training", SWITCH
    )
    save_check: bool | None = option(
        None,
        "write, verify and delete a whole checkpoint after the first step "
        "(none: above 10B parameters or one host)",
        SWITCH,
        scripts=["pretrain", "finetune"],
    )


@dataclass
class ReportOptions:
    tensorboard_dir: str = option(
        "tb_logs",
        "folder of TensorBoard events and metrics.jsonl (in benchmark.py only if it is given)",
        PATH,
        short="t",
        script_defaults={"benchmark": "benchmark_run"},
    )
    log_interval: int = option(10, "steps between records", integer(at_least=1))
    eval_interval: int = option(0, "steps between held-out losses (0: off)", integer(at_least=0))
    eval_steps: int = option(20, "batches per held-out loss and source", integer(at_least=1))
    sample_interval: int = option(
        0,
        "steps between generated text samples (0: off)",
        integer(at_least=0),
        scripts=["pretrain", "finetune"],
    )
    sample_prompts: list[str] | None = option(  # noqa: RUF009
        None,
        "prompts, or files of one a line, answered at each --sample_interval and at the end",
        TEXT,
        many=True,
        scripts=["finetune"],
    )
    profile: str | None = option(None, "steps to write a torch trace of", STEP_RANGE)
    num_steps: int = option(
        25,
        "optimizer steps to run, --ignore_steps of them included",
        integer(2),
        scripts=["benchmark"],
    )
    ignore_steps: int = option(
        5, "first steps that are not measured", integer(1), scripts=["benchmark"]
    )
    output: str | None = option(None, "file for the results as JSON", PATH, scripts=["benchmark"])
    peak_tflops: float | None = option(
        None, "dense peak of one GPU for MFU (none: of the known cards)", POSITIVE
    )
    dry_run: bool = option(
        False, "show memory, time and layout in seconds; read neither data nor weights", SWITCH
    )
    check: bool = option(False, "prepare and check everything, show the run, do not train", SWITCH)
    allow_untested_versions: bool = option(
        False, "go on with package versions this project is not tested with", SWITCH
    )


@dataclass
class WatchOptions:
    start_timeout: int = option(
        60, "seconds in which every process has to appear and answer at the start", integer(1)
    )
    stall_timeout: int = option(
        600,
        "seconds without progress after which stacks are written and the run ends "
        "(0: never, nor when a host is lost)",
        integer(0),
    )


SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "parallel": ParallelOptions,
    "training": TrainingOptions,
    "checkpoint": CheckpointOptions,
    "report": ReportOptions,
    "watch": WatchOptions,
}

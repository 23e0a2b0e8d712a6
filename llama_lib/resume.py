"""Where a run begins: afresh, or at a checkpoint that fits it, with all differences said.

Invariant: a run that is continued has the model and the rows it had; what would change them is
refused, everything else may change and is one line.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_lib import coordination
from llama_lib.checkpoint import store
from llama_lib.checkpoint.manifest import MANIFEST, Manifest, point_best, step_directory
from llama_lib.checkpoint.store import TrainerState
from llama_lib.config import Options, script_of
from llama_lib.errors import UserError
from llama_lib.layout import BatchPlan, Layout
from llama_lib.preflight import UNLIMITED_ROWS, Run

# What decides the meaning of a model's weights; other fields of a config may differ on resume.
SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)


# What decides the rows of a fine-tuning run, besides its conversations.
CHAT_FIELDS = ("no_packing", "min_length", "overlong", "loss_role", "other_role_weight")
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets")


def _facts(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be equal for a checkpoint to be continued: the model's shape and the data."""
    shape = {name: getattr(run.config, name, None) for name in SHAPE_FIELDS}
    data = {
        "tokenizer": run.data.tokenizer_hash,
        "manifest": run.data.identity,
        "max_length": run.options.model.max_length,
        "packing": run.options.data.packing,
        "streaming": run.options.data.streaming,
        "seed": run.options.training.seed,
    }
    if run.chat is not None:
        data |= {name: getattr(run.options.data, name) for name in CHAT_FIELDS}
        data["chat_template"] = hashlib.sha256(run.tokenizer.chat_template.encode()).hexdigest()
    if run.options.model.lora_rank:
        shape |= {name: getattr(run.options.model, name) for name in LORA_FIELDS}
    return shape, data


def starting_point(run: Run, say: Any) -> tuple[TrainerState, Path | None]:
    """The state to start from and the checkpoint it lies in; a fresh state without --load."""
    options = run.options
    model, data = _facts(run)
    fresh = TrainerState(
        0, 0, 0, 0, options.training.seed, options.to_dict(), model=model, data=data
    )
    if options.checkpoint.load is None:
        _skip_steps(run, fresh, say)
        return fresh, None
    checkpoint, lines = store.find_checkpoint(
        options.checkpoint.load, options.checkpoint.save_dir, partial(_cannot_skip, options)
    )
    for line in lines:
        say(line)
    if checkpoint is None:
        _skip_steps(run, fresh, say)
        return fresh, None
    state = store.read_state(checkpoint)
    _refuse_other_script(checkpoint, state, options)
    if changes := run.data.changes(state.stream):
        raise UserError(changes)
    _refuse_other_run(checkpoint, state, model, data)
    _keep_model_path(run, state, checkpoint, say)
    for line in option_differences(state.options, options.to_dict()):
        say(line)
    if change := _other_batch(checkpoint, state, options, run.plan):
        say(change)
    run.plan = continued_plan(run, state)
    _skip_steps(run, state, say)
    _check_best(run, state, say)
    say(
        f"resumed {checkpoint} at step {state.step}: {state.samples:,} samples and "
        f"{state.tokens:,} tokens seen"
        + ("" if state.loss is None else f", last logged loss {state.loss:.4f}")
    )
    return state, checkpoint


def _keep_model_path(run: Run, state: TrainerState, checkpoint: Path, say: Any) -> None:
    """A continued run began with the model it began with; only adapters need that model again."""
    options, before = run.options, state.options["model"].get("model_path")
    if run.chat is not None:
        run.chat = replace(run.chat, added=[], new_rows=None)
    if options.model.lora_rank:
        return
    if options.model.model_path not in (None, before):
        say(f"--model_path is ignored: the weights are those of {checkpoint}")
    options.model.model_path = before


def _check_best(run: Run, state: TrainerState, say: Any) -> None:
    """Forget the best checkpoint if it is not in --save_dir, or was measured on other rows."""
    if state.best is None:
        return
    save_dir = Path(run.options.checkpoint.save_dir)
    best = step_directory(save_dir, state.best["step"])
    rows = run.options.report.eval_steps * run.plan.global_batch
    if not coordination.from_rank_0((best / MANIFEST).is_file()):
        say(f"{best.name}, the best checkpoint so far, is not in {save_dir}: the next one begins")
        state.best = None
    elif rows != state.best["rows"]:
        say(f"{best.name} was the best checkpoint on other held-out rows: the next one begins")
        state.best = None
    if dist.get_rank() == 0:
        try:
            point_best(save_dir, best if state.best else None)
        except OSError as error:  # the next save writes it
            say(f"warning: the file {save_dir / 'best'} cannot be written: {error}")


def _refuse_other_script(checkpoint: Path, state: TrainerState, options: Options) -> None:
    script = script_of(state.options)
    if script != options.script:
        raise UserError(
            f"{checkpoint} is of {script}.py: --load continues a run of the same script. To start "
            f"from its weights: --model_path {checkpoint}, with a --save_dir of its own."
        )


def _refuse_other_run(
    checkpoint: Path, state: TrainerState, model: dict[str, Any], data: dict[str, Any]
) -> None:
    problems = [
        f"{checkpoint} {problem}"
        for problem in (*_other_model(state.model, model), *_other_data(state.data, data))
    ]
    if data["manifest"] != state.data.get("manifest") and "packing" not in state.data:
        problems.append(
            "the checkpoint is of an older version, since when text is prepared in another way: "
            "give -d the folder that run had prepared, in --cache_dir under prepared/."
        )
    if problems:
        raise UserError(problems)


def _other_model(saved: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    before, now = saved.get("lora_rank"), model.get("lora_rank")
    if before is None and now is not None:
        yield "was trained as a whole, this run trains adapters: leave out --lora_rank."
    elif now is None and before is not None:
        yield f"holds adapters, this run trains the whole model: give --lora_rank {before}."
    for key in sorted(set(model) | set(saved)):
        if key in LORA_FIELDS and (before is None or now is None):
            continue
        if model.get(key) != saved.get(key):
            remedy = f"--{key}" if key in LORA_FIELDS else "--config or --model_path"
            yield (
                f"holds a model with {key} {saved.get(key)}, this run has {model.get(key)}; give "
                f"the same {remedy}."
            )


def _other_data(saved: dict[str, Any], data: dict[str, Any]) -> Iterator[str]:
    if data.get("chat_template") != saved.get("chat_template"):
        # It decides the tokens that are added and all ids, too.
        yield (
            "was trained with another chat template: give the --chat_template the run started "
            "with, or leave out both --chat_template and --model_path."
        )
        return
    remedies = {
        "tokenizer": "give the tokenizer the run started with",
        "manifest": "give the -d, its shares, --eval_data and --eval_ratio the run started with",
        "streaming": "the order of the data would change; give --streaming as before",
        "seed": "the data order would start anew; give the same --seed",
    }
    for key in ("max_length", "packing", *(name for name in CHAT_FIELDS if name in data)):
        remedies[key] = f"rows and data position would change; give the same --{key}"
    # Checkpoints of older versions know no other way than these.
    saved = {"packing": "concat", "streaming": False} | saved
    differing = [key for key in remedies if data[key] != saved.get(key)]
    if any(key in CHAT_FIELDS for key in differing):
        differing = [key for key in differing if key != "manifest"]  # which follows from them
    for key in differing:
        what = "other data" if key == "manifest" else f"another {key}"
        before, now = (str(value)[:16] for value in (saved.get(key), data[key]))
        yield f"was trained with {what} ({before}, this run has {now}): {remedies[key]}."


def option_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for every option that differs from the saved run; the command line wins."""
    lines = []
    silent = {"load", "dry_run", "check", "skip_steps", "peak_tflops"}
    for section, values in current.items():
        before = saved.get(section, {})
        for name, value in values.items():
            if name not in silent and name in before and before[name] != value:
                lines.append(f"--{name} was {before[name]}, now {value}")
    return lines


def _other_batch(
    checkpoint: Path, state: TrainerState, options: Options, plan: BatchPlan
) -> str | None:
    """One line if a step takes another number of rows than before: --batch_size is of one GPU."""
    saved = state.options["training"]
    before = Layout(**Manifest.read(checkpoint).layout).dp
    rows = saved["batch_size"] * saved["accumulation_steps"] * before
    if saved["global_batch_tokens"] is not None:
        rows = saved["global_batch_tokens"] // plan.max_length
    if rows == plan.global_batch:
        return None
    return (
        f"the global batch was {rows} rows, now {plan.global_batch} ({before} data-parallel "
        f"processes then, {plan.dp} now); {_what_keeps(rows, options, plan)}"
    )


def _what_keeps(rows: int, options: Options, plan: BatchPlan) -> str:
    """The options with which so many rows are a step of these processes, or that there are none."""
    each, rest = divmod(rows, plan.dp)
    micro = options.parallel.microbatch_size or 1
    sizes = [
        size
        for size in range(micro, options.training.batch_size + 1, micro)
        if rest == 0 and each % size == 0 and each // micro >= options.parallel.pp
    ]
    if not sizes:
        return f"no --global_batch_tokens keeps it: {rows} rows have no equal parts for that many"
    batch = "" if sizes[-1] == options.training.batch_size else f"-b {sizes[-1]} "
    return f"{batch}--global_batch_tokens {rows * plan.max_length} keeps it"


def _cannot_skip(options: Options, state: TrainerState) -> str | None:
    """Why a checkpoint is too late for --skip_steps, if it is."""
    for text in options.data.skip_steps or []:
        start = int(text.partition(":")[0])
        if text not in state.skipped_steps and start <= state.step:
            return f"--skip_steps {text}: step {start} is done there already"
    return None


def _skip_steps(run: Run, state: TrainerState, say: Any) -> None:
    """Leave out the rows of --skip_steps: into the state, so that later resumptions keep to it."""
    if problem := _cannot_skip(run.options, state):
        raise UserError(
            f"{problem}, and this run goes on after step {state.step}; load a checkpoint from "
            "before it (--load PATH)."
        )
    for text in state.skipped_steps:
        say(f"--skip_steps {text}: left out already, and stays so")
    for text in run.options.data.skip_steps or []:
        if text in state.skipped_steps:
            continue
        start, stop = (int(part) for part in text.split(":"))
        if stop - 1 > run.plan.num_steps:
            raise UserError(f"--skip_steps {text}: the run has only {run.plan.num_steps} steps.")
        batch, place = run.plan.global_batch, state.position
        first, last = place.next_sample(start - 1, batch), place.next_sample(stop - 1, batch) - 1
        state.skips = [list(pair) for pair in place.skipping(start, stop, batch).skips]
        state.skipped_steps = [*state.skipped_steps, text]
        run.plan = continued_plan(run, state)
        say(f"--skip_steps {text}: rows {first:,} to {last:,} of the data order are left out")
    # What was left out before stays so when the run is started again from its specs.yaml.
    run.options.data.skip_steps = list(state.skipped_steps) or None


def continued_plan(run: Run, state: TrainerState) -> Any:
    """The plan from a state on: the steps done, then what is left of the data or the limits.

    With the saved global batch this is the plan as it was; another one goes on with the next
    unseen sample.
    """
    plan, training, place = run.plan, run.options.training, state.position
    end = UNLIMITED_ROWS
    if run.data.num_rows is not None:
        end = run.data.num_rows(training.num_epochs)
    left_out = sum(max(0, min(stop, end) - max(first, place.sample)) for first, stop in place.skips)
    left, dropped = divmod(max(0, end - place.sample - left_out), plan.global_batch)
    steps = state.step + left
    if training.max_steps is not None and training.max_steps < steps:
        steps, dropped = training.max_steps, 0
    if training.max_tokens is not None:
        allowed = max(0, training.max_tokens - state.tokens) // plan.tokens_per_step
        if state.step + allowed < steps:
            steps, dropped = state.step + allowed, 0
    return replace(plan, num_steps=steps, dropped_rows=dropped)

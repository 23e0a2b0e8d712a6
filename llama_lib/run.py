"""From a checked run to the end of training: process group, model, checkpoint, loop.

Invariant: all ranks take the same decisions, because each is taken from shared files or broadcast.
"""

import logging
import math
import socket
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_lib import coordination, host, ledger
from llama_lib.checkpoint import store
from llama_lib.checkpoint.manifest import set_aside_newer
from llama_lib.checkpoint.store import TrainerState
from llama_lib.checkpoint.weights import load_weights
from llama_lib.config import Options, dump_yaml, script_of
from llama_lib.data.loader import BatchLoader
from llama_lib.data.prepared import PreparedDataset
from llama_lib.engine import Engine
from llama_lib.errors import RunError, UserError
from llama_lib.evaluate import HeldOut
from llama_lib.launch import start_process_group
from llama_lib.preflight import UNLIMITED_ROWS, Run
from llama_lib.trainer import Trainer

logger = logging.getLogger("llama_lib")

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


def train(run: Run) -> int:
    """Train a checked run; returns the exit code of `Trainer.fit`."""
    device = start_process_group(run.options.training.seed)
    code = _train(run, device)
    # Only here: after an error other ranks may be gone, and leaving the group in order would hang.
    dist.destroy_process_group()
    return code


def _train(run: Run, device: torch.device) -> int:
    options = run.options
    _open_log(options.checkpoint.save_dir)
    _check_shared(options.checkpoint.save_dir)
    _check_same_data(run)
    say = _say if dist.get_rank() == 0 else logger.info
    state, checkpoint = _starting_point(run, say)
    if state.step >= run.plan.num_steps:
        say(f"step {state.step} of {run.plan.num_steps} is done already: nothing to train.")
        return 0
    if dist.get_rank() == 0:
        # Without --load: the file says what the run is, not where this part of it began.
        settings = replace(options, checkpoint=replace(options.checkpoint, load=None))
        dump_yaml(settings, Path(options.checkpoint.save_dir) / "specs.yaml")
    rows = state.samples + (run.plan.num_steps - state.step) * run.plan.global_batch
    for line in filter(None, [host.optional_packages(), *run.notes, *run.describe(rows)]):
        say(line)
    engine = Engine(options, run.layout, run.config, device, run.plan.accumulation)
    if options.model.lora_rank:
        count = sum(map(math.prod, engine.trained.values()))
        say(f"adapters of rank {options.model.lora_rank}: {count:,} trained parameters")
    # Adapters are trained on weights that a checkpoint does not hold.
    if run.model_folder is not None and (checkpoint is None or options.model.lora_rank):
        new_rows = run.chat.new_rows if run.chat else None
        load_weights(engine, run.model_folder, "--model_path", new_rows=new_rows)
    if checkpoint is not None:
        store.load(engine, checkpoint, state)
        if dist.get_rank() == 0:
            for line in set_aside_newer(options.checkpoint.save_dir, state.step):
                say(line)
    return _trainer(run, engine, state).fit()


def _say(text: str) -> None:
    logger.info("%s", text)
    print(text, flush=True)


def _open_log(save_dir: str) -> None:
    """One log file per rank; the console belongs to rank 0."""
    folder = Path(save_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{dist.get_rank():05d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _check_shared(save_dir: str) -> None:
    """All hosts must see one --save_dir; found here, not at the first checkpoint."""
    token = coordination.from_rank_0(uuid.uuid4().hex)
    mark = Path(save_dir) / "logs" / f"shared-{token}"
    if dist.get_rank() == 0:
        mark.touch()
    coordination.barrier()
    seen = coordination.gather((mark.exists(), socket.gethostname()))
    if dist.get_rank() == 0:
        mark.unlink()
    blind = sorted({host for sees, host in seen if not sees})
    if blind:
        raise RunError(
            f"--save_dir {save_dir} is not one directory for all hosts: {', '.join(blind)} cannot "
            f"see what {seen[0][1]} writes there. Give a directory on a disk that all hosts share."
        )


def _check_same_data(run: Run) -> None:
    """Hosts prepare on their own; they must have come to the same data."""
    hashes = coordination.gather(run.data.identity)
    if len(set(hashes)) > 1:
        odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        raise RunError(
            f"the data of rank(s) {odd} differs from rank 0's: the hosts see other input "
            "files or package versions. Prepare once (python -m llama_lib prepare) into a folder "
            "all hosts see, and give that to -d."
        )


def _trainer(run: Run, engine: Engine, state: TrainerState) -> Trainer:
    options, plan = run.options, run.plan
    loader = BatchLoader(
        run.data.open_rows(state.stream),
        plan.global_batch,
        engine.dp_rank,
        plan.dp,
        plan.accumulation,
        position=state.position,
    )
    held_out = run.data.held_out
    if isinstance(held_out, PreparedDataset):
        held_out = HeldOut(held_out, options.model.max_length, options.model.document_mask)
    part = ledger.Part(
        state.step + 1, plan.num_steps, plan.global_batch, run.data.identity, state.position
    )
    book = ledger.LedgerWriter(options.checkpoint.save_dir, part, dist.get_rank() == 0)
    return Trainer(
        options,
        engine,
        plan,
        loader,
        run.tokenizer,
        state,
        held_out,
        run.chat,
        book,
        run.data.available,
    )


# -- resuming -----------------------------------------------------------------------------------


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
    if run.options.model.lora_rank:
        shape |= {name: getattr(run.options.model, name) for name in LORA_FIELDS}
    return shape, data


def _starting_point(run: Run, say: Any) -> tuple[TrainerState, Path | None]:
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
    for line in option_differences(state.options, options.to_dict()):
        say(line)
    run.plan = continued_plan(run, state)
    _skip_steps(run, state, say)
    if checkpoint.parent.resolve() != Path(options.checkpoint.save_dir).resolve():
        # The best one so far is not in the folder that this run looks after.
        state.best = None
    say(
        f"resumed {checkpoint} at step {state.step}: {state.samples:,} samples and "
        f"{state.tokens:,} tokens seen"
        + ("" if state.loss is None else f", last logged loss {state.loss:.4f}")
    )
    return state, checkpoint


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
    problems = []
    for key in sorted(set(model) | set(state.model)):
        if model.get(key) != state.model.get(key):
            problems.append(
                f"{checkpoint} holds a model with {key} {state.model.get(key)}, this run has "
                f"{model.get(key)}; give the same --config."
            )
    remedies = {
        "tokenizer": "give the tokenizer the run started with",
        "data": "give the -d, its shares, --eval_data and --eval_ratio the run started with",
        "max_length": "rows and data position would change; give the same --max_length",
        "packing": "rows and data position would change; give the same --packing",
        "streaming": "the order of the data would change; give --streaming as before",
        "seed": "the data order would start anew; give the same --seed",
    }
    rows_change = "rows and data position would change; give the same --"
    remedies |= {name: rows_change + name for name in CHAT_FIELDS if name in data}
    # Checkpoints of older versions know no other way than these.
    saved = {"packing": "concat", "streaming": False} | state.data
    saved["data"] = saved.pop("manifest", None)
    data = {"data": data["manifest"], **data}
    for key, remedy in remedies.items():
        if data[key] != saved.get(key):
            what = "other data" if key == "data" else f"another {key}"
            before, now = (str(value)[:16] for value in (saved.get(key), data[key]))
            problems.append(
                f"{checkpoint} was trained with {what} ({before}, this run has {now}): {remedy}."
            )
    if data["data"] != saved.get("data") and "packing" not in state.data:
        problems.append(
            "the checkpoint is of an older version, since when text is prepared in another way: "
            "give -d the folder that run had prepared, in --cache_dir under prepared/."
        )
    if problems:
        raise UserError(problems)


def option_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for every option that differs from the saved run; the command line wins."""
    lines = []
    silent = {"load", "dry_run", "skip_steps"}
    for section, values in current.items():
        before = saved.get(section, {})
        for name, value in values.items():
            if name not in silent and name in before and before[name] != value:
                lines.append(f"--{name} was {before[name]}, now {value}")
    return lines


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

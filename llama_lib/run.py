"""From a checked run to the end of training: process group, model, checkpoint, loop.

Invariant: all ranks take the same decisions, because each is taken from shared files or broadcast.
"""

import contextlib
import logging
import math
import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from llama_lib import coordination, host, ledger, private
from llama_lib.checkpoint import store
from llama_lib.checkpoint.manifest import (
    set_aside_newer,
)
from llama_lib.checkpoint.store import TrainerState
from llama_lib.checkpoint.weights import load_weights
from llama_lib.config import Options, dump_yaml
from llama_lib.data.loader import BatchLoader
from llama_lib.data.prepared import PreparedDataset
from llama_lib.engine import Engine
from llama_lib.errors import JobError, LlamaLibError, RunError
from llama_lib.evaluate import HeldOut
from llama_lib.launch import start_process_group
from llama_lib.lease import leased
from llama_lib.memory_check import MemoryCheck, planned_job
from llama_lib.preflight import Run
from llama_lib.resume import starting_point
from llama_lib.trainer import Trainer
from llama_lib.watch.roll_call import Crew
from llama_lib.watch.topology import topology
from llama_lib.watch.watchdog import Watchdog

logger = logging.getLogger("llama_lib")


def train(run: Run, watchdog: Watchdog) -> int:
    """Train a checked run; returns the exit code of `Trainer.fit`."""
    options = run.options
    device = start_process_group(options.training.seed, _joining(options, watchdog))
    watchdog.train(options.watch.stall_timeout)
    _open_log(options.checkpoint.save_dir)
    try:
        code = _train(run, device, watchdog.crew)
    except LlamaLibError as error:
        logger.error("%s", error)
        raise
    except BaseException as error:
        logger.exception("this process ends")
        if _is_lost_peer(error):
            raise JobError(
                "the connection to another process broke: it has ended, or its host is gone; its "
                f"own output says why (what broke here: {options.checkpoint.save_dir}/logs). The "
                "checkpoints are untouched: --load auto goes on from the newest."
            ) from None
        raise
    # Only here: after an error other ranks may be gone, and leaving the group in order would hang.
    dist.destroy_process_group()
    return code


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, as gloo and NCCL say it."""
    signs = "gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemote"
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def _joining(options: Options, watchdog: Watchdog) -> Iterator[None]:
    """The deadline begins once all are here and have imported all: a cold disk takes minutes."""
    watchdog.ready()
    with watchdog.starting(options.checkpoint.save_dir, options.watch.start_timeout):
        yield


def _train(run: Run, device: torch.device, crew: Crew) -> int:
    options = run.options
    _check_shared(options.checkpoint.save_dir)
    _check_same_data(run)
    _check_same_prompts(run)
    say = _say if dist.get_rank() == 0 else logger.info
    for line in topology(crew, device):
        say(line)
    with _sole_writer(options, say):
        return _begin(run, device, say)


@contextlib.contextmanager
def _sole_writer(options: Options, say: Callable[[str], None]) -> Iterator[None]:
    """No other run writes to --save_dir until the block ends; a run that never saves may share."""
    problem: LlamaLibError | None = None
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0 and options.checkpoint.save_interval is not None:
            try:
                stack.enter_context(leased(options.checkpoint.save_dir, say))
            except LlamaLibError as error:
                problem = error
        problem = coordination.from_rank_0(problem)
        if problem is not None:
            raise problem
        yield


def _begin(run: Run, device: torch.device, say: Callable[[str], None]) -> int:
    """From the state that the run starts in, which is on disk or nowhere."""
    options = run.options
    state, checkpoint = starting_point(run, say)
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
    check = MemoryCheck(planned_job(options, run.config, run.layout.world_size), device)
    with check.explaining(options):
        return _in_memory(run, device, state, checkpoint, check, say)


def _in_memory(
    run: Run,
    device: torch.device,
    state: TrainerState,
    checkpoint: Path | None,
    check: MemoryCheck,
    say: Callable[[str], None],
) -> int:
    """Build the model, load what it starts from, train."""
    options = run.options
    engine = Engine(options, run.layout, run.config, device, run.plan.accumulation)
    say(engine.describe_kernels())
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
    return _trainer(run, engine, state, check).fit()


def _say(text: str) -> None:
    logger.info("%s", text)
    print(text, flush=True)


def _open_log(save_dir: str) -> None:
    """One log file per rank; the console belongs to rank 0."""
    folder = Path(save_dir) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{dist.get_rank():05d}.log")
    handler.setFormatter(private.LogFormatter("%(asctime)s %(levelname)s %(message)s"))
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


def _check_same_prompts(run: Run) -> None:
    """All processes answer the prompts together, a token at a time."""
    if run.chat is not None and len(set(map(tuple, coordination.gather(run.chat.prompts)))) > 1:
        raise RunError(
            "the hosts see other --sample_prompts: give texts, or files on a disk all hosts share."
        )


def _trainer(run: Run, engine: Engine, state: TrainerState, check: MemoryCheck) -> Trainer:
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
    book = None
    if options.script != "benchmark":
        book = ledger.LedgerWriter(options.checkpoint.save_dir, part, dist.get_rank() == 0)
    trainer = Trainer(
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
        check,
    )
    if dist.get_rank() == 0:  # which alone speaks
        trainer.nonfinite.passages = run.data.passages
    return trainer

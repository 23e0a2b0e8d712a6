"""`inspect RUN --step K`: the documents that went into one step of a run.

Invariant: what is shown is recomputed from the ledger and the data; data that changed since the run
are refused, not guessed at.
"""

from pathlib import Path

from llama_lib import ledger
from llama_lib.checkpoint.manifest import step_directories
from llama_lib.config import Options, parse_options, script_of
from llama_lib.data.training_data import Passage, TrainingData
from llama_lib.errors import UserError
from llama_lib.models import model_config
from llama_lib.run_chat import open_chat
from llama_lib.run_data import open_data
from llama_lib.starting_model import starting_model


def passages_of_step(save_dir: str, step: int) -> list[tuple[int, list[Passage]]]:
    """(sample, its passages in order) for every row of a step, counted from 1.

    Raises:
        UserError: no such run or step, or the data of the run are no longer what they were.
    """
    entry = ledger.read_step(save_dir, step)
    options = _options(save_dir)
    if options.data.streaming and not entry.stream:
        raise UserError(f"--step {step}: the run in {save_dir} did not come so far.")
    data = _data(options)
    if data.identity != entry.part.identity:
        raise UserError(
            f"the data of the run in {save_dir} have changed: their hash was "
            f"{entry.part.identity[:16]}, it is {data.identity[:16]} now. Without the same files "
            "and tokenizer the documents of a step cannot be named."
        )
    return list(zip(entry.samples, data.passages(entry.samples, entry.stream), strict=True))


def _data(options: Options) -> TrainingData:
    folder = starting_model(options)
    config = model_config(options.model.config if folder is None else str(folder))
    if options.script == "finetune":
        assert folder is not None
        return open_chat(options, config, folder)[0]
    return open_data(options, config, folder)[0]


def _options(save_dir: str) -> Options:
    path = Path(save_dir) / "specs.yaml"
    if not path.is_file():
        raise UserError(f"{save_dir} holds no specs.yaml: expected the --save_dir of a run.")
    import yaml

    try:
        script = script_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not the file of options that a run wrote: {reason}.") from None
    options = parse_options(script, ["--spec_file", str(path)])
    if options.script == "finetune" and options.model.model_path is None:
        # The run was continued without naming the model it began with; its own will do.
        options.checkpoint.load, options.checkpoint.save_dir = "auto", save_dir
    return options


def show_step(save_dir: str, step: int) -> None:
    """Print the rows of a step, one line for every passage."""
    rows = passages_of_step(save_dir, step)
    options = _options(save_dir)
    print(f"step {step} of {save_dir}: {len(rows)} rows")
    saved = step_directories(save_dir)
    if not saved or step > int(saved[0].name.removeprefix("step-")):
        print("(no checkpoint comes so far: these are the rows the step takes when it is done)")
    for sample, passages in rows:
        print(f"row {sample}")
        for part in passages:
            tokens = f"tokens {part.start} to {part.start + part.length - 1}"
            if options.script == "finetune":
                print(f"  record {part.number} of {part.file}: {part.length} tokens")
            elif options.data.streaming:
                print(f"  {part.source}: record {part.number} of {part.file}, {tokens}")
            else:
                # The number that `inspect PREPARED/SOURCE --document` takes.
                print(f"  document {part.number} of {part.source}, from {part.file}, {tokens}")

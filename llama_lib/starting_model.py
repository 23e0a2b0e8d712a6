"""Which folder a run takes its weights, or the shape of its model, from.

Invariant: a folder that is named here holds a whole model; a hub id is downloaded once per host.
"""

import contextlib
import json
from pathlib import Path

from llama_lib.checkpoint.manifest import (
    Manifest,
    check_load_argument,
    size_problems,
    step_directories,
)
from llama_lib.config import Options, script_of
from llama_lib.data.once import once
from llama_lib.errors import RunError, UserError
from llama_lib.inference import ADAPTER, base_of, model_folder


def starting_model(options: Options) -> Path | None:
    """The folder whose weights, or with --load whose shape and tokenizer, the run has.

    None: a new model (pretrain.py without --model_path).
    """
    source, load = options.model.model_path, options.checkpoint.load
    if source is not None:
        return local_model(source, options.data.cache_dir)
    if options.script != "finetune":
        return None
    if load is None:
        raise UserError(
            "fine-tuning starts from a model: give --model_path FOLDER (a Hugging Face folder, a "
            "hub id or a checkpoint of pretrain.py), or --load to continue a run."
        )
    check_load_argument(load, options.checkpoint.save_dir)
    checkpoint = _newest_whole(options.checkpoint.save_dir) if load == "auto" else Path(load)
    adapter = checkpoint / ADAPTER
    if adapter.is_dir():
        # The adapters know which model they belong to.
        options.model.model_path = base_of(adapter)
        return local_model(options.model.model_path, options.data.cache_dir)
    return model_folder(str(checkpoint))


def _newest_whole(save_dir: str) -> Path:
    """The newest checkpoint whose files are there in their sizes; all are hashed before loading."""
    saved = step_directories(save_dir)
    if not saved:
        raise UserError(
            f"--load auto: there is no checkpoint in --save_dir {save_dir} yet; name the model to "
            "start from with --model_path."
        )
    for directory in saved:
        with contextlib.suppress(RunError):
            if not size_problems(directory, Manifest.read(directory)):
                return directory
    raise RunError(
        f"--load auto: no good checkpoint in {save_dir}: each of {len(saved)} is damaged or was "
        "not finished; python -m llama_lib verify names the files."
    )


def saved_script(checkpoint: Path) -> str | None:
    """The script that a checkpoint is of; None if it does not say."""
    try:
        saved = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        return script_of(saved["options"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def local_model(name: str, cache_dir: str) -> Path:
    """The Hugging Face folder of a path, checkpoint or hub id; one process per host downloads."""
    path = Path(name).expanduser()
    if path.is_dir():
        return model_folder(name)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model_path {name}: no such folder.")
    from huggingface_hub import snapshot_download

    try:
        with once(Path(cache_dir).expanduser(), f"model {name}", "download"):
            return Path(
                snapshot_download(
                    name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
                )
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_path {name}: not a folder here, and the hub gives no such model "
            f"({str(error).splitlines()[0]})."
        ) from None

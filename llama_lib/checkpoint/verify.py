"""`python -m llama_lib verify CHECKPOINT`: is this checkpoint whole, and does it hold a model?"""

import argparse
from pathlib import Path

from llama_lib.checkpoint.manifest import (
    MANIFEST,
    STEP_PATTERN,
    Manifest,
    hash_problems,
    looks_like_hugging_face,
    size_problems,
    step_directories,
)
from llama_lib.errors import RunError, UserError


def checkpoint_problems(directory: Path) -> list[str]:
    """Everything wrong with a checkpoint: manifest, sizes, hashes, tensor names and shapes."""
    try:
        manifest = Manifest.read(directory)
    except RunError as error:
        return [str(error)]
    problems = size_problems(directory, manifest)
    if not problems:
        problems = hash_problems(directory, manifest, manifest.files)
    return problems or tensor_problems(directory)


def tensor_problems(directory: Path) -> list[str]:
    """Tensors that are missing, unknown or of another shape than the model's."""
    import torch
    from transformers import AutoModelForCausalLM

    from llama_lib.checkpoint.adapters import ADAPTER_WEIGHTS
    from llama_lib.checkpoint.parts import STATE
    from llama_lib.checkpoint.tensors import TensorReader, shape_problems
    from llama_lib.checkpoint.writing import OPTIMIZER_INDEX
    from llama_lib.inference import ADAPTER, MODEL
    from llama_lib.models import model_config

    problems, trained = [], {}
    adapted = (directory / ADAPTER).is_dir()
    if (directory / MODEL).is_dir() or not adapted:
        try:
            config = model_config(str(directory / MODEL))
        except UserError as error:
            return error.problems
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        trained = {name: tuple(p.shape) for name, p in model.named_parameters()}
        problems = shape_problems(TensorReader(directory / MODEL), trained)
    if adapted:
        # Their shapes follow from a model that need not be here: the optimizer's must agree.
        adapters = TensorReader(directory / ADAPTER, single=f"{ADAPTER_WEIGHTS}.safetensors")
        trained = {name: adapters.shape(name) for name in adapters.weight_map}
    moments = {f"{name}/{key}": shape for name, shape in trained.items() for key in STATE}
    problems += shape_problems(TensorReader(directory / "optimizer", OPTIMIZER_INDEX), moments)
    return problems


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib verify",
        description="Check manifest, hashes, tensor names and shapes. Exit code 1: a problem.",
    )
    parser.add_argument("checkpoint", help="a step-XXXXXXXX directory, or a save_dir (all of them)")
    path = Path(parser.parse_args(argv).checkpoint)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory.")
    if looks_like_hugging_face(path):
        raise UserError(f"{path} is a Hugging Face folder, not a checkpoint: it has no {MANIFEST}.")
    targets = [path] if (path / MANIFEST).is_file() else step_directories(path)
    if not targets and STEP_PATTERN.match(path.name):
        targets = [path]
    if not targets:
        raise UserError(
            f"{path}: no checkpoint here; expected step-XXXXXXXX or a --save_dir of some."
        )
    failed = False
    for target in targets:
        problems = checkpoint_problems(target)
        failed |= bool(problems)
        if problems:
            print(f"{target}: DAMAGED")
            for problem in problems:
                print(f"  {problem}")
        else:
            manifest = Manifest.read(target)
            size = sum(record.size for record in manifest.files.values())
            print(
                f"{target}: good; step {manifest.step}, {manifest.plugin}, "
                f"{len(manifest.files)} files, {size / 2**20:.1f} MB"
            )
    return int(failed)

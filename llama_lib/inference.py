"""`generate` and `evaluate`: what a saved model writes, and its loss on text.

Invariant: works on any Hugging Face folder or checkpoint through plain transformers, one process,
without ColossalAI.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from llama_lib.checkpoint.manifest import MANIFEST, step_directories
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.tokenizer import DEFAULT_CACHE_DIR, load_tokenizer
from llama_lib.errors import RunError, UserError

# Parts of a checkpoint, and files in them by the names of transformers and peft.
MODEL = "model"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"

TEXT_TOKENS = 100
ANSWER_TOKENS = 512  # longer than nearly every answer of the instruction sets; chosen


def served_folder(path: str) -> Path:
    """The folder of a checkpoint, of the newest one in a save_dir, or the path itself.

    It holds a whole model, or the adapters of one (peft) where nothing else was saved.

    Raises:
        UserError: there is no model, or the checkpoint never finished.
    """
    root = Path(path).expanduser()
    candidates = [root, *step_directories(root)]
    for candidate in candidates:
        if (candidate / MANIFEST).is_file():
            whole = (candidate / MODEL).is_dir() or not (candidate / ADAPTER).is_dir()
            return candidate / (MODEL if whole else ADAPTER)
    if (root / "config.json").is_file() or is_adapter(root):
        return root
    if (root / MODEL / "config.json").is_file() or is_adapter(root / ADAPTER):
        raise UserError(f"{path}: this checkpoint has no {MANIFEST}, its save did not finish.")
    raise UserError(
        f"{path}: no model here; expected a step-XXXXXXXX checkpoint, a --save_dir that holds one, "
        "or a Hugging Face folder."
    )


def model_folder(path: str) -> Path:
    """As served_folder, but a whole model it must be.

    Raises:
        UserError: there is no model, only the adapters of one, or the checkpoint never finished.
    """
    folder = served_folder(path)
    if is_adapter(folder):
        raise UserError(
            f"{path} holds adapters of {base_of(folder)} only, expected a whole model: save one "
            "with --merge_lora."
        )
    return folder


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(adapter: Path) -> str:
    """The model that adapters were trained on: a folder or hub id.

    Raises:
        UserError: the folder does not say.
    """
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG} does not say which model the adapters belong to: expected "
            "its folder under base_model_name_or_path."
        )
    return base


def load_model(path: str) -> tuple[Any, Any]:
    """(model in evaluation mode on the GPU if there is one, tokenizer) of a checkpoint.

    Adapters are put on the model they were trained on.

    Raises:
        UserError: there is no model, tokenizer or safetensors file, or the adapters' model is gone.
        RunError: a file of the model is damaged.
    """
    import torch

    folder = served_folder(path)
    model = _adapted_model(folder) if is_adapter(folder) else _whole_model(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), load_tokenizer(str(folder))


def _whole_model(folder: Path | str) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        # Said, because where nothing is said transformers asks on the terminal, and a y runs it.
        return AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    except SafetensorError as error:
        raise RunError(
            f"{folder} is damaged ({error}); python -m llama_lib verify names the files."
        ) from None
    except (OSError, ValueError) as error:
        # ValueError: the model is code that comes with it, or of a kind that transformers lacks.
        reason = str(error).splitlines()[0]
        if "trust_remote_code" in reason:
            reason = "it is code that comes with the model, which is never run"
        raise UserError(f"{folder} cannot be loaded: {reason}") from None


def _check_adapter(folder: Path) -> None:
    """Raises UserError for adapters that are not LoRA in safetensors.

    peft takes a pickle where there are no safetensors, and other kinds load tokenizers and modules
    by names that stand in their configuration.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        kind, megatron = config.get("peft_type"), config.get("megatron_config")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from None
    if kind != "LORA" or megatron:
        found = f"{kind} with megatron_config" if megatron else str(kind)
        raise UserError(f"{folder} holds adapters of the kind {found}, expected LORA.")
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(
            f"{folder} has no {ADAPTER_FILE}: adapters are read from safetensors only (pickled "
            ".bin files can run code); save them again with peft's save_pretrained."
        )


def _adapted_model(folder: Path) -> Any:
    """The adapters' model with them on."""
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    base = base_of(folder)
    _check_adapter(folder)
    path = Path(base).expanduser()
    if not path.is_dir() and (path.is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise UserError(
            f"{folder} holds adapters of {base}, and there is no such folder: put the model back, "
            f"or name its place under base_model_name_or_path in {folder / ADAPTER_CONFIG}. "
            "--merge_lora saves whole models, which need no other."
        )
    model = _whole_model(model_folder(base) if path.is_dir() else base)
    _check_base(model, base, folder)
    if (folder / GENERATION_CONFIG).is_file():
        # What ends an answer may be another token than what ends a text of the base.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    try:
        return PeftModel.from_pretrained(model, folder)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the adapters in {folder} cannot be put on {base}: {reason}") from None


def _check_base(model: Any, base: str, adapter: Path) -> None:
    """Raises UserError if `model` is not the one that the adapters of a checkpoint were trained on.

    Other tools' adapters come without anything to tell by.
    """
    from llama_lib.checkpoint.adapters import BASE_SAMPLE, base_sample, other_base
    from llama_lib.engine import DTYPES

    path = adapter.parent / BASE_SAMPLE
    if not path.is_file():
        return
    saved = json.loads(path.read_text("utf-8"))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    same_precision = DTYPES[saved["precision"]] == model.dtype
    if name := other_base(base_sample(model, shapes), saved["sample"], same_precision):
        raise UserError(
            f"{adapter} holds adapters of another model than {base} is now: {name} has changed "
            "since. Put the weights back that they were trained on."
        )


def generate_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib generate",
        description="Continue a prompt with a checkpoint, or talk to a chat model.",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint, save_dir or Hugging Face folder")
    add("--prompt", help="text to continue; with --chat the one question to answer")
    add("--chat", action="store_true", help="talk: a line of standard input is a question")
    add("--system", help="with --chat: how the model is to behave")
    add(
        "--max_new_tokens",
        type=int,
        help=f"default {TEXT_TOKENS}, with --chat {ANSWER_TOKENS} per answer",
    )
    add("--temperature", type=float, default=0.8, help="0: always the likeliest; default 0.8")
    add("--seed", type=int, default=42, help="of the sampling; default 42")
    arguments = parser.parse_args(argv)
    if arguments.prompt is None and not arguments.chat:
        raise UserError("nothing to write: give --prompt TEXT to continue it, or --chat to talk.")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system is part of a conversation: give --chat too.")
    limit = arguments.max_new_tokens
    if limit is None:
        limit = ANSWER_TOKENS if arguments.chat else TEXT_TOKENS
    if limit < 1 or arguments.temperature < 0:
        raise UserError("--max_new_tokens must be at least 1 and --temperature not negative.")
    import torch

    from llama_lib.generation import (
        Conversation,
        Sampling,
        answer_once,
        check_template,
        new_ids,
        talk,
    )

    if arguments.chat:  # refused before the weights are read
        check_template(
            load_tokenizer(str(served_folder(arguments.checkpoint))), arguments.checkpoint
        )
    model, tokenizer = load_model(arguments.checkpoint)
    torch.manual_seed(arguments.seed)
    sampling = Sampling(limit, arguments.temperature)
    if arguments.chat:
        name = arguments.checkpoint
        conversation = Conversation(model, tokenizer, sampling, name, arguments.system)
        if arguments.prompt is None:
            talk(conversation)
        else:
            answer_once(conversation, arguments.prompt)
        return 0
    # Training puts EOS between documents, so after it the model begins one.
    ids = tokenizer(arguments.prompt)["input_ids"] or [tokenizer.eos_token_id]
    output = ids + new_ids(model, ids, sampling)
    print(tokenizer.decode(output, skip_special_tokens=True))
    return 0


def evaluate_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib evaluate",
        description="Mean next-token loss (nats) of a checkpoint, for each source of the data.",
    )
    parser.add_argument("checkpoint", help="checkpoint, save_dir or Hugging Face folder")
    parser.add_argument("-d", "--dataset", nargs="+", required=True, help="text or prepared data")
    parser.add_argument("-l", "--max_length", type=int, help="default: the model's context")
    parser.add_argument("-b", "--batch_size", type=int, default=4, help="default 4")
    parser.add_argument("--max_batches", type=int, help="per source; default: all")
    parser.add_argument(
        "--cache_dir", default=DEFAULT_CACHE_DIR, help="where text is kept once tokenised"
    )
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or (
        arguments.max_batches is not None and arguments.max_batches < 1
    ):
        raise UserError("--batch_size and --max_batches must be at least 1.")
    folder = served_folder(arguments.checkpoint)
    model, _ = load_model(str(folder))
    context = model.config.max_position_embeddings
    length = context if arguments.max_length is None else arguments.max_length
    if not 2 <= length <= context:
        raise UserError(
            f"--max_length: got {length}, expected 2 to {context}, the model's context."
        )
    # The tokenizer is given for prepared data too, which is refused if another one made it.
    dataset = prepare(
        PrepareRequest(
            datasets=arguments.dataset,
            tokenizer=str(folder),
            eval_ratio=0.0,
            cache_dir=arguments.cache_dir,
            vocab_size=model.config.vocab_size,
        )
    )
    total, labels = 0.0, 0
    for source in dataset.sources:
        part, count = _loss(
            model, dataset.only(source), length, arguments.batch_size, arguments.max_batches
        )
        if count:
            print(f"{source}: {part / count:.4f} nats per token over {count:,} tokens")
        total, labels = total + part, labels + count
    if not labels:
        raise UserError(f"{' '.join(arguments.dataset)}: no text of at least two tokens.")
    print(f"all: {total / labels:.4f} nats per token over {labels:,} tokens")
    return 0


def _loss(
    model: Any, dataset: PreparedDataset, length: int, batch_size: int, max_batches: int | None
) -> tuple[float, int]:
    """(summed loss, label tokens) over rows of `length` ids, at most `max_batches` batches."""
    import torch
    from torch.nn.functional import cross_entropy

    limit = None if max_batches is None else max_batches * batch_size
    rows = [torch.from_numpy(row) for row in itertools.islice(dataset.rows(length), limit)]
    total, count = 0.0, 0
    # The last row of a source may be shorter; it then makes a batch of its own.
    for size, group in itertools.groupby(rows, key=len):
        same = list(group)
        for first in range(0, len(same) if size > 1 else 0, batch_size):
            ids = torch.stack(same[first : first + batch_size]).to(model.device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, :-1].float()
            targets = ids[:, 1:].flatten()
            total += cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            count += targets.numel()
    return total, count

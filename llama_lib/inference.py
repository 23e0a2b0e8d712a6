"""`generate` and `evaluate`: what a saved model writes, and its loss on text.

Invariant: works on any Hugging Face folder or checkpoint through plain transformers, one process,
without ColossalAI.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

from llama_lib.checkpoint.manifest import MANIFEST, step_directories
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.tokenizer import DEFAULT_CACHE_DIR, load_tokenizer
from llama_lib.errors import RunError, UserError


def model_folder(path: str) -> Path:
    """The Hugging Face folder of a checkpoint, of the newest one in a save_dir, or the path itself.

    Raises:
        UserError: there is no model, or the checkpoint never finished.
    """
    root = Path(path).expanduser()
    candidates = [root, *step_directories(root)]
    for candidate in candidates:
        if (candidate / MANIFEST).is_file():
            return candidate / "model"
    if (root / "config.json").is_file():
        return root
    if (root / "model" / "config.json").is_file():
        raise UserError(f"{path}: this checkpoint has no {MANIFEST}, its save did not finish.")
    raise UserError(
        f"{path}: no model here; expected a step-XXXXXXXX checkpoint, a --save_dir that holds one, "
        "or a Hugging Face folder."
    )


def load_model(path: str) -> tuple[Any, Any]:
    """(model in evaluation mode on the GPU if there is one, tokenizer) of a checkpoint.

    Raises:
        UserError: there is no model, tokenizer or safetensors file.
        RunError: a file of the model is damaged.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = model_folder(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype="auto", use_safetensors=True
        )
    except SafetensorError as error:
        raise RunError(
            f"{folder} is damaged ({error}); python -m llama_lib verify names the files."
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), load_tokenizer(str(folder))


def generate_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llama_lib generate", description="Continue a prompt with a checkpoint."
    )
    parser.add_argument("checkpoint", help="checkpoint, save_dir or Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="default 100")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token; default 0.8"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the sampling; default 42")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        raise UserError("--max_new_tokens must be at least 1 and --temperature not negative.")
    import torch

    model, tokenizer = load_model(arguments.checkpoint)
    torch.manual_seed(arguments.seed)
    ids = tokenizer(arguments.prompt)["input_ids"]
    # Training puts EOS between documents, so after it the model begins one.
    inputs = torch.tensor([ids or [tokenizer.eos_token_id]], device=model.device)
    sampling = arguments.temperature > 0
    with torch.no_grad():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=sampling,
            temperature=arguments.temperature if sampling else None,
        )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
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
    folder = model_folder(arguments.checkpoint)
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

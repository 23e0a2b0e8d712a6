"""The data of a fine-tuning run, from its options: tokenizer with its chat template, conversations.

Invariant: the tokenizer that training uses is, file for file, the one that is saved beside the
model, so that serving builds the ids that training saw.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_lib.checkpoint.resize import NewRows, new_rows
from llama_lib.config import Options
from llama_lib.data.chat.records import takes_task_name
from llama_lib.data.chat.templates import ChatTemplate, use_template
from llama_lib.data.chat.training import ChatRequest, chat_data, kinds_of
from llama_lib.data.entries import parse_entries
from llama_lib.data.once import once
from llama_lib.data.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    vocabulary_size,
)
from llama_lib.data.training_data import TrainingData
from llama_lib.errors import UserError
from llama_lib.lora import new_token_problems
from llama_lib.run_data import is_chosen
from llama_lib.samples import prompt_problems, read_prompts

# Held-out conversations below which their loss says little; chosen.
FEW = 10


@dataclass(frozen=True)
class Chat:
    """What a fine-tuned model is served with.

    Attributes:
        template: name of the chat template.
        end_token_ids: tokens that end an answer.
        new_rows: rows of the embedding for tokens that the template brought; None without any.
        prompts: what the model is asked at --sample_interval.
        notes: what was decided for the user, one line each.
        ends: the end tokens as text; `added`: tokens that the template brought.
    """

    template: str
    end_token_ids: list[int]
    new_rows: NewRows | None = None
    prompts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The template and its tokens, for the log."""
        lines = [f"chat template {self.template}: answers end with {', '.join(self.ends)}"]
        if self.added:
            added = ", ".join(self.added)
            lines.append(f"  {added} are new: their embeddings start as the mean of all others")
        return lines


def open_chat(options: Options, config: Any, folder: Path) -> tuple[TrainingData, Any, Chat]:
    """The conversations of a run, their tokenizer, and what belongs to the template.

    `config.vocab_size` grows when the template brings tokens.

    Args:
        folder: the model's, with its tokenizer.

    Raises:
        UserError: the data or the tokenizer cannot be used.
    """
    data = options.data
    name = options.model.tokenizer or str(folder)
    tokenizer = load_tokenizer(name, data.cache_dir)
    if problems := check_vocabulary(tokenizer, config.vocab_size):
        raise UserError(problems)
    prompts = read_prompts(options.report.sample_prompts or [])
    kinds: set[str] = set()
    if options.model.chat_template is None and tokenizer.chat_template is None:
        kinds = kinds_of(data.dataset, _task(options), data.cache_dir)
    choice = use_template(tokenizer, options.model.chat_template, kinds)
    if problems := new_token_problems(options, len(choice.added_tokens)):
        raise UserError(problems)
    try:
        template = ChatTemplate(tokenizer)
    except UserError as error:
        raise UserError([f"--chat_template {choice.name}: {p}" for p in error.problems]) from None
    if problems := prompt_problems(tokenizer, prompts, options.model.max_length):
        raise UserError(problems)
    rows = new_rows(tokenizer, config.vocab_size, choice.added_tokens)
    config.vocab_size = max(config.vocab_size, vocabulary_size(tokenizer))
    request = ChatRequest(
        datasets=data.dataset,
        tokenizer=str(_kept(tokenizer, data.cache_dir)),
        task_name=_task(options),
        eval_data=data.eval_data or (),
        eval_ratio=data.eval_ratio,
        cache_dir=data.cache_dir,
        seed=options.training.seed,
        workers=data.workers,
        skip_bad_lines=data.skip_bad_lines,
        max_length=options.model.max_length,
        min_length=data.min_length,
        overlong=data.overlong,
        loss_role=data.loss_role,
        other_role_weight=data.other_role_weight,
        packing=not data.no_packing,
    )
    notes = []
    if options.model.chat_template is None:
        notes.append(f"--chat_template is {choice.name}: {choice.note}")
    if _task(options) is not None and not takes_task_name(_names(options)):
        notes.append("--task_name is ignored: no dataset of the hub is given without one")
    if template.note:
        notes.append(template.note)
    if options.data.loss_role == "all" and options.data.other_role_weight:
        notes.append("--other_role_weight is ignored: --loss_role all leaves no other role")
    if not options.model.lora_rank:
        names = ("lora_alpha", "lora_targets")
        notes += [f"--{n} is ignored without --lora_rank" for n in names if is_chosen(options, n)]
    conversations = chat_data(request)
    held_out = conversations.held_out
    if held_out is not None and held_out.num_conversations < FEW:
        notes.append(
            f"only {held_out.num_conversations} conversation(s) are held out: their loss says "
            "little; raise --eval_ratio or give --eval_data"
        )
    ends = tokenizer.convert_ids_to_tokens(template.end_token_ids)
    added = choice.added_tokens
    chat = Chat(choice.name, template.end_token_ids, rows, prompts, notes, ends, added)
    return conversations, tokenizer, chat


def _names(options: Options) -> list[str]:
    words = [*options.data.dataset, *(options.data.eval_data or [])]
    return [entry.name for entry in parse_entries(words)]


def _task(options: Options) -> str | None:
    """The typed --task_name; the default is part of one dataset only."""
    return options.data.task_name if is_chosen(options, "task_name") else None


def _kept(tokenizer: Any, cache_dir: str) -> Path:
    """The tokenizer with its template as a folder, which the processes that tokenise read."""
    key = f"{tokenizer_hash(tokenizer)}\n{tokenizer.chat_template}"
    cache = Path(cache_dir).expanduser()
    folder = cache / "tokenizers" / f"chat-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with once(cache, str(folder), "the tokenizer with its chat template"):
        if not (folder / "tokenizer.json").is_file():
            save_tokenizer(tokenizer, folder)
    return folder

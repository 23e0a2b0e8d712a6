"""The data of a run, from its options: prepared tokens or a stream, tokenizer, held-out text.

Invariant: the same options give the same data, in training and when a ledger is read afterwards.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_lib.config import Options
from llama_lib.data.chat.records import resolve_conversations
from llama_lib.data.entries import Entry, parse_entries
from llama_lib.data.opening import is_tokenised
from llama_lib.data.prepare import PrepareRequest, prepare
from llama_lib.data.prepared import PreparedDataset
from llama_lib.data.random_rows import RANDOM, random_data
from llama_lib.data.readers import TextFile
from llama_lib.data.sources import is_on_hub, records, resolve
from llama_lib.data.tokenise import text_hash
from llama_lib.data.tokenizer import check_vocabulary, load_tokenizer
from llama_lib.data.training_data import TrainingData, prepared_data
from llama_lib.errors import UserError
from llama_lib.models import DEFAULT_TOKENIZERS

ROWS_HAVE_NO_BORDERS = (
    "--document_mask needs to know where documents end; ready-made rows (input_ids, or prepare "
    "--num_token) do not say it. Give the text itself, with --packing best_fit for rows of whole "
    "documents, or leave out --document_mask."
)


def bend_data_defaults(options: Options) -> list[str]:
    """Held-out text cannot be taken from a stream: --eval_ratio is 0 there."""
    data = options.data
    if not data.streaming or is_chosen(options, "eval_ratio") or data.eval_ratio == 0:
        return []
    data.eval_ratio = 0.0
    if data.eval_data:
        return []
    return ["--eval_ratio is 0: a stream is read once; give --eval_data for held-out text"]


def is_random(options: Options) -> bool:
    """Whether the rows are random ids: -d random in benchmark.py."""
    return options.script == "benchmark" and options.data.dataset == [RANDOM]


def is_chosen(options: Options, name: str) -> bool:
    """Whether an option was given a value of its own: a run's specs.yaml holds the defaults too."""
    values, defaults = options.to_dict(), Options(script=options.script).to_dict()
    return name in options.typed and any(
        section[name] != defaults[title][name]
        for title, section in values.items()
        if name in section
    )


def data_option_problems(options: Options) -> list[str]:
    """What is wrong with the options of the data, whatever the data are."""
    problems: list[str] = []
    for words in (options.data.dataset, options.data.eval_data or []):
        try:
            entries = parse_entries(words)
        except UserError as error:
            problems += error.problems
            continue
        if words is not options.data.dataset:
            problems += [
                f"--eval_data {entry.text}: takes no [N] and no :weight."
                for entry in entries
                if entry.limit is not None or entry.weight is not None
            ]
    if options.script == "benchmark":
        problems += _random_problems(options)
    if options.data.streaming and not is_random(options):
        problems += _streaming_problems(options)
    return problems


def _random_problems(options: Options) -> list[str]:
    data = options.data
    if not is_random(options):
        return [
            f"--dataset {entry.text}: random rows cannot be mixed with others; give -d random "
            f"alone, or -d ./{RANDOM} for a file of that name."
            for entry in _entries(data.dataset)
            if entry.name == RANDOM
        ]
    problems = []
    if data.streaming:
        problems.append("--streaming reads text; leave it out, or give -d some text to read.")
    if data.eval_data:
        problems.append("--eval_data needs a tokenizer, random rows have none; give -d real data.")
    return problems


def _streaming_problems(options: Options) -> list[str]:
    data, training = options.data, options.training
    problems = []
    if training.max_steps is None and training.max_tokens is None:
        problems.append(
            "--streaming needs --max_steps or --max_tokens: how long a stream is shows only at its "
            "end, and the learning rate's schedule needs the number of steps."
        )
    if is_chosen(options, "num_epochs"):
        problems.append(
            "--num_epochs has no meaning with --streaming, which begins anew when it comes to the "
            "end; say how long with --max_steps or --max_tokens."
        )
    if data.packing != "concat":
        problems.append(
            f"--packing {data.packing} needs the lengths of all documents, which a stream does not "
            "know; leave out --streaming, or use --packing concat."
        )
    if is_chosen(options, "eval_ratio") and data.eval_ratio > 0 and not data.eval_data:
        problems.append(
            f"--eval_ratio {data.eval_ratio} cannot be taken from a stream; give --eval_data."
        )
    for entry in _entries(data.dataset):
        if is_tokenised(entry.name):
            problems.append(f"{entry.name} is tokenised already: leave out --streaming.")
        if entry.limit is not None:
            problems.append(
                f"{entry.text}: a stream cannot draw {entry.limit} documents at random before it "
                "has seen all; prepare the data first (leave out --streaming)."
            )
    return problems


def _entries(words: list[str]) -> list[Entry]:
    try:
        return parse_entries(words)
    except UserError:
        return []


def local_data_problems(options: Options) -> list[str]:
    """Wrong files and folders, shown beside other problems; alone, `prepare` names them."""
    cache_dir = Path(options.data.cache_dir).expanduser()
    chats = options.script == "finetune"
    problems: list[str] = []
    if is_random(options):
        return problems
    for entry in _entries(options.data.dataset) + _entries(options.data.eval_data or []):
        local = entry.name != "sample" and not is_on_hub(entry.name)
        if local and (chats or not is_tokenised(entry.name)):
            try:
                if chats:
                    resolve_conversations(entry.name, None, cache_dir)
                else:
                    resolve(entry.name, cache_dir)
            except UserError as error:
                problems += error.problems
    return problems


def tokenizer_name(options: Options, model_folder: Path | None) -> str | None:
    """The tokenizer of a run; None leaves it to the data (prepared, or the sample's own)."""
    if options.model.tokenizer is not None:
        return options.model.tokenizer
    if model_folder is not None:
        return str(model_folder)
    names = [entry.name for entry in _entries(options.data.dataset)]
    if names == ["sample"] or any(is_tokenised(name) for name in names):
        return None
    name = options.model.config
    return DEFAULT_TOKENIZERS.get(name, name if not name.endswith(".json") else None)


def open_data(options: Options, config: Any, model_folder: Path | None) -> tuple[TrainingData, Any]:
    """The data of a run and their tokenizer (None: random ids); what is missing is prepared first.

    Raises:
        UserError: the data cannot be had, or do not fit the options.
    """
    if is_random(options):
        vocab_size, seed = config.vocab_size, options.training.seed
        rows = random_data(vocab_size, options.model.max_length, seed, options.model.document_mask)
        return rows, None
    try:
        if options.data.streaming:
            return _streamed(options, config, model_folder)
        return _prepared(options, config, model_folder)
    except PermissionError as error:
        raise UserError(f"{error.filename}: no permission to use it; change its mode.") from None


def _request(options: Options, config: Any, model_folder: Path | None) -> PrepareRequest:
    data = options.data
    return PrepareRequest(
        datasets=data.dataset,
        tokenizer=tokenizer_name(options, model_folder),
        eval_data=data.eval_data or (),
        eval_ratio=data.eval_ratio,
        cache_dir=data.cache_dir,
        seed=options.training.seed,
        workers=data.workers,
        skip_bad_lines=data.skip_bad_lines,
        vocab_size=config.vocab_size,
    )


def _prepared(options: Options, config: Any, model_folder: Path | None) -> tuple[TrainingData, Any]:
    dataset = prepare(_request(options, config, model_folder))
    if options.model.document_mask and dataset.has_rows:
        raise UserError(ROWS_HAVE_NO_BORDERS)
    tokenizer = load_tokenizer(str(dataset.tokenizer_path), options.data.cache_dir)
    data = prepared_data(
        dataset,
        options.model.max_length,
        options.training.seed,
        options.data.packing,
        options.model.document_mask,
        tokenizer.eos_token_id,
        options.data.cache_dir,
    )
    return data, tokenizer


def _streamed(options: Options, config: Any, model_folder: Path | None) -> tuple[TrainingData, Any]:
    from llama_lib.data.stream import open_stream

    data, entries = options.data, parse_entries(options.data.dataset)
    name = tokenizer_name(options, model_folder)
    if name is None and [entry.name for entry in entries] == ["sample"]:
        name = "sample"
    if name is None:
        raise UserError("no tokenizer is given: pass a folder, a hub id or `sample`: --tokenizer.")
    tokenizer = load_tokenizer(name, data.cache_dir)
    if problems := check_vocabulary(tokenizer, config.vocab_size):
        raise UserError(problems)
    if options.model.document_mask:
        _refuse_rows(entries, data.cache_dir)
    held_out, excluded = None, set()
    if data.eval_data:
        request = _request(options, config, model_folder)
        held_out = prepare(
            replace(request, datasets=data.eval_data, eval_data=(), eval_ratio=0.0, tokenizer=name)
        )
        excluded = _text_hashes(options)
    stream = open_stream(
        entries,
        name,
        options.model.max_length,
        options.training.seed,
        data.cache_dir,
        workers=data.workers,
        document_mask=options.model.document_mask,
        skip_bad_lines=data.skip_bad_lines,
        window=data.shuffle_window,
        excluded=excluded,
    )
    return TrainingData(
        identity=stream.identity,
        tokenizer_hash=stream.tokenizer_hash,
        open_rows=stream.rows,
        passages=stream.passages,
        changes=stream.problems_of,
        held_out=held_out,
        lines=stream.describe(),
    ), tokenizer


def _refuse_rows(entries: list[Entry], cache_dir: str) -> None:
    """What lies here is looked at now; files of the hub only when they are there."""
    names = [entry.name for entry in entries if not is_on_hub(entry.name)]
    sources = resolve(names, Path(cache_dir).expanduser()) if names else []
    if any(TextFile(path).is_rows for source in sources for path in source.files):
        raise UserError(ROWS_HAVE_NO_BORDERS)


def _text_hashes(options: Options) -> set[int]:
    """Hashes of the texts of --eval_data, which a stream leaves out."""
    entries = parse_entries(options.data.eval_data or [])
    names = [entry.name for entry in entries if not is_tokenised(entry.name)]
    if not names:
        return set()
    sources = resolve(names, Path(options.data.cache_dir).expanduser())
    return {
        text_hash(text.encode("utf-8"))
        for source in sources
        for text in records(source, options.data.skip_bad_lines)
        if isinstance(text, str)
    }


def ignored_data_settings(options: Options, held_out: PreparedDataset | None) -> list[str]:
    """One line for each typed setting that has nothing to act on."""
    notes = []
    if is_random(options):
        names = ("tokenizer", "packing", "shuffle_window", "eval_ratio", "skip_bad_lines")
        return [
            f"--{name} is ignored: the rows are random ids"
            for name in (*names, "workers", "eval_interval")
            if is_chosen(options, name)
        ]
    if options.report.eval_interval and held_out is None:
        notes.append("--eval_interval is ignored: there is no held-out text (see --eval_ratio)")
    tokens = [is_tokenised(entry.name) for entry in _entries(options.data.dataset)]
    for name in ("eval_ratio", "skip_bad_lines", "workers"):
        if all(tokens) and is_chosen(options, name):
            notes.append(f"--{name} is ignored: --dataset is prepared already")
    if options.data.eval_data and is_chosen(options, "eval_ratio") and options.data.eval_ratio:
        notes.append("--eval_ratio is ignored: --eval_data is the held-out text")
    if options.data.streaming and any(
        is_tokenised(entry.name) for entry in _entries(options.data.eval_data or [])
    ):
        notes.append(
            "--eval_data is tokenised already: its documents cannot be recognised in the stream, "
            "so nothing is left out of it"
        )
    if is_chosen(options, "shuffle_window") and not options.data.streaming:
        notes.append("--shuffle_window is ignored: prepared documents are all shuffled")
    return notes

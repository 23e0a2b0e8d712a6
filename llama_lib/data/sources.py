"""Turn what `-d` names into sources: a name and the files behind it, read one by one.

Invariant: resolving is deterministic, and no two sources share a name.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_lib.data.hub import hub_files, is_hub_name
from llama_lib.data.readers import FORMATS, TextFile, file_format
from llama_lib.data.sample import write_sample
from llama_lib.errors import UserError

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Source:
    """One stream of documents: the texts of `files`, in that order."""

    name: str
    files: tuple[Path, ...]


def records(source: Source, skip_bad_lines: bool = False) -> Iterator[str]:
    """The texts of a source, streamed; a bad record is an error naming file and line."""
    for path in source.files:
        yield from TextFile(path, skip_bad_lines)


def resolve(datasets: str | Sequence[str], cache_dir: Path) -> list[Source]:
    """Sources of one or several datasets; downloads what a hub name stands for.

    A source per file stem (`arxiv_sample.jsonl` is `arxiv_sample`); the shards
    `x-00000-of-00002` and so on of one folder are one source. Equal stems get the names of
    their folders in front. Raises UserError with every problem found.
    """
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    problems: list[str] = []
    groups: dict[tuple[str, ...], list[Path]] = {}
    for dataset in datasets:
        try:
            for path_parts, path in _expand(dataset, cache_dir):
                files = groups.setdefault(path_parts, [])
                if path in files:
                    problems.append(f"{path} is given twice: name it once.")
                files.append(path)
        except UserError as error:
            problems += error.problems
    if not datasets:
        problems.append("no dataset is given: pass one with -d.")
    if problems:
        raise UserError(problems)
    names = _names(list(groups))
    return [Source(names[parts], tuple(files)) for parts, files in groups.items()]


def _expand(dataset: str, cache_dir: Path) -> list[tuple[tuple[str, ...], Path]]:
    """(what the source may be called, from the outermost folder inwards; file) in order."""
    if dataset == "sample":
        return [(("sample", path.stem), path) for path in write_sample(cache_dir / "sample")]
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = _folder_files(path)
    elif path.is_file():
        files = [path]
    elif glob.has_magic(dataset):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"{dataset}: no file matches this pattern (from {Path.cwd()}).")
    elif is_hub_name(dataset) and file_format(path) is None:
        return [((*parts,), file) for parts, file in hub_files(dataset)]
    else:
        raise UserError(f"{dataset}: there is no such file or folder (from {Path.cwd()}).")
    problems = [
        f"{file}: unsupported kind of file; expected one of {FORMATS}."
        for file in files
        if file_format(file) in (None, "arrow")
    ]
    problems += [f"{file} is empty." for file in files if not file.stat().st_size]
    if problems:
        raise UserError(problems)
    return [(_source_parts(file), file.resolve()) for file in files]


def _folder_files(folder: Path) -> list[Path]:
    inside = {path.name for path in folder.iterdir()}
    if "manifest.json" in inside:
        raise UserError(f"{folder} is a prepared dataset, which has to be the only one given.")
    if any(name.endswith(".idx") or name.endswith(".sizes") for name in inside):
        raise UserError(
            f"{folder} holds token files but no manifest.json: an unfinished or damaged prepared "
            "dataset. Delete it and prepare it again."
        )
    if {"state.json", "dataset_dict.json", "dataset_info.json"} & inside:
        raise UserError(
            f"{folder} was written by save_to_disk. Export it once: "
            f"datasets.load_from_disk({str(folder)!r}).to_parquet('data.parquet') "
            "(for each split), then -d data.parquet."
        )
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    usable = [path for path in files if file_format(path) not in (None, "arrow")]
    if not usable:
        found = ", ".join(sorted({path.suffix or path.name for path in files})) or "nothing"
        raise UserError(f"{folder} holds no data; found {found}, expected {FORMATS} files.")
    return usable


def _source_parts(file: Path) -> tuple[str, ...]:
    stem = file.name
    while file_format(Path(stem)) is not None:
        stem = stem.rsplit(".", 1)[0]
        for kind in (".jsonl", ".json"):
            stem = stem.removesuffix(kind)
    return (*file.resolve().parent.parts[1:], _SHARD.sub("", stem))


def _names(keys: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest tail of each key that no other key shares, as a file name."""
    names: dict[tuple[str, ...], str] = {}
    depth = 1
    while len(names) < len(keys):
        tails = {key: _safe(key[-depth:]) for key in keys}
        counts = Counter(tails.values())
        for key in keys:
            if key not in names and counts[tails[key]] == 1 and tails[key] not in names.values():
                names[key] = tails[key]
        if depth > max(len(key) for key in keys):
            # Only characters that cannot stand in a file name tell these apart.
            for number, key in enumerate(key for key in keys if key not in names):
                names[key] = f"{tails[key]}.{number}"
        depth += 1
    return names


def _safe(parts: tuple[str, ...]) -> str:
    return _UNSAFE.sub("_", "_".join(parts)).lstrip(".") or "source"

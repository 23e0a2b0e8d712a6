"""Turn what `-d` names into sources: a name and the files behind it, read one by one.

Invariant: resolving is deterministic, and no two sources share a name.
"""

import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llama_lib.data.bad_records import unreadable
from llama_lib.data.chat.sample import write_sample_conversations
from llama_lib.data.hub import hub_files, is_hub_name
from llama_lib.data.once import is_first_of_node
from llama_lib.data.readers import FORMATS, TextFile, file_format
from llama_lib.data.sample import write_sample
from llama_lib.errors import UserError

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")

# What stands beside data everywhere, and holds none.
_COMPANION = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|_success$|_(common_)?metadata$)", re.I
)
_ABOUT_DATA = ("dataset_infos.json", "dataset_info.json")
_COMPRESSION = re.compile(r"\.(xz|bz2|gz|zst|lz4|lzma|z|br|zip)$", re.I)
_KINDS_SHOWN = 8

# What a source may be called, from the outermost folder inwards.
_Parts = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """One stream of documents: the records of `files`, in that order.

    `entry` is the place of the word of `-d` that it comes from.
    """

    name: str
    files: tuple[Path, ...]
    entry: int = 0


@dataclass(frozen=True)
class _Found:
    """One file; `apart` is what its source is called where entries that share `parts` must not."""

    path: Path
    parts: _Parts
    apart: _Parts
    may_share: bool = True


def records(source: Source, skip_bad_lines: bool = False) -> Iterator[str]:
    """The texts of a source, streamed; a bad record is an error naming file and line."""
    for path in source.files:
        reader = TextFile(path, skip_bad_lines)
        if reader.is_rows:
            raise UserError(f"{path} holds ready-made rows of token ids; text is expected here.")
        yield from reader


def resolve(
    datasets: str | Sequence[str], cache_dir: Path, entries_apart: bool = False
) -> list[Source]:
    """Sources of one or several datasets; downloads what a hub name stands for.

    A source per file stem (`arxiv_sample.jsonl` is `arxiv_sample`); the shards
    `x-00000-of-00002` and so on of one folder are one source, and so is a folder written by
    save_to_disk. With `entries_apart`, which limits and weights need, no source has files of two
    entries. Equal stems get the names of their folders in front. Raises UserError with every
    problem found.
    """
    sources = locate(datasets, cache_dir, entries_apart)
    _check_tables(sources)
    return sources


def locate(
    datasets: str | Sequence[str],
    cache_dir: Path,
    entries_apart: bool = False,
    conversations: bool = False,
) -> list[Source]:
    """`resolve` without a look into the files, for text or for conversations."""
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    problems: list[str] = []
    found: list[tuple[int, _Found]] = []
    for entry, dataset in enumerate(datasets):
        try:
            found += [(entry, file) for file in _expand(dataset, cache_dir, conversations)]
        except UserError as error:
            problems += error.problems
    problems += _given_twice(file for _, file in found)
    if not datasets:
        problems.append("no dataset is given: pass one with -d.")
    if problems:
        raise UserError(problems)
    groups = _groups(found, entries_apart)
    names = _names(list(groups))
    return [
        Source(names[parts], tuple(file.path for _, file in files), entry=files[0][0])
        for parts, files in groups.items()
    ]


def is_on_hub(dataset: str) -> bool:
    """Whether a name is asked for on the hub, because no file or folder can be meant."""
    is_local = os.path.exists(os.path.expanduser(dataset)) or glob.has_magic(dataset)
    return (
        dataset != "sample"
        and not is_local
        and is_hub_name(dataset)
        and file_format(Path(dataset)) is None
    )


def _groups(
    found: list[tuple[int, _Found]], entries_apart: bool
) -> dict[_Parts, list[tuple[int, _Found]]]:
    """The files of each source, in order."""
    entries_of: dict[_Parts, set[int]] = {}
    for entry, file in found:
        entries_of.setdefault(file.parts, set()).add(entry)
    groups: dict[_Parts, list[tuple[int, _Found]]] = {}
    for entry, file in found:
        shared = len(entries_of[file.parts]) > 1
        # A shell writes a pattern out as one word per shard, which are one source all the same.
        apart = shared and (entries_apart or not file.may_share)
        groups.setdefault(file.apart if apart else file.parts, []).append((entry, file))
    return groups


def _expand(dataset: str, cache_dir: Path, conversations: bool) -> list[_Found]:
    """The files behind one entry, in order."""
    if dataset == "sample":
        write = write_sample_conversations if conversations else write_sample
        return [_named(path, "sample", path.stem) for path in write(cache_dir / "sample")]
    name = os.path.expanduser(dataset)
    path = Path(name)
    if os.path.isdir(name):
        _check_is_no_result(path, "conversations are" if conversations else "text is")
        walk = _Walk(path)
        found = list(walk.files())
        if not found:
            inside = ", ".join(sorted(set(map(_kind, walk.unread)))) or "nothing"
            raise UserError(f"{path} holds no data; found {inside}, expected {FORMATS} files.")
        _tell_unread(path, walk.unread)
    elif os.path.isfile(name):
        found = [_file(path)]
    elif glob.has_magic(dataset):
        found = list(_matches(name))
        if not found:
            raise UserError(f"{dataset}: no file matches this pattern (from {Path.cwd()}).")
    elif is_on_hub(dataset):
        config = dataset.partition(":")[2]
        return [
            _Found(file, parts, (*parts, config) if config else parts, may_share=False)
            for parts, file in hub_files(dataset, conversations)
        ]
    else:
        raise UserError(f"{dataset}: there is no such file or folder (from {Path.cwd()}).")
    problems = [
        f"{file.path}: unsupported kind of file; expected one of {FORMATS}."
        for file in found
        if file_format(file.path) is None
    ]
    problems += [f"{file.path} is empty." for file in found if not file.path.stat().st_size]
    if problems:
        raise UserError(problems)
    return found


def _matches(pattern: str) -> Iterator[_Found]:
    """The files that match, and the folders of save_to_disk that do."""
    saved: list[Path] = []
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if any(folder in path.parents for folder in saved):
            continue
        if _is_saved(path):
            saved.append(path)
            yield from _saved(path)
        elif path.is_file():
            yield _file(path)
        elif not path.exists():
            raise UserError(f"{path} is a link to nothing: mend it or leave it out.")


@dataclass
class _Walk:
    """The data files of a folder and of those inside it, in the order of their names.

    Links to folders are followed, but no folder is read twice: a link to one inside `root` is
    passed by. `unread` are the files that are no data, without the hidden ones.
    """

    root: Path
    unread: list[Path] = field(default_factory=list)
    _visited: set[Path] = field(default_factory=set)

    def files(self) -> Iterator[_Found]:
        yield from self._in(self.root)

    def _in(self, folder: Path) -> Iterator[_Found]:
        self._visited.add(folder.resolve())
        if _is_saved(folder):
            yield from _saved(folder)
            return
        inside = _listed(folder)
        names = {path.name for path in inside}
        has_arrow = any(name.endswith(".arrow") for name in names)
        if has_arrow and {"state.json", "dataset_info.json"} & names:
            raise UserError(
                f"{folder} is an unfinished folder of save_to_disk or a cache of the datasets "
                "library: it needs both state.json and dataset_info.json. Save it again: "
                "dataset.save_to_disk(FOLDER), then -d FOLDER."
            )
        for path in inside:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if not self._is_met_elsewhere(path):
                    yield from self._in(path)
            elif path.is_file() and path.name not in _ABOUT_DATA and file_format(path):
                yield _file(path)
            else:
                self.unread.append(path)

    def _is_met_elsewhere(self, folder: Path) -> bool:
        real = folder.resolve()
        if real in self._visited:
            return True
        root = self.root.resolve()
        if not folder.is_symlink() or not real.is_relative_to(root):
            return False
        # What lies in a hidden folder is met by links alone.
        return not any(part.startswith(".") for part in real.relative_to(root).parts)


def _tell_unread(folder: Path, unread: Iterable[Path]) -> None:
    kinds = Counter(
        _kind(path)
        for path in unread
        if path.name not in _ABOUT_DATA and not _COMPANION.match(path.name)
    )
    if kinds and is_first_of_node():
        common = kinds.most_common(_KINDS_SHOWN)
        shown = [f"{count} {kind}" for kind, count in common]
        if others := kinds.total() - sum(count for _, count in common):
            shown.append(f"{others} of other kinds")
        _say_once(f"{folder}: not read: {', '.join(shown)}; only {FORMATS} files are")


@cache
def _say_once(line: str) -> None:
    """A run resolves the same words several times."""
    print(line, file=sys.stderr, flush=True)


def _kind(path: Path) -> str:
    if not path.exists():
        return "link to nothing"
    inner = Path(_COMPRESSION.sub("", path.name))
    ending = inner.suffix + path.name.removeprefix(inner.name)
    return ending or path.name


def _given_twice(found: Iterable[_Found]) -> Iterator[str]:
    files: dict[str, list[Path]] = {}
    for file in found:
        # Equal files of a dataset on the hub are one file in its cache.
        real = os.path.realpath(file.path) if file.may_share else str(file.path)
        files.setdefault(real, []).append(file.path)
    for first, *others in files.values():
        if first in others:
            yield f"{first} is given twice: name it once."
        elif others:
            yield f"{first} and {others[0]} are the same file, given twice: name it once."


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


def _check_is_no_result(folder: Path, wanted: str) -> None:
    names = {path.name for path in _listed(folder)}
    if "manifest.json" in names:
        raise UserError(f"{folder} is a prepared dataset; {wanted} expected here.")
    pairs = sorted(name.removesuffix(".idx") for name in names if name.endswith(".idx"))
    if pairs or any(name.endswith(".sizes") for name in names):
        raise UserError(
            f"{folder} holds token files but no manifest.json: an unfinished or damaged prepared "
            "dataset. Delete it and prepare it again. A pair of files made by Megatron's tools is "
            f"named without its endings: -d {folder / (pairs or ['PREFIX'])[0]}"
        )


def _is_saved(folder: Path) -> bool:
    has = [
        (folder / name).is_file()
        for name in ("dataset_dict.json", "state.json", "dataset_info.json")
    ]
    return has[0] or (has[1] and has[2])


def _saved(folder: Path) -> Iterator[_Found]:
    """The files of a folder written by save_to_disk, one source named like the folder."""
    within = folder
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            raise UserError(
                f"{folder} has no split `train`; found {', '.join(splits) or 'none'}. Name the one "
                f"to take: -d {folder / (splits or ['SPLIT'])[0]}"
            )
        within = folder / "train"
    state = _json(within / "state.json")
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise UserError(
            f"{within} is a selection from other rows. Write it out: "
            "datasets.load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER), then -d OTHER."
        )
    for file in state.get("_data_files", []):
        path = within / file["filename"]
        if not path.is_file():
            raise UserError(f"{path} is missing, which {within / 'state.json'} names.")
        yield _named(path, *_absolute(folder).parts[1:])


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}. Save the dataset again.") from error


def _check_tables(sources: Iterable[Source]) -> None:
    """Wrong columns, and texts beside ready-made rows, are found before anything is read."""
    problems = []
    for source in sources:
        if not any(file_format(path) in ("parquet", "arrow") for path in source.files):
            continue
        first: dict[bool, Path] = {}
        try:
            for path in source.files:
                first.setdefault(TextFile(path).is_rows, path)
        except UserError as error:
            problems += error.problems
        if len(first) > 1:
            problems.append(
                f"{first[False]} holds text and {first[True]} ready-made rows, both of the source "
                f"{source.name}: rename one of them, so that each is a source of its own."
            )
    if problems:
        raise UserError(problems)


def _named(path: Path, *parts: str) -> _Found:
    return _Found(_absolute(path), parts, parts)


def _absolute(path: Path) -> Path:
    """As it was given: a link's own name says what it is, that of a blob behind it does not."""
    if ".." in path.parts:
        # Behind a link `..` is another folder than the one before it.
        path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    return path.absolute()


def _file(path: Path) -> _Found:
    path = _absolute(path)
    if file_format(path) is None:
        # A link may also be the shorter name.
        path = path.resolve()
    stem = path.name
    while file_format(Path(stem)) is not None:
        stem = stem.rsplit(".", 1)[0]
        for kind in (".jsonl", ".json"):
            stem = stem.removesuffix(kind)
    folders = path.parent.parts[1:]
    return _Found(path, (*folders, _SHARD.sub("", stem)), (*folders, path.name))


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

"""Conversations as ids and roles on the disk, encoded once and read by memory map ever after.

Invariant: a store appears whole, under its final name, or not at all. It depends on the files, the
tokenizer and its template alone; how conversations are trained on is decided when it is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_lib.data.build import publish, sync_folder
from llama_lib.data.chat.counts import Bad, Counts, Seen
from llama_lib.data.chat.encode import CONVERSATION, Encoding, encode_files, record_name
from llama_lib.data.chat.records import no_examples_in
from llama_lib.data.chat.templates import ChatTemplate
from llama_lib.data.indexed import IndexedReader, IndexedWriter, token_dtype
from llama_lib.data.once import Turn, failure_reported, once, raise_failure
from llama_lib.data.prepare import file_key, make_folder
from llama_lib.data.prepared import MANIFEST, is_prepared
from llama_lib.data.progress import Progress
from llama_lib.data.sources import Source
from llama_lib.data.tokenizer import load_tokenizer, vocabulary_size
from llama_lib.data.work_folder import alone_at, work_folder
from llama_lib.errors import RunError

FORMAT = "llama_lib conversations"
# Another number whenever the same files would give other ids, roles or counts.
VERSION = 2


@dataclass
class FileFacts:
    """What one file gave."""

    path: Path
    conversations: int = 0
    counts: Counts = field(default_factory=Counts)

    def place(self, number: int) -> str:
        """What a user finds a record by, from its line, or its row in a table."""
        return f"{self.path} {record_name(self.path, number)}"

    def to_dict(self) -> dict[str, Any]:
        return {"conversations": self.conversations, "counts": asdict(self.counts)}

    @classmethod
    def from_dict(cls, path: Path, facts: dict[str, Any]) -> FileFacts:
        counts = dict(facts["counts"])
        bad = {reason: Bad(**each) for reason, each in counts.pop("bad").items()}
        last_bad = tuple(counts.pop("last_bad"))
        seen = {name: Seen(**each) for name, each in counts.items()}
        return cls(path, facts["conversations"], Counts(bad, last_bad, **seen))


@dataclass(frozen=True, eq=False)
class StoredSource:
    """The conversations of one source: ids and roles of each, and `about` all of them.

    `digest` is a hash of all ids and roles. `about` is of the type encode.CONVERSATION.
    """

    ids: IndexedReader
    roles: IndexedReader
    about: npt.NDArray[Any]
    files: list[FileFacts]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def locate(self, conversation: int) -> tuple[FileFacts, int]:
        """The file of a conversation, and its line or row there, from 1."""
        before = conversation
        for file in self.files:
            if before < file.conversations:
                return file, int(self.about["number"][conversation])
            before -= file.conversations
        raise IndexError(f"conversation {conversation} of {len(self)}")


@dataclass(frozen=True, eq=False)
class Store:
    """The conversations of all sources, by the name of the source."""

    sources: dict[str, StoredSource]

    @classmethod
    def open(cls, path: Path, sources: Sequence[Source]) -> Store:
        """Open the store of these sources.

        Raises:
            RunError: a file of it is missing or damaged.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            facts = manifest["sources"]
            if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is a {manifest['format']} of version {manifest['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path / MANIFEST, str(error)) from error
        return cls({each.name: _open_source(path, each, facts[each.name]) for each in sources})


def stored(
    sources: Sequence[Source],
    tokenizer: str,
    cache_dir: str | Path,
    workers: int = 0,
    skip_bad_lines: bool = False,
) -> Store:
    """The store of these sources in `<cache_dir>/conversations`, encoded first if need be.

    May be called by all processes of a node at once: one encodes, the others wait.

    Args:
        tokenizer: a folder, with its chat template.
        workers: processes that encode; 0 for one per core.

    Raises:
        UserError: a bad record, named by file and line, unless they are skipped.
    """
    cache_dir = Path(cache_dir).expanduser()
    make_folder(cache_dir, "--cache_dir")
    loaded = load_tokenizer(tokenizer, cache_dir)
    facts = {
        "version": VERSION,
        "template": ChatTemplate(loaded).identity,
        "sources": [[s.name, [file_key(path) for path in s.files]] for s in sources],
        "skip_bad_lines": skip_bad_lines,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = cache_dir / "conversations" / key[:32]
    make_folder(folder.parent, "--cache_dir")
    encoding = Encoding(tokenizer, str(cache_dir), skip_bad_lines)
    dtype = token_dtype(vocabulary_size(loaded))
    with once(cache_dir, str(folder), "the conversations to be encoded") as turn:
        raise_failure(turn)
        if not is_prepared(folder):
            # Those on another host with the same cache take turns by a lock of their own.
            with failure_reported(turn), alone_at(folder):
                if not is_prepared(folder):
                    _build(sources, encoding, dtype, folder, workers, turn)
    return Store.open(folder, sources)


def _build(
    sources: Sequence[Source],
    encoding: Encoding,
    dtype: np.dtype,
    folder: Path,
    workers: int,
    turn: Turn,
) -> None:
    work = work_folder(folder, folder.name)
    # Of an attempt that was killed.
    shutil.rmtree(work, ignore_errors=True)
    try:
        for part in ("ids", "roles", "about"):
            (work / part).mkdir(parents=True)
        _write(sources, encoding, dtype, work, workers, turn)
        publish(work, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk of {work} is full: free space, or choose another --cache_dir"
        else:
            reason = f"{error}. Mend it and start again"
        raise RunError(f"the conversations cannot be kept: {reason}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(
    sources: Sequence[Source],
    encoding: Encoding,
    dtype: np.dtype,
    work: Path,
    workers: int,
    turn: Turn,
) -> None:
    files = [path for source in sources for path in source.files]
    facts = [FileFacts(path) for path in files]
    sizes = [path.stat().st_size for path in files]
    progress = Progress("encoding", sum(sizes), lambda percent: turn.report(percent=percent))
    batches = encode_files(files, encoding, workers or len(os.sched_getaffinity(0)))
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "sources": {}}
    number = 0
    for source in sources:
        first = number
        with (
            IndexedWriter(work / "ids" / source.name, dtype) as ids,
            IndexedWriter(work / "roles" / source.name, np.uint8) as roles,
            _about_path(work, source.name).open("wb") as about,
        ):
            while number < first + len(source.files):
                batch, file = next(batches), facts[number]
                ids.write(batch.ids, batch.lengths)
                roles.write(batch.roles, batch.lengths)
                about.write(batch.about.tobytes())
                file.conversations += len(batch.lengths)
                file.counts.add(batch.counts)
                progress.show(number, sizes[number] if batch.is_last else batch.position)
                if batch.is_last:
                    if not file.conversations:
                        last, message = file.counts.last_bad
                        last_bad = f"{record_name(file.path, last)}: {message}"
                        raise no_examples_in(file.path, file.counts.num_bad, last_bad)
                    number += 1
            about.flush()
            os.fsync(about.fileno())
        manifest["sources"][source.name] = {
            "conversations": ids.documents,
            "tokens": ids.tokens,
            "digest": hashlib.sha256(f"{ids.sha256()}{roles.sha256()}".encode()).hexdigest(),
            "files": [file.to_dict() for file in facts[first:number]],
        }
    progress.close()
    with (work / MANIFEST).open("w") as written:
        json.dump(manifest, written, indent=2)
        written.flush()
        os.fsync(written.fileno())
    for part in (work / "ids", work / "roles", work / "about", work):
        sync_folder(part)


def _about_path(folder: Path, name: str) -> Path:
    return folder / "about" / f"{name}.bin"


def _open_source(path: Path, source: Source, facts: dict[str, Any]) -> StoredSource:
    name = source.name
    ids, roles = IndexedReader(path / "ids" / name), IndexedReader(path / "roles" / name)
    about_path = _about_path(path, name)
    size = about_path.stat().st_size if about_path.is_file() else 0
    expected = (facts["conversations"], facts["tokens"])
    if not (len(ids), ids.num_tokens) == (len(roles), roles.num_tokens) == expected:
        raise _damaged(path / "ids" / f"{name}.bin", "its length is wrong")
    if size != len(ids) * CONVERSATION.itemsize:
        raise _damaged(about_path, f"{size} bytes for {len(ids)} conversations")
    about = np.asarray(np.memmap(about_path, CONVERSATION, mode="r"))
    files = list(map(FileFacts.from_dict, source.files, facts["files"]))
    return StoredSource(ids, roles, about, files, facts["digest"])


def _damaged(path: Path, reason: str) -> RunError:
    folder = path.parent if path.name == MANIFEST else path.parent.parent
    return RunError(f"{path} is damaged ({reason}): delete {folder} and start again.")

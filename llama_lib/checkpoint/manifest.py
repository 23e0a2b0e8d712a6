"""What makes a checkpoint complete: complete.json, written last, with size and hash of every file.

Invariant: a directory without a valid `complete.json` is never offered for loading. Imports neither
torch nor ColossalAI, so it works on any machine.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_lib.errors import RunError, UserError
from llama_lib.progress import made

MANIFEST = "complete.json"
FORMAT_VERSION = 1
STEP_PATTERN = re.compile(r"step-(\d{8})")

# Hashing is bound by memory and disk, not by the interpreter: more threads gain nothing.
HASH_THREADS = 8


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """Contents of complete.json; `files` is keyed by the path inside the checkpoint."""

    step: int
    plugin: str
    layout: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        write_json(directory / MANIFEST, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises RunError when the file is missing, not JSON, or of another format."""
        path = directory / MANIFEST
        try:
            raw = json.loads(path.read_text())
            if raw["version"] != FORMAT_VERSION:
                raise RunError(
                    f"{path}: format {raw['version']}, this program reads {FORMAT_VERSION}."
                )
            files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
            return cls(files=files, **raw)
        except FileNotFoundError:
            raise RunError(f"{directory}: no {MANIFEST}, the save did not finish.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: not a valid manifest ({error}).") from None


def step_directory(save_dir: str | Path, step: int) -> Path:
    return Path(save_dir) / f"step-{step:08d}"


def step_directories(save_dir: str | Path) -> list[Path]:
    """Checkpoint directories under `save_dir`, newest first; unfinished `.tmp` ones left out."""
    root = Path(save_dir)
    if not root.is_dir():
        return []
    return sorted(
        (d for d in root.iterdir() if d.is_dir() and STEP_PATTERN.fullmatch(d.name)), reverse=True
    )


def whole_checkpoints(save_dir: str | Path) -> list[Path]:
    """Those whose save has finished, newest first; what is in them is not looked at."""
    return [d for d in step_directories(save_dir) if (d / MANIFEST).is_file()]


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    made()
    return FileRecord(path.stat().st_size, digest)


def size_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or have another size; costs no reading."""
    problems = []
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != record.size:
            problems.append(f"{name}: {path.stat().st_size} bytes, expected {record.size}")
    return problems


def hash_problems(directory: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Files among `names` whose contents are not what was written."""

    def check(name: str) -> str | None:
        try:
            same = file_record(directory / name).sha256 == manifest.files[name].sha256
        except OSError as error:
            return f"{name}: cannot be read ({error})"
        return None if same else f"{name}: contents changed (SHA-256 differs)"

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return [problem for problem in pool.map(check, names) if problem]


def looks_like_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / MANIFEST).is_file()


def check_load_argument(load: str, save_dir: str) -> None:
    """Refuse what cannot be resumed from, before a process group or a model exists.

    Raises:
        UserError: the path is missing, is a Hugging Face folder, or never finished saving.
    """
    if load == "auto":
        return
    path = Path(load)
    if not path.exists():
        found = ", ".join(d.name for d in step_directories(save_dir)[:5]) or "none"
        raise UserError(
            f"--load {load}: no such directory; checkpoints in --save_dir {save_dir}: {found}. "
            "--load auto takes the newest good one."
        )
    if looks_like_hugging_face(path):
        raise UserError(
            f"--load {load} is a Hugging Face model folder: it has weights but no optimizer, step "
            f"or data position. To start training from it use --model_path {load}; to resume give "
            "a step-XXXXXXXX directory."
        )
    if step_directories(path):
        raise UserError(
            f"--load {load} holds checkpoints; name one of them "
            f"({step_directories(path)[0].name} is the newest), or use --save_dir {load} "
            "--load auto."
        )


def refuse_occupied(save_dir: str, load: str | None) -> None:
    """A directory with checkpoints is written to only by a run that continues one of them."""
    own = load is not None and Path(load).resolve().parent == Path(save_dir).resolve()
    if load == "auto" or own:
        return
    existing = step_directories(save_dir)
    if existing:
        raise UserError(
            f"--save_dir {save_dir} already holds {len(existing)} checkpoint(s), the newest "
            f"{existing[0].name}. Resume with --load auto, or choose another --save_dir."
        )


def free_space_problem(directory: Path, needed: int) -> str | None:
    """Message if the file system of `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free >= needed:
        return None
    return (
        f"{directory}: {free / 2**30:.2f} GiB free, a checkpoint needs about "
        f"{needed / 2**30:.2f} GiB; delete what is no longer needed."
    )


def write_json(path: Path, value: Any) -> None:
    """Write and sync, so the file is whole once the next step (a rename) is visible."""
    with path.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished directory into place and point `latest` at it."""
    if final.exists():
        raise FileExistsError(f"{final} is there already")
    sync_directory(temporary)
    temporary.rename(final)
    point_latest(final)


def point_latest(final: Path) -> None:
    """Make the text file `latest` name a checkpoint directory."""
    _point(final, "latest")


def point_best(save_dir: Path, best: Path | None) -> None:
    """Make the text file `best` name a checkpoint directory; without one there is no such file."""
    if best is not None and best.is_dir():
        _point(best, "best")
    else:
        (save_dir / "best").unlink(missing_ok=True)


def _point(target: Path, name: str) -> None:
    pointer = target.parent / f"{name}.tmp"
    with pointer.open("w") as stream:
        stream.write(target.name + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    pointer.rename(target.parent / name)
    sync_directory(target.parent)


def set_aside_newer(save_dir: str | Path, step: int) -> list[str]:
    """Rename checkpoints after `step`, which a run resumed at `step` is about to write anew.

    They are damaged, or of a course that is being left; under their own names they would be taken
    for the newest by --load auto and --keep_last.

    Returns:
        One line for each.
    """
    lines = []
    for directory in step_directories(save_dir):
        if int(directory.name.removeprefix("step-")) <= step:
            continue
        number = 1
        while (aside := directory.with_name(f"{directory.name}.aside-{number}")).exists():
            number += 1
        directory.rename(aside)
        lines.append(f"{directory.name} is newer than the checkpoint loaded: renamed {aside.name}")
    return lines


def remove_old(save_dir: Path, keep_last: int | None, best: Path | None = None) -> None:
    """Delete all but `best` and the newest `keep_last` complete checkpoints.

    Broken ones are left alone.
    """
    if keep_last is None:
        return
    for directory in whole_checkpoints(save_dir)[keep_last:]:
        if directory == best:
            continue
        # The manifest goes first: a half-deleted directory must not look complete.
        (directory / MANIFEST).unlink()
        shutil.rmtree(directory)

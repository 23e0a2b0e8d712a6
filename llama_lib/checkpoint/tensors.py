"""Named tensors in safetensors shards with one index.

Invariant: a failed write is remembered, never raised in the middle, so that every rank goes on
taking part in the collectives that gather the next shard.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llama_lib.checkpoint.manifest import FileRecord, file_record, sync_file, write_json
from llama_lib.errors import UserError
from llama_lib.private import allow_readers
from llama_lib.progress import made

# Readers map whole files; a GiB is large enough for bandwidth and small enough for host memory.
SHARD_BYTES = 2**30

# The tensors with a row for every id of the vocabulary, as Llama and Mistral name them.
VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")

# As safetensors names them; quantised weights mean nothing without their scales.
WEIGHT_DTYPES = ("F32", "BF16", "F16")

COMPARED_ELEMENTS = 2**20


class MissingWeights(FileNotFoundError):
    """A folder without safetensors."""


class ShardWriter:
    """Collects named tensors and writes a shard whenever `shard_bytes` have come together.

    Args:
        shard_bytes: None: everything goes into one file, named `prefix` alone.

    Attributes:
        weight_map: tensor name -> file name, for the index.
        files: path relative to `root` -> record, filled as files are written.
        error: the first failure, after which nothing more is written.
    """

    def __init__(
        self, root: Path, folder: str, prefix: str, shard_bytes: int | None = SHARD_BYTES
    ) -> None:
        self.root, self.folder, self.prefix, self.shard_bytes = root, folder, prefix, shard_bytes
        self.weight_map: dict[str, str] = {}
        self.files: dict[str, FileRecord] = {}
        self.error: str | None = None
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        full = self.shard_bytes and self._pending_bytes + tensor.nbytes > self.shard_bytes
        if self._pending and full:
            self.flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        made()

    def flush(self) -> None:
        """Write, sync and hash what has been collected."""
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        if not pending or self.error:
            return
        number = "" if self.shard_bytes is None else f"-{len(self.files):05d}"
        name = f"{self.prefix}{number}.safetensors"
        path = self.root / self.folder / name
        try:
            # transformers refuses safetensors files without this mark.
            save_file(pending, path, metadata={"format": "pt"})
            allow_readers(path)
            sync_file(path)
            self.files[f"{self.folder}/{name}"] = file_record(path)
            self.weight_map |= dict.fromkeys(pending, name)
        except Exception as error:  # safetensors raises its own class for a full disk
            self.error = f"{path}: {error}"


def write_index(path: Path, weight_map: Mapping[str, str], **extra: Any) -> None:
    """An index in the layout transformers reads (`weight_map`), with `extra` keys beside it."""
    write_json(path, {"metadata": {}, "weight_map": dict(sorted(weight_map.items())), **extra})


class TensorReader:
    """Reads named tensors from an indexed or single-file safetensors folder; files are mapped.

    Raises:
        MissingWeights: neither the index nor the `single` file is in the folder.
    """

    def __init__(
        self,
        folder: Path,
        index_name: str = "model.safetensors.index.json",
        single: str = "model.safetensors",
    ) -> None:
        self.folder = folder
        index = folder / index_name
        self.index: dict[str, Any] = json.loads(index.read_text()) if index.is_file() else {}
        self._open: dict[str, Any] = {}
        if self.index:
            self.weight_map: dict[str, str] = self.index["weight_map"]
        elif (folder / single).is_file():
            with safe_open(folder / single, framework="pt") as file:
                self.weight_map = dict.fromkeys(file.keys(), single)
        else:
            raise MissingWeights(f"no {index_name} and no {single} in {folder}")

    def _file(self, name: str) -> Any:
        file_name = self.weight_map[name]
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.folder / file_name, framework="pt")
        return self._open[file_name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """How the values are stored, in the words of safetensors: F32, BF16, ..."""
        return str(self._file(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """The whole tensor; it stays in the mapped file, where writing to it is an error."""
        return self._file(name).get_tensor(name)


def shape_problems(
    reader: TensorReader,
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    growing: Iterable[str] = (),
) -> list[str]:
    """Every difference between the tensors of a folder and those a model expects (headers only).

    Args:
        growing: tensors that may have fewer rows than the model's.
    """
    problems = []
    growing = set(growing)
    missing = sorted(set(expected) - set(reader.weight_map))
    surplus = sorted(set(reader.weight_map) - set(expected) - set(ignored))
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors missing, first {missing[0]}")
    if surplus:
        problems.append(f"{len(surplus)} unknown tensor(s), first {surplus[0]}")
    for name in sorted(set(expected) & set(reader.weight_map)):
        found, wanted = reader.shape(name), tuple(expected[name])
        grows = name in growing and len(found) == len(wanted) and found[0] <= wanted[0]
        if found != wanted and not (grows and found[1:] == wanted[1:]):
            problems.append(f"{name}: shape {list(found)}, the model has {list(wanted)}")
        if (kind := reader.dtype(name)) not in WEIGHT_DTYPES:
            problems.append(f"{name}: stored as {kind}, expected one of {', '.join(WEIGHT_DTYPES)}")
    return problems


def open_weights(
    folder: Path, expected: Mapping[str, tuple[int, ...]], flag: str, grows: bool = False
) -> TensorReader:
    """The weights of a Hugging Face folder, every name and shape compared with the model's.

    Args:
        flag: the option that named the folder, for messages.
        grows: whether the tables by vocabulary may have fewer rows than the model's.

    Raises:
        UserError: no safetensors there, a file is damaged, or names or shapes differ.
    """
    # With tied embeddings the head is no parameter of its own, but files may hold it.
    tied = {"lm_head.weight"} - set(expected)
    try:
        reader = TensorReader(folder)
        growing = VOCABULARY_TABLES if grows else ()
        problems = shape_problems(reader, expected, ignored=tied, growing=growing)
    except MissingWeights as error:
        raise UserError(
            f"{flag} {folder}: {error}. Weights are read from safetensors only (pickled .bin files "
            "can run code); convert them with transformers' save_pretrained."
        ) from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{flag} {folder} is damaged or not complete ({type(error).__name__}: {error}); fetch "
            "or save it again."
        ) from None
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedy = (
            "Give the model the run started with."
            if flag == "--load"
            else f"The model is the one of config.json there: give {flag} a folder whose weights "
            "belong to its config.json."
        )
        raise UserError(
            f"{flag} {folder} does not fit the model: {'; '.join(problems[:3])}{more}. {remedy}"
        )
    return reader


def same_values(loaded: Tensor, stored: Tensor) -> bool:
    """Whether a loaded tensor is the stored one, cast to its precision; compared by blocks, so that
    no copy of a whole tensor is made."""
    pairs = zip(
        loaded.detach().flatten().split(COMPARED_ELEMENTS),
        stored.flatten().split(COMPARED_ELEMENTS),
        strict=True,
    )
    return all(torch.equal(one.cpu(), other.to(one.dtype)) for one, other in pairs)

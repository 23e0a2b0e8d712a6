"""Files of a dataset on the Hugging Face hub, without ever running a loading script.

Invariant: what cannot be had ends in one message that says what was tried and what to do instead.
The clients' own settings (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) hold throughout.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llama_lib.data.readers import FORMATS, file_format
from llama_lib.errors import UserError
from llama_lib.progress import transferring

_REACHABLE_SECONDS = 10.0
PARQUET_BRANCH = "refs/convert/parquet"

# organisation/name or an old single name, with the configuration after a colon.
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")

T = TypeVar("T")
Found = list[tuple[tuple[str, ...], Path]]


@dataclass(frozen=True)
class _DataFiles:
    """Plain data files beside a loading script that no current `datasets` runs."""

    files: tuple[str, ...]


@dataclass(frozen=True)
class _Parquet:
    """The hub's own conversion of a script dataset, under its default configuration."""

    config: str


# Datasets the seed names. Their repositories carry loading scripts, so they are read by file.
_REGISTRY: dict[str, _DataFiles | _Parquet] = {
    "togethercomputer/RedPajama-Data-1T-Sample": _DataFiles(
        (
            "arxiv_sample.jsonl",
            "book_sample.jsonl",
            "c4_sample.jsonl",
            "cc_2019-30_sample.jsonl",
            "cc_2020-05_sample.jsonl",
            "cc_2021-04_sample.jsonl",
            "cc_2022-05_sample.jsonl",
            "cc_2023-06_sample.jsonl",
            "github_sample.jsonl",
            "stackexchange_sample.jsonl",
            "wikipedia_sample.jsonl",
        )
    ),
    "yizhongw/self_instruct": _Parquet("super_natural_instructions"),
}


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset on the hub, which may not be here yet."""

    parts: tuple[str, ...]  # what its source may be called
    name: str  # within the repository
    repository: str
    revision: str  # a commit, so that a file cannot change between listing and download
    size: int  # bytes

    def download(self) -> Path:
        """The file in the hub's local cache, fetched if it is not there yet."""
        with _told(self.repository):
            return _download(self.repository, self.name, self.revision)


class _Unreachable(Exception):
    """The hub does not answer, and its files are not in the local cache."""


class _Missing(Exception):
    """The hub answers that there is no such thing."""


def is_hub_name(dataset: str) -> bool:
    return _NAME.match(dataset) is not None


def hub_files(dataset: str, conversations: bool = False) -> Found:
    """Download `organisation/name[:configuration]`: (name parts of a source, local file) each.

    Tried in turn: the registry above, `datasets.load_dataset`, the data files as they are, the
    hub's parquet branch.
    """
    name, _, config = dataset.partition(":")
    entry = _REGISTRY.get(name)
    with _told(dataset, mend=_by_hand(name, config) if conversations else None):
        if isinstance(entry, _DataFiles):
            return _data_files(name, entry)
        if isinstance(entry, _Parquet):
            return _downloaded(_parquet_branch(name, config or entry.config))
        try:
            return _load_dataset(name, config)
        except _Missing as error:
            tried = f"Tried datasets.load_dataset: {error}. "
        return _downloaded(_any_listing(name, config, tried))


def hub_listing(dataset: str) -> list[HubFile]:
    """The files of `organisation/name[:configuration]` in order, without downloading them.

    The same names give the same sources as `hub_files`, but only files that we read as they are:
    nothing goes through the datasets library. Needs the hub to answer.
    """
    name, _, config = dataset.partition(":")
    entry = _REGISTRY.get(name)
    with _told(dataset, "its files cannot be listed"):
        if isinstance(entry, _DataFiles):
            return _listed_data_files(name, entry)
        if isinstance(entry, _Parquet):
            return _parquet_branch(name, config or entry.config)
        return _any_listing(name, config)


@contextmanager
def _told(
    dataset: str, why: str = "it is not in the local cache", mend: str | None = None
) -> Iterator[None]:
    """What cannot be had, as the one message of a UserError.

    `mend` makes a folder DIR on a machine with network.
    """
    mend = mend or f"python -m llama_lib prepare -d {dataset} --output DIR --tokenizer T"
    try:
        yield
    except _Unreachable as error:
        raise UserError(
            f"the hub cannot be reached for {dataset!r} and {why} ({error}); no "
            f"file or folder has that name either. On a machine with network run: {mend}, copy "
            "DIR, then -d DIR."
        ) from error
    except _Missing as error:
        raise UserError(f"{dataset!r} cannot be had from the hub: {error}.") from error


def _by_hand(name: str, config: str) -> str:
    """The command that downloads what no prepared dataset can hold: conversations."""
    entry = _REGISTRY.get(name)
    what = ""
    if isinstance(entry, _Parquet):
        what = f" --revision {PARQUET_BRANCH} --include '{config or entry.config}/train/*'"
    return f"hf download {name} --repo-type dataset{what} --local-dir DIR"


def _downloaded(listing: list[HubFile]) -> Found:
    return [(file.parts, _download(file.repository, file.name, file.revision)) for file in listing]


def _data_files(name: str, entry: _DataFiles) -> Found:
    found: Found = []
    local_only = not _is_reachable()
    for file in entry.files:
        try:
            path = _download(name, file, "main", local_only)
        except (_Missing, _Unreachable) as error:
            if isinstance(error, _Unreachable) and not _known_to_be_missing(name, file):
                raise
            print(f"{name}: {file} is missing on the hub, left out", file=sys.stderr, flush=True)
            last = error
            continue
        found.append(((*name.split("/"), Path(file).stem), path))
    if not found:
        raise _Missing(f"none of its {len(entry.files)} files is there ({last})")
    return found


def _listed_data_files(name: str, entry: _DataFiles) -> list[HubFile]:
    commit, sizes = _guarded(_list_files, name, "main")
    for file in entry.files:
        if file not in sizes:
            print(f"{name}: {file} is missing on the hub, left out", file=sys.stderr, flush=True)
    listing = [
        HubFile((*name.split("/"), Path(file).stem), file, name, commit, sizes[file])
        for file in entry.files
        if file in sizes
    ]
    if not listing:
        raise _Missing(f"none of its {len(entry.files)} files is there")
    return listing


def _parquet_branch(name: str, config: str) -> list[HubFile]:
    commit, sizes = _guarded(_list_files, name, PARQUET_BRANCH)
    files = sorted(sizes)
    configs = sorted({file.split("/")[0] for file in files if file.endswith(".parquet")})
    if not config and len(configs) == 1:
        config = configs[0]
    if not config and "default" in configs:
        config = "default"
    if config not in configs:
        known = ", ".join(configs) or "none"
        raise _Missing(
            f"its parquet branch has the configurations: {known}; choose one, as in "
            f"-d {name}:{configs[0] if configs else 'CONFIGURATION'}"
        )
    # The hub converts very large sets in part only, and says so in the folder's name.
    wanted = [
        file
        for split in ("train", "partial-train")
        for file in files
        if file.startswith(f"{config}/{split}/") and file.endswith(".parquet")
    ]
    if not wanted:
        splits = ", ".join(sorted({file.split("/")[1] for file in files if file.count("/") > 1}))
        raise _Missing(f"its parquet branch has no `train` split; found {splits}")
    parts = tuple(name.split("/"))
    return [HubFile(parts, file, name, commit, sizes[file]) for file in wanted]


def _any_listing(name: str, config: str, tried: str = "") -> list[HubFile]:
    """The data files of a repository if we read them, else those of its parquet branch."""
    try:
        return _plain_files(name, config)
    except _Missing as error:
        tried += f"Tried its data files: {error}. "
    try:
        return _parquet_branch(name, config)
    except _Missing as error:
        raise UserError(
            f"{name!r} is no file or folder and cannot be had from the hub. {tried}Tried "
            f"the branch {PARQUET_BRANCH}: {error}. Check the name, or convert the data once to "
            "jsonl or parquet (with a `text` column; to fine-tune, also with conversations) and "
            "pass the files: -d path/to/*.jsonl."
        ) from error


def _plain_files(name: str, config: str) -> list[HubFile]:
    """The files of the train split as the datasets library finds them, in its order."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except Exception as error:
        # As below: the class says little about the cause.
        raise _cause(error, name) from error
    splits = dict(builder.config.data_files or {})
    if "train" not in splits:
        raise _Missing(f"there is no `train` split; found {', '.join(map(str, splits)) or 'none'}")
    revision = {url.partition("@")[2].partition("/")[0] for url in splits["train"]}
    files = [url.partition("@")[2].partition("/")[2] for url in splits["train"]]
    unread = [file for file in files if file_format(Path(file)) is None]
    if unread or len(revision) != 1:
        raise _Missing(f"{(unread or files)[0]} is none of {FORMATS}")
    commit, sizes = _guarded(_list_files, name, revision.pop())
    if absent := [file for file in files if file not in sizes]:
        raise _Missing(f"{absent[0]} is not among its files")
    parts = tuple(name.split("/"))
    return [HubFile(parts, file, name, commit, sizes[file]) for file in files]


def _load_dataset(name: str, config: str) -> Found:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:
        # The library raises whatever its readers raise, so the class says little about the cause.
        raise _cause(error, name) from error
    return [(tuple(name.split("/")), Path(file["filename"])) for file in loaded.cache_files]


def _list_files(name: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit that a revision is, and the size of every file in it."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    commit = HfApi().dataset_info(name, revision=revision).sha or revision
    tree = HfApi().list_repo_tree(name, repo_type="dataset", revision=commit, recursive=True)
    return commit, {file.path: file.size for file in tree if isinstance(file, RepoFile)}


def _is_reachable() -> bool:
    """One question with a short wait: the client asks six times, 23 s in all, for every file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session
    from requests.exceptions import RequestException

    try:
        get_session().head(constants.ENDPOINT, timeout=_REACHABLE_SECONDS)
    except (RequestException, OSError):
        return False
    return True


def _download(name: str, file: str, revision: str, local_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download

    def call(name: str, file: str) -> str:
        return hf_hub_download(
            name, file, repo_type="dataset", revision=revision, local_files_only=local_only
        )

    with transferring():
        return Path(_guarded(call, name, file))


def _known_to_be_missing(name: str, file: str) -> bool:
    """Whether the hub said so when it was last reached."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(name, file, repo_type="dataset") is _CACHED_NO_EXIST


def _guarded(call: Callable[[str, str], T], name: str, argument: str) -> T:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from requests.exceptions import RequestException

    try:
        return call(name, argument)
    except (HfHubHTTPError, HFValidationError, RequestException, OSError) as error:
        raise _cause(error, name) from error


def _cause(error: Exception, name: str) -> Exception:
    """Our view of a client's error: gated (UserError), not there, or not reachable."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from requests.exceptions import ConnectionError as NoConnection
    from requests.exceptions import Timeout

    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated" in reason:
        return UserError(
            f"{name!r} is gated: accept its licence at https://huggingface.co/datasets/{name}, "
            "log in with `hf auth login` or set HF_TOKEN, and start again."
        )
    answers = [
        e.response.status_code
        for e in chain
        if isinstance(e, HfHubHTTPError) and e.response is not None
    ]
    if answers and answers[0] < 500:
        return _Missing(f"the hub answers {answers[0]} ({reason})")
    lost = (NoConnection, Timeout, ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError)
    if answers or any(isinstance(e, lost) for e in chain):
        return _Unreachable(reason)
    return _Missing(reason)

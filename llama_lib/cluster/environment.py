"""Which variables of this shell the other hosts are given, and which they are not.

Invariant: what may hold a secret, or means this host only, is passed on only if it was named.
Values travel as data on the standard input of a program, never on a command line, and are never
printed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_lib.errors import UserError
from llama_lib.private import SECRET_NAME, masked

# What the libraries of a run are steered by. HOME, USER and the like are each host's own.
_PASSED_ON = re.compile(
    r"PATH|LANG|LC_ALL|TMPDIR|CC|CXX|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH|PYTHONPATH"
    r"|XDG_CACHE_HOME|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY"
    r"|(CUDA|CUBLAS|CUBLASLT|CUDNN|NVIDIA|NCCL|GLOO|FI|UCX|OFI|IBV|HF|OMP|MKL|KMP|TORCH"
    r"|TORCHINDUCTOR|PYTORCH|TRITON)_[A-Z0-9_]+"
)
# Others that a run may miss on the hosts: they are named where they are set.
_KNOWN = re.compile(
    r"LD_PRELOAD|PYTHONHASHSEED|PYTHONNOUSERSITE|ALL_PROXY|all_proxy"
    r"|(HUGGING_FACE|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|WANDB|OPENBLAS|GOMP|MLX5|PSM2|PSM3|SHARP"
    r"|OMPI|MPICH)_[A-Z0-9_]+"
)
# Numbers of this host's devices say nothing about another's; with one NCCL_HOSTID for all, NCCL
# takes all for one host.
_OF_THIS_HOST = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "CUDA_MPS_PIPE_DIRECTORY",
    "NCCL_HOSTID",
)
# What a launcher says to its own processes; ours says it anew.
OF_A_LAUNCHER = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_[A-Z_]+"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_[A-Z_]+"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Passed:
    """The variables that other hosts get, and the names of known ones that they do not."""

    variables: dict[str, str]
    held: list[str]


def passed_on(environ: Mapping[str, str], extra: Sequence[str] = ()) -> Passed:
    """Divide the variables of this shell; those named in `extra` are passed on whatever they are.

    Raises:
        UserError: `extra` names what is no variable, or not set.
    """
    problems = []
    for name in extra:
        if not _NAME.fullmatch(name):
            problems.append(
                f"--pass: got {name!r}, expected names of variables, separated by commas; a "
                "variable's value is taken from this shell."
            )
        elif OF_A_LAUNCHER.fullmatch(name):
            problems.append(f"--pass: {name} is what this launcher sets; leave it out.")
        elif name not in environ:
            problems.append(f"--pass: {name} is not set here; export it, or leave it out.")
    if problems:
        raise UserError(problems)
    variables, held = {}, []
    for name, value in sorted(environ.items()):
        wanted = _PASSED_ON.fullmatch(name) is not None
        if name in extra:
            variables[name] = value
        elif OF_A_LAUNCHER.fullmatch(name):
            continue
        elif name in _OF_THIS_HOST or _is_secret(name, value):
            if wanted or _KNOWN.fullmatch(name):
                held.append(name)
        elif wanted:
            variables[name] = value
        elif _KNOWN.fullmatch(name):
            held.append(name)
    return Passed(variables, held)


def _is_secret(name: str, value: str) -> bool:
    # A proxy's address may hold a password. PATH and the like may hold any text.
    return SECRET_NAME.search(name) is not None or ("://" in value and masked(value) != value)


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what an outer launcher said to this process."""
    return {name: value for name, value in environ.items() if not OF_A_LAUNCHER.fullmatch(name)}


def names_of(text: str | None) -> list[str]:
    """The names in the value of --pass."""
    return [name for name in (text or "").split(",") if name]

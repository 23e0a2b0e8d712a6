"""ColossalAI as this project needs it: importable without packages it never uses, quiet, with
torch's optimizer kernels, and able to train on a machine without an accelerator.

Invariant: `install` comes before every other import of colossalai, and with a GPU present it
changes nothing but the optimizer kernels. Importing this package imports neither torch nor
colossalai.
"""

import importlib
import importlib.util
import logging
import os
import re
import warnings

from llama_lib.errors import UserError
from llama_lib.host import absent

_active: list[str] | None = None

# What ColossalAI warns about at import, said once by optional_packages().
_OPTIONAL = {"apex": "fused RMSNorm", "tensornvme": "asynchronous checkpoint writing"}

# What torch 2.13 and Python 3.12 find outdated in ColossalAI 0.5.0: nothing a user could act on.
_OUTDATED = (
    "invalid escape sequence",
    "TypedStorage is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`broadcast_buffers` is deprecated",
    "`isinstance(treespec, LeafSpec)` is deprecated",
)


def install() -> list[str]:
    """Make colossalai ready for this machine; returns the names of what it put in place.

    Calling it again changes nothing. UserError if colossalai is missing or is not the tested one.
    """
    global _active
    if _active is None:
        if importlib.util.find_spec("colossalai") is None:
            raise UserError(
                "colossalai is not installed; got no such package, expected colossalai 0.5.0. "
                "Run `make install`."
            )
        try:
            _active = _install()
        except ModuleNotFoundError as error:
            raise UserError(
                f"colossalai cannot be imported; got no module named {error.name}, which it needs. "
                "Run `make install`."
            ) from error
    return list(_active)


def optional_packages() -> str:
    """One line on what ColossalAI would use if it were installed; empty if nothing is missing."""
    missing = [
        f"{package} ({use})"
        for package, use in _OPTIONAL.items()
        if importlib.util.find_spec(package) is None
    ]
    return f"optional packages not installed: {', '.join(missing)}" if missing else ""


def _install() -> list[str]:
    _quiet_warnings()
    absent.import_optimizers()
    importlib.import_module("colossalai.booster.plugin")
    from colossalai.accelerator import get_accelerator, set_accelerator

    from llama_lib.host import kernels, patches
    from llama_lib.host.accelerator import HostAccelerator

    _quiet_logging()
    names = kernels.register()
    on_host = get_accelerator().name == "cpu"
    chosen = [patch for patch in patches.PATCHES if on_host or not patch.host_only]
    names += patches.apply(chosen)
    if on_host:
        set_accelerator(HostAccelerator())
        _share_memory_among_local_processes()
        names.append("host_accelerator")
    return names


def _share_memory_among_local_processes() -> None:
    # gemini_auto divides the machine's memory by this count, which is -1 until somebody sets it.
    from colossalai.legacy.core import global_context

    # Set by torchrun and `colossalai run`; a process started alone is the only one.
    global_context.num_processes_on_current_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _quiet_warnings() -> None:
    for package in _OPTIONAL:
        warnings.filterwarnings("ignore", message=rf"Please install .*{package}")
    for message in _OUTDATED:
        warnings.filterwarnings("ignore", message=re.escape(message))


def _quiet_logging() -> None:
    """ColossalAI's log: warnings and errors only, one plain line each, on stderr.

    As shipped it goes to stdout through rich, and every message is preceded by its caller's path.
    """
    from colossalai.logging import get_dist_logger

    get_dist_logger()
    logger = logging.getLogger("colossalai")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("colossalai: %(message)s"))
    handler.addFilter(lambda record: not re.fullmatch(r"\S+:\d+ \S+", record.getMessage()))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)

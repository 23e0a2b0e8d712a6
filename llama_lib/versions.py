"""Compares the installed packages with the set this project is tested with.

Invariant: versions are read from the packages' metadata; nothing is imported to learn them.
"""

import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from llama_lib.errors import UserError

INSTALL = (
    "run `make install`, or `pip install -r requirements.txt` and then "
    "`pip install --no-deps -r requirements-colossalai.txt`"
)


class _Tested(NamedTuple):
    expected: str
    accepts: Callable[[tuple[int, ...]], bool]


_PACKAGES = {
    "colossalai": _Tested("0.5.0", lambda found: found == (0, 5, 0)),
    "torch": _Tested("2.8 to 2.13", lambda found: (2, 8) <= found[:2] <= (2, 13)),
    "transformers": _Tested("4.51.3", lambda found: found == (4, 51, 3)),
    "datasets": _Tested("5.0.x", lambda found: found[:2] == (5, 0)),
}
_PYTHON = _Tested("3.11 or 3.12", lambda found: found[:2] in ((3, 11), (3, 12)))


def check_versions(allow_untested: bool) -> list[str]:
    """Raises UserError on a missing package or an untested version, all of them in one message.

    With `allow_untested` the untested ones are returned instead, for a line at the start.
    """
    missing, untested = judge(_installed(), platform.python_version())
    if platform.system() != "Linux":
        untested.append(f"system: got {platform.system()}, expected Linux")

    if missing or (untested and not allow_untested):
        advice = [f"{INSTALL}; or go on with --allow_untested_versions"] if untested else []
        raise UserError(missing + untested + advice)
    return untested


def judge(found: Mapping[str, str | None], python: str) -> tuple[list[str], list[str]]:
    """What is missing and what is untested among versions found here or on another host."""
    missing, untested = [], []
    for name, tested in _PACKAGES.items():
        release = found.get(name)
        if release is None:
            missing.append(f"{name} is not installed: {INSTALL}")
        elif not tested.accepts(_release(release)):
            untested.append(f"{name}: got {release}, expected {tested.expected}")
    if not _PYTHON.accepts(_release(python)):
        untested.append(f"Python: got {python}, expected {_PYTHON.expected}")
    return missing, untested


def _installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()

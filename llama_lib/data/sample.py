"""The embedded corpus `sample`: RedPajama-shaped text taken from the Python installation itself.

Invariant: the same Python release gives the same bytes on every machine; no text carries a path
of the machine.
"""

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llama_lib.data.once import beside

SOURCES = ("documentation", "library")

# Written by the build of one particular interpreter, by a distribution or by an administrator.
_GENERATED = ("_sysconfigdata", "__phello__", "sitecustomize", "usercustomize")


def sample_records(source: str) -> Iterator[dict[str, object]]:
    """Records {'text': str, 'meta': dict} of one source, in a fixed order.

    `documentation` holds the language reference behind `help()`, `library` the top-level modules
    of the standard library.
    """
    if source == "documentation":
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield {"text": topics[topic], "meta": {"topic": topic}}
    else:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            if path.stem.startswith(_GENERATED):
                continue
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text and not any(part in text for part in _machine_paths()):
                yield {"text": text, "meta": {"module": path.stem}}


def _machine_paths() -> list[str]:
    """Folders that exist on this machine only; a prefix such as /usr is everybody's."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path.home())}
    private = {prefix for prefix in prefixes if len(Path(prefix).parts) > 3}
    return sorted(private | {sysconfig.get_paths()["stdlib"]})


def write_sample(folder: Path) -> list[Path]:
    """Write each source as `<folder>/<source>.jsonl`, once; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for source in SOURCES:
        path = folder / f"{source}.jsonl"
        lines = "".join(json.dumps(record) + "\n" for record in sample_records(source))
        content = lines.encode("ascii")
        # Left alone when it is already right: its mtime is part of the key of what is prepared.
        if not path.is_file() or path.read_bytes() != content:
            with beside(path) as temporary:
                temporary.write_bytes(content)
                temporary.replace(path)
        paths.append(path)
    return paths

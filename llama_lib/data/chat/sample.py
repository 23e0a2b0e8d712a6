"""The embedded conversations `sample`: what functions of the standard library do, in their words.

Invariant: the same Python release gives the same bytes on every machine; nothing is imported or
run to make them.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llama_lib.data.once import beside
from llama_lib.errors import UserError

# Three functions of a module make one round of questions. Chosen: each docstring begins with a
# line that says all, in Python 3.11 and 3.12.
_FUNCTIONS = {
    "base64": ("b64encode", "b64decode", "b16encode"),
    "calendar": ("isleap", "leapdays", "weekday"),
    "dataclasses": ("fields", "replace", "make_dataclass"),
    "fnmatch": ("fnmatch", "filter", "translate"),
    "heapq": ("heappush", "heappop", "merge"),
    "mimetypes": ("guess_type", "guess_extension", "add_type"),
    "secrets": ("randbelow", "token_bytes", "token_hex"),
    "shutil": ("copyfile", "copymode", "rmtree"),
    "statistics": ("mean", "median", "multimode"),
    "textwrap": ("wrap", "fill", "dedent"),
    "threading": ("active_count", "main_thread", "RLock"),
    "webbrowser": ("open", "open_new", "register"),
}
_SYSTEM = "You explain the Python standard library, one sentence for each function."


def sample_conversations() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Records {'messages': [{'role': str, 'content': str}, ...]}, in a fixed order.

    Each function is asked about alone; then all of a module one after the other, under a system
    message.
    """
    for module, functions in _FUNCTIONS.items():
        first_lines = _first_lines(module)
        answers = {f"{module}.{name}": first_lines[name] for name in functions}
        for name, answer in answers.items():
            yield {"messages": _turn(f"What does {name} do?", answer)}
        messages = [{"role": "system", "content": _SYSTEM}]
        for name, answer in answers.items():
            follows = len(messages) > 1
            question = f"And {name}?" if follows else f"What does {name} do?"
            messages += _turn(question, answer)
        yield {"messages": messages}


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _first_lines(module: str) -> dict[str, str]:
    """The first line of the docstring of every function in a module's file.

    From the source: python -OO and some builds leave no docstrings in memory.
    """
    path = Path(sysconfig.get_paths()["stdlib"], f"{module}.py")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; the sample conversations are read from the source of the "
            "standard library, which this Python lacks. Give conversations with -d FILE."
        ) from None
    return {
        node.name: documentation.splitlines()[0]
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and (documentation := ast.get_docstring(node))
    }


def write_sample_conversations(folder: Path) -> list[Path]:
    """Write them as `<folder>/conversations.jsonl`, once; returns the one file in a list."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "conversations.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in sample_conversations())
    content = lines.encode("ascii")
    # Left alone when it is already right: its mtime is part of the key of what is prepared.
    if not path.is_file() or path.read_bytes() != content:
        with beside(path) as temporary:
            temporary.write_bytes(content)
            temporary.replace(path)
    return [path]

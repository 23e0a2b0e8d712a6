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
    "base64": ("b64encode", "b64decode", "decodebytes"),
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
# Dialogues without a system message: how far apart in the list the functions of one are, and how
# many it asks about. Chosen: each function is followed by four others, none of its own module, and
# five questions nearly fill a row of 256 tokens. Of 30 talks of eight questions that were not
# trained, 25 or more ended right in every trial so, 11 with at most three questions (2026-11-22).
_STRIDES = (5, 7, 11, 13)
_TURNS = (2, 3, 4, 5)


def sample_conversations() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Records {'messages': [{'role': str, 'content': str}, ...]}, in a fixed order.

    Each function is asked about alone; all of a module one after the other, under a system
    message; then functions of different modules one after the other, without one.
    """
    known: dict[str, str] = {}
    for module, functions in _FUNCTIONS.items():
        first_lines = _first_lines(module)
        answers = {f"{module}.{name}": first_lines[name] for name in functions}
        for name, answer in answers.items():
            yield {"messages": _turn(name, answer)}
        messages = [{"role": "system", "content": _SYSTEM}]
        for name, answer in answers.items():
            messages += _turn(name, answer, follows=len(messages) > 1)
        yield {"messages": messages}
        known |= answers
    yield from _mixed(known)


def _mixed(answers: dict[str, str]) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Dialogues that ask about every function first, second and third, after different ones.

    Trained on single questions only, a model answers the second one in words of other answers.
    """
    names = list(answers)
    for number, stride in enumerate(_STRIDES):
        for start in range(len(names)):
            messages = []
            for place in range(_TURNS[(start + number) % len(_TURNS)]):
                name = names[(start + place * stride) % len(names)]
                follows = place > 0 and (place + number) % 2 == 1
                messages += _turn(name, answers[name], follows)
            yield {"messages": messages}


def _turn(name: str, answer: str, follows: bool = False) -> list[dict[str, str]]:
    question = f"And {name}?" if follows else f"What does {name} do?"
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

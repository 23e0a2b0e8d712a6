"""The options as people read them: the page of --help and the tables of the README.

Invariant: every option of a script appears once, with the default that script really has.
"""

import textwrap

from llama_lib.option_readers import SWITCH
from llama_lib.options import Option

_SPEC_FILE = "a YAML file of options; a flag typed beside it wins"
_COLUMN = 36


def help_page(options: dict[str, Option], script: str, description: str) -> str:
    lines = [f"usage: python {script}.py [options]", "", description]
    for section, items in _by_section(options).items():
        lines += ["", section.capitalize()]
        for item in items:
            left = ", ".join(item.flags)
            if item.reader is not SWITCH:
                left += f" {item.reader.metavar}" + (" ..." if item.many else "")
            lines += _entry(left, f"{_meaning(item)} [{_default(item)}]")
    lines += ["", "Command line"]
    lines += _entry("--spec_file PATH", _SPEC_FILE)
    lines += _entry("-h, --help", "show this page and exit")
    lines += [
        "",
        "In brackets the defaults. --no-NAME turns a switch off; the value none unsets an option.",
    ]
    return "\n".join(lines)


def markdown_tables(options: dict[str, Option]) -> str:
    """One table per section with the columns flag, default, meaning."""
    blocks = []
    for section, items in _by_section(options).items():
        rows = [f"**{section.capitalize()}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for item in items:
            flags = ", ".join(f"`{flag}`" for flag in item.flags)
            rows.append(f"| {flags} | `{_default(item)}` | {_meaning(item)} |")
        blocks.append("\n".join(rows))
    blocks.append(f"`--spec_file PATH` is {_SPEC_FILE}.")
    return "\n\n".join(blocks) + "\n"


def _by_section(options: dict[str, Option]) -> dict[str, list[Option]]:
    grouped: dict[str, list[Option]] = {}
    for item in options.values():
        grouped.setdefault(item.section, []).append(item)
    return grouped


def _meaning(item: Option) -> str:
    choices = ", ".join(item.reader.choices)
    return f"{item.meaning}: {choices}" if choices else item.meaning


def _default(item: Option) -> str:
    if item.default is None:
        return "none"
    if item.reader is SWITCH:
        return str(item.default).lower()
    return " ".join(item.default) if item.many else str(item.default)


def _entry(left: str, right: str) -> list[str]:
    """What to type in the first columns, the meaning beside it or, if that is long, below it."""
    left, indent = f"  {left}", " " * _COLUMN
    wrapped = textwrap.wrap(
        right, width=100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    if len(left) + 2 > _COLUMN:
        return [left, *wrapped]
    return [left.ljust(_COLUMN) + wrapped[0].lstrip(), *wrapped[1:]]

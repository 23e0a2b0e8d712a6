"""Turns a tree of option dataclasses into a command line and reads one.

Invariant: a value is the same text after a flag and in a file, and whatever is wrong with one
command line is found in one go.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from llama_lib import spec_file
from llama_lib.errors import UserError
from llama_lib.option_readers import FALSE_WORDS, PATH, SWITCH, TRUE_WORDS, Reader

_UNSET_WORDS = {"none", "null", "~", ""}
_NO_VALUE = object()


class Option(NamedTuple):
    """One option as one script has it."""

    name: str
    section: str
    default: Any
    meaning: str
    reader: Reader
    short: str | None
    many: bool

    @property
    def flags(self) -> list[str]:
        return ([f"-{self.short}"] if self.short else []) + [f"--{self.name}"]

    @property
    def initial(self) -> Any:
        """The value the default stands for."""
        return _initial(self.default, self.reader)


def option(
    default: Any,
    meaning: str,
    reader: Reader,
    *,
    short: str | None = None,
    many: bool = False,
    scripts: Sequence[str] | None = None,
    script_defaults: dict[str, Any] | None = None,
) -> Any:
    """A dataclass field that is an option.

    `many` takes one or more values and holds a list. `scripts` names the only scripts that have
    the option; `script_defaults` gives the scripts whose default is another one. An option whose
    default is None is unset again by the value 'none'.
    """
    metadata = {
        "default": default,
        "meaning": meaning,
        "reader": reader,
        "short": short,
        "many": many,
        "scripts": scripts,
        "script_defaults": script_defaults or {},
    }
    return dataclasses.field(default_factory=lambda: _initial(default, reader), metadata=metadata)


def _initial(default: Any, reader: Reader) -> Any:
    if isinstance(default, list):
        return list(default)
    return reader.read(default) if reader is PATH and default is not None else default


def declared(sections: dict[str, type], script: str) -> dict[str, Option]:
    """The options of `script` by name, in the order of the tree."""
    found = {}
    for section, tree in sections.items():
        for item in dataclasses.fields(tree):
            of = item.metadata
            if of["scripts"] is not None and script not in of["scripts"]:
                continue
            default = of["script_defaults"].get(script, of["default"])
            found[item.name] = Option(
                item.name, section, default, of["meaning"], of["reader"], of["short"], of["many"]
            )
    return found


class Typed(NamedTuple):
    """What was given, by option name: values of flags, values of the file, and what is wrong."""

    flags: dict[str, Any]
    file: dict[str, Any]
    problems: list[str]


def read(
    options: dict[str, Option],
    argv: Sequence[str],
    *,
    script: str,
    deprecated: dict[str, str],
    help_page: Callable[[], str],
) -> Typed:
    """Reads `argv` and the file it names; `--help` prints `help_page()` and exits 0.

    `deprecated` maps old spellings to names; each one met is one line on stderr.
    """
    parser = _Parser(prog=script, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--spec_file", nargs="?", const=_NO_VALUE)
    for name, item in options.items():
        _add(parser, item.flags, name, item)
    deprecated = {old: name for old, name in deprecated.items() if name in options}
    for old, name in deprecated.items():
        _add(parser, [f"--{old}"], old, options[name])

    problems: list[str] = []
    seen, rest = parser.parse_known_args(_with_two_dashes(argv, options, problems))
    texts = vars(seen)
    path = texts.pop("spec_file")
    if texts.pop("help"):
        print(help_page())
        raise SystemExit(0)

    problems += _unknown_arguments(rest, options, [*options, "spec_file"], script)
    flags = _values(texts, options, deprecated, "--", problems)
    file: dict[str, Any] = {}
    if path is _NO_VALUE:
        problems.append("--spec_file: got no value, expected the path of a YAML file")
    elif path is not None:
        sections = {item.name: item.section for item in options.values()}
        sections |= {old: sections[name] for old, name in deprecated.items()}
        texts, unknown, faults = spec_file.texts(path, sections)
        problems += faults
        keys = [*sections, *sections.values()]
        problems += [
            f"{path}: unknown key {key!r}{suggestion(key, keys) or _see_help(script)}"
            for key in unknown
        ]
        file = _values(texts, options, deprecated, f"{path}: ", problems)
    return Typed(flags, file, problems)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message + _see_help(self.prog))


def _add(parser: _Parser, flags: list[str], name: str, item: Option) -> None:
    # Values stay text and a missing one is let through: argparse would end at the first fault.
    if item.reader is SWITCH:
        negated = [f"--no-{name}"]
        for spellings, text in ((flags, "true"), (negated, "false")):
            parser.add_argument(
                *spellings,
                dest=name,
                action="store_const",
                const=text,
                default=argparse.SUPPRESS,
            )
    elif item.many:
        parser.add_argument(*flags, dest=name, nargs="*", default=argparse.SUPPRESS)
    else:
        parser.add_argument(
            *flags, dest=name, nargs="?", const=_NO_VALUE, default=argparse.SUPPRESS
        )


def _with_two_dashes(
    argv: Sequence[str], options: dict[str, Option], problems: list[str]
) -> list[str]:
    """`argv` with -lr as --lr, and a problem for it: argparse would read -l with the value r."""
    mended = []
    for word in argv:
        if len(word) > 2 and word[0] == "-" and word[1:] in options:
            problems.append(f"unknown flag {word}; did you mean -{word}?")
            word = f"-{word}"
        mended.append(word)
    return mended


def _unknown_arguments(
    rest: list[str], options: dict[str, Option], known: list[str], script: str
) -> list[str]:
    problems = []
    known = known + [f"no-{name}" for name, item in options.items() if item.reader is SWITCH]
    follows_flag = False
    for word in rest:
        is_flag = re.match(r"--?[A-Za-z]", word) is not None
        if is_flag:
            flag = word.split("=")[0]
            hint = suggestion(flag.lstrip("-"), known, "--") or _see_help(script)
            problems.append(f"unknown flag {flag}{hint}")
        elif not follows_flag:
            mend = "a value follows its flag, as in --lr 3e-4"
            if word.lower() in TRUE_WORDS | FALSE_WORDS:
                mend = "a switch takes no value: write --NAME or --no-NAME"
            problems.append(f"unexpected argument: got {word!r}; {mend}")
        # What follows an unknown flag is most likely its value: one complaint is enough.
        follows_flag = is_flag and "=" not in word
    return problems


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """'; did you mean X?', or nothing when no known name is near."""
    alike = {each.lower().replace("-", "_"): each for each in known}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), alike, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{alike[near[0]]}?" if near else ""


def _see_help(script: str) -> str:
    return f"; see python {script}.py --help"


def _values(
    texts: dict[str, Any],
    options: dict[str, Option],
    deprecated: dict[str, str],
    place: str,
    problems: list[str],
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for written, text in texts.items():
        name = deprecated.get(written, written)
        if name != written:
            _warn(f"{place}{written} is deprecated: write {place}{name}")
            if name in texts:
                problems.append(f"{place}{written} is {place}{name}: got both, expected one")
                continue
        try:
            values[name] = _value(options[name], text)
        except ValueError:
            problems.append(_refusal(options[name], f"{place}{written}", text))
    return values


def _warn(line: str) -> None:
    # Every process of a run reads the same command line; one of them speaks.
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _value(item: Option, text: Any) -> Any:
    if item.many and isinstance(text, dict):
        # A file may write shares as a mapping: `a.jsonl: 0.7` is the word a.jsonl:0.7.
        if not all(isinstance(share, str) for share in text.values()):
            raise ValueError(text)
        text = [f"{name}:{share}" for name, share in text.items()]
    texts = text if isinstance(text, list) else [text]
    if not all(isinstance(each, str) for each in texts):
        raise ValueError(text)
    if item.default is None and len(texts) == 1 and texts[0].lower() in _UNSET_WORDS:
        return None
    if item.many and texts:
        return [item.reader.read(each) for each in texts]
    if item.many or isinstance(text, list):
        raise ValueError(text)
    return item.reader.read(text)


def _refusal(item: Option, place: str, text: Any) -> str:
    expected = item.reader.expected + (", one or more times" if item.many else "")
    got = "no value" if text is _NO_VALUE or text in ([], "") else repr(text)
    hint = suggestion(text, item.reader.choices) if isinstance(text, str) else ""
    return f"{place}: got {got}, expected {expected}{hint}"

"""Mixtures: percent per source, by name or from a file, and which of its entries a source is.

Invariant: a percentage is taken as the decimal number that was written, and a mixture whose sum is
not 100 within 1 is never used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from llama_lib.errors import UserError

# Percent per source as published for RedPajama's seven sources; `even` sums to 99.4.
MIXTURES: dict[str, dict[str, float]] = {
    name: dict(
        zip(
            ("commoncrawl", "c4", "github", "book", "arxiv", "wiki", "stackexchange"),
            percents,
            strict=True,
        )
    )
    for name, percents in {
        "slimpajama": (52.2, 26.7, 5.2, 4.2, 4.6, 3.8, 3.3),
        "even": (14.2,) * 7,
        "code": (10.0, 10.0, 25.0, 10.0, 10.0, 10.0, 25.0),
    }.items()
}
_SAME = ({"commoncrawl", "cc"}, {"wiki", "wikipedia"}, {"book", "books"})


def load_mixture(name: str) -> dict[str, float]:
    """Percent per source of a named mixture, or of a .json or .yaml file.

    A file maps sources to percents, at the top or under `mixture` (`num_tokens_avg` beside it is
    accepted and not used). The sum has to be within 1 of 100.
    """
    if name in MIXTURES:
        return dict(MIXTURES[name])
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise UserError(
            f"--mixture: got {name!r}, expected {', '.join(MIXTURES)}, or a .json or .yaml file of "
            "percents by source"
        )
    content = _read(path)
    problems = []
    if isinstance(content.get("mixture"), dict):
        unknown = sorted(set(content) - {"mixture", "num_tokens_avg"})
        if unknown:
            problems.append(
                f"--mixture: {path} has unknown keys {', '.join(unknown)}; expected mixture"
            )
        content = content["mixture"]
    percents = {}
    for source, text in content.items():
        percent = _number(text)
        if percent is None or percent < 0:
            problems.append(
                f"--mixture: {path}: {source}: got {text!r}, expected a percentage from 0 to 100"
            )
        else:
            percents[source] = percent
    if not problems:
        total = sum(percents.values(), Decimal(0))
        if abs(total - 100) > 1:
            problems.append(
                f"--mixture: the percentages of {path} sum to {total:f}, expected 100 (within 1)"
            )
    if problems:
        raise UserError(problems)
    return {source: float(percent) for source, percent in percents.items()}


def entry_of(source_name: str, mixture: Mapping[str, float]) -> str | None:
    """The entry of a mixture that a source belongs to.

    The entry of its very name, else the longest one of which its name is `<entry>` and more after
    a `_`, `-` or `.`; where `cc` is commoncrawl, wikipedia is wiki, books is book.
    """
    source = source_name.lower()
    found: list[tuple[int, bool, str]] = []
    for entry in mixture:
        own = entry.lower()
        for name in {own}.union(*(same for same in _SAME if own in same)):
            if source == name or source.startswith((f"{name}_", f"{name}-", f"{name}.")):
                found.append((len(name), name == own, entry))
    return max(found)[2] if found else None


def _number(text: Any) -> Decimal | None:
    if not isinstance(text, str):
        return None
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping with numbers as the texts they are written as."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            content = json.loads(text, parse_float=str, parse_int=str, object_pairs_hook=_pairs)
        else:
            content = _plain(yaml.compose(text, yaml.BaseLoader))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--mixture: {path} cannot be read ({reason})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--mixture: {path} is no mixture: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--mixture: {path} is no mixture: expected percents by source")
    return content


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key} is given twice")
        content[key] = value
    return content


def _plain(node: Any) -> Any:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return _pairs([(str(_plain(key)), _plain(value)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    return node.value if node else None

"""The YAML file of options: read as plain texts, written so that it reads back.

Invariant: a scalar stays the text that was written; its type is the business of the readers.
"""

from pathlib import Path
from typing import Any

HEADER = "# Options of this project's scripts; reload with --spec_file.\n"


def texts(path: str, sections: dict[str, str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The entries of a file as (texts by option name, unknown keys, problems).

    `sections` maps option names to their sections. Keys stand at the top or under their section.
    """
    import yaml

    try:
        # PyYAML's own types are those of YAML 1.1, in which 3e-4 is a string and 5:8 is 308.
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
        content = _mapping(root)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        return {}, [], [f"--spec_file: got {path!r} ({reason}), expected a YAML file of options"]
    except (yaml.YAMLError, ValueError) as error:
        return {}, [], [f"--spec_file: {path} is not a YAML file of options: {error}"]

    found: dict[str, Any] = {}
    unknown, problems = [], []
    for key, value in content.items():
        in_section = key in sections.values() and (isinstance(value, dict) or value == "")
        for name, text in (value or {}).items() if in_section else [(key, value)]:
            if name not in sections:
                unknown.append(name)
            elif in_section and sections[name] != key:
                problems.append(
                    f"{path}: {name}: got it under {key!r}, expected it under {sections[name]!r}"
                )
            elif name in found:
                problems.append(f"{path}: {name} is given twice; give it once")
            else:
                found[name] = text
    return found, unknown, problems


def _mapping(root: Any) -> dict[str, Any]:
    import yaml

    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("expected lines of the form 'key: value'")
    return _plain(root)


def _plain(node: Any) -> Any:
    """A node as dict, list and str. Refuses a repeated key, of which PyYAML keeps the last."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each) for each in node.value]
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(_plain(key_node))
        if key in content:
            raise ValueError(f"{key} is given twice (line {key_node.start_mark.line + 1})")
        content[key] = _plain(value_node)
    return content


def dump(content: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Writes options by section."""
    import yaml

    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    Path(path).write_text(HEADER + text, encoding="utf-8")

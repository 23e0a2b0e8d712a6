"""The version gate: one message, the mending command, a way around."""

from importlib.metadata import PackageNotFoundError

import pytest

from llama_lib import versions
from llama_lib.errors import UserError

GOOD = {
    "colossalai": "0.5.0",
    "torch": "2.13.0+cpu",
    "transformers": "4.51.3",
    "datasets": "5.0.1",
}


@pytest.fixture
def installed(monkeypatch):
    packages = dict(GOOD)

    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.12.4")
    return packages


def refusal(allow_untested: bool = False) -> list[str]:
    with pytest.raises(UserError) as caught:
        versions.check_versions(allow_untested)
    return caught.value.problems


def test_this_installation_is_a_tested_one():
    assert versions.check_versions(False) == []


@pytest.mark.parametrize("torch", ["2.8.0", "2.9.1", "2.13.0+cu130", "2.13.1"])
def test_accepted_torch(installed, torch):
    installed["torch"] = torch
    assert versions.check_versions(False) == []


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("colossalai", "0.4.9", "0.5.0"),
        ("torch", "2.7.1", "2.8 to 2.13"),
        ("torch", "2.14.0", "2.8 to 2.13"),
        ("torch", "3.0.0", "2.8 to 2.13"),
        ("transformers", "4.51.0", "4.51.3"),
        ("transformers", "4.52.4", "4.51.3"),
        ("datasets", "5.2.0", "5.0.x"),
        ("datasets", "4.0.0", "5.0.x"),
    ],
)
def test_untested_version(installed, name, found, expected):
    installed[name] = found
    line, advice = refusal()
    assert line == f"{name}: got {found}, expected {expected}"
    assert "`make install`" in advice
    assert "pip install --no-deps -r requirements-colossalai.txt" in advice
    assert "--allow_untested_versions" in advice
    assert versions.check_versions(True) == [line]


def test_everything_untested_is_one_message(installed, monkeypatch):
    installed.update(torch="2.5.1", transformers="4.40.0")
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.2")
    monkeypatch.setattr(versions.platform, "system", lambda: "Darwin")
    assert [line.split(":")[0] for line in refusal()[:-1]] == [
        "torch",
        "transformers",
        "Python",
        "system",
    ]


def test_missing_colossalai_is_one_sentence(installed):
    del installed["colossalai"]
    for allow_untested in (False, True):
        (line,) = refusal(allow_untested)
        assert line.startswith("colossalai is not installed: run `make install`")

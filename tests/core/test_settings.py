"""Environment variables are declared once, read by type, and refused when they cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import invarlock
from invarlock.core import settings
from invarlock.core.exceptions import ConfigError
from invarlock.core.settings import SETTINGS, Setting


def test_names_are_unique_and_ours() -> None:
    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names)
    assert {name for name in names if not name.startswith("INVARLOCK_")} == {"HF_DATASETS_OFFLINE", "HF_HOME"}


def test_every_variable_in_the_source_is_declared() -> None:
    declared = {setting.name for setting in SETTINGS}
    used: set[str] = set()
    for file in Path(invarlock.__file__).parent.rglob("*.py"):
        used |= set(re.findall(r"\bINVARLOCK_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8")))
    assert used - declared == set()


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_truth(text: str) -> None:
    assert Setting("X", "bool", False, "").parse(text) is True


@pytest.mark.parametrize("text", ["0", "false", "No", "off", ""])
def test_falsehood(text: str) -> None:
    assert Setting("X", "bool", True, "").parse(text) is False


@pytest.mark.parametrize(
    ("kind", "text", "expected"), [("int", " 7 ", 7), ("float", "0.25", 0.25), ("str", "/a b", "/a b")]
)
def test_values_have_their_type(kind: settings.Kind, text: str, expected: object) -> None:
    assert Setting("X", kind, None, "").parse(text) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("INVARLOCK_DEBUG_TRACE", "maybe", "1 or 0"),
        ("INVARLOCK_CI_FINAL", "many", "a whole number"),
        ("INVARLOCK_PM_ACCEPTANCE_MAX", "x", "a number"),
        ("INVARLOCK_PM_ACCEPTANCE_MAX", "nan", "a number"),
        ("INVARLOCK_SNAPSHOT_AUTO_RAM_FRACTION", "inf", "a number"),
        ("INVARLOCK_READ_LIMITS", "1e300", "1,000,000 or less"),
        ("INVARLOCK_OMP_THREADS", "1000000000000", "4,096 or less"),
        ("INVARLOCK_SNAPSHOT_MODE", "disk", "auto or bytes or chunked"),
    ],
)
def test_what_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"environment variable {name} is '{text}'; expected {expected}"):
        settings.get(name)


def test_defaults_hold_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)
        assert settings.get(setting.name) == setting.default
    assert settings.environment_flags() == {}


def test_only_what_is_set_is_recorded() -> None:
    flags = settings.environment_flags({"INVARLOCK_TINY_RELAX": "1", "PATH": "/bin", "HF_HOME": "/h"})
    assert flags == {"INVARLOCK_TINY_RELAX": "1", "HF_HOME": "/h"}


def test_an_undeclared_name_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        settings.get("INVARLOCK_NOPE")

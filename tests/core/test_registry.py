"""Names lead to classes; clashes, typos, missing extras and broken plugins are told apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from invarlock.core import registry
from invarlock.core.exceptions import ConfigError, DependencyError
from invarlock.core.registry import Entry, nearest

Distribute = Callable[..., None]


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribute]:
    """Put a distribution on `sys.path`, as pip would: metadata, and modules by name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    before = set(sys.modules)

    def _distribute(name: str, entry_points: str, **modules: str) -> None:
        folder = tmp_path / f"{name}-2.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n")
        (folder / "entry_points.txt").write_text(entry_points)
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)

    yield _distribute
    registry._installed.cache_clear()
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


def test_our_own_names_are_registered() -> None:
    assert {"hf_causal", "hf_auto"} <= set(registry.adapters.entries())
    assert {"quant_rtn", "noop", "checkpoint"} <= set(registry.edits.entries())
    assert {"invariants", "spectral", "rmt", "variance", "hello_guard"} <= set(registry.guards.entries())
    assert {"wikitext2", "local_jsonl", "python_docs", "synthetic"} <= set(registry.providers().entries())


def test_auto_is_another_name_for_hf_auto() -> None:
    assert registry.adapters.entry("auto").name == "hf_auto"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown guard 'spectrl' \(did you mean 'spectral'\?\); expected one of: "):
        registry.guards.entry("spectrl")
    assert nearest("zzz", ["spectral"]) == ""


def test_listing_imports_no_plugin(distribute: Distribute) -> None:
    distribute("eager", "[invarlock.guards]\neager = eager_plugin:Guard\n", eager_plugin="raise SystemExit(9)")
    entry = registry.guards.entries()["eager"]
    assert (entry.origin, entry.distribution, entry.version, entry.kind) == ("Plugin", "eager", "2.1", "guard")
    assert "eager_plugin" not in sys.modules


def test_two_claims_to_a_name_raise_and_both_are_listed(distribute: Distribute) -> None:
    distribute("one", "[invarlock.guards]\nsame = one_plugin:Guard\n")
    distribute("two", "[invarlock.guards]\nsame = two_plugin:Guard\n")
    with pytest.raises(ConfigError, match="guard name 'same' is claimed twice: by .*; uninstall one of them"):
        registry.guards.entries()
    assert {entry.distribution for entry in registry.guards.claims() if entry.name == "same"} == {"one", "two"}


def test_a_plugin_cannot_take_a_name_of_ours(distribute: Distribute) -> None:
    distribute("thief", "[invarlock.guards]\nspectral = thief_plugin:Guard\n")
    with pytest.raises(ConfigError, match="guard name 'spectral' is claimed twice"):
        registry.guards.load("spectral")


def test_discovery_can_be_switched_off(distribute: Distribute, monkeypatch: pytest.MonkeyPatch) -> None:
    distribute("extra", "[invarlock.guards]\nextra = extra_plugin:Guard\n")
    monkeypatch.setenv("INVARLOCK_DISABLE_PLUGIN_DISCOVERY", "1")
    assert "extra" not in registry.guards.entries()
    assert "spectral" in registry.guards.entries()


def test_a_plugin_that_cannot_load_shows_its_whole_error(distribute: Distribute) -> None:
    distribute("broken", "[invarlock.guards]\nbroken = broken_plugin:Guard\n", broken_plugin="1 / 0")
    with pytest.raises(ConfigError) as caught:
        registry.guards.load("broken")
    assert str(caught.value) == (
        "plugin 'broken' (broken_plugin:Guard, from broken 2.1) cannot be loaded: ZeroDivisionError: division by zero"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("target", ["nowhere_plugin:Guard", "empty_plugin:Guard"])
def test_a_module_or_class_that_is_not_there_is_named(distribute: Distribute, target: str) -> None:
    distribute("hollow", f"[invarlock.guards]\nhollow = {target}\n", empty_plugin="")
    with pytest.raises(ConfigError, match=f"plugin 'hollow' \\({target}, from hollow 2.1\\) cannot be loaded: "):
        registry.guards.load("hollow")


def test_arguments_reach_the_constructor_and_wrong_ones_suggest_the_nearest() -> None:
    guard = registry.guards.create("hello_guard", message="hi")
    assert guard.message == "hi"
    with pytest.raises(
        ConfigError, match=r"takes no argument 'mesage' \(did you mean 'message'\?\); expected one of: "
    ):
        registry.guards.create("hello_guard", mesage="hi")


def test_a_type_error_within_a_constructor_is_not_taken_for_wrong_arguments(distribute: Distribute) -> None:
    source = "class Guard:\n    def __init__(self, n=1):\n        'a' + n\n"
    distribute("fails", "[invarlock.guards]\nfails = fails_plugin:Guard\n", fails_plugin=source)
    with pytest.raises(TypeError, match="concatenate"):
        registry.guards.create("fails", n=2)


def test_a_missing_extra_is_named_with_its_command() -> None:
    entry = Entry("x", "os:path", "invarlock.adapters", "invarlock", "1", (("no_such_module", "gptq"),))
    assert entry.missing_extra() == "gptq"
    with pytest.raises(DependencyError, match=r'adapter \'x\' needs the extra "gptq".*pip install "invarlock\[gptq\]"'):
        entry.load()


def test_a_module_that_is_blocked_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert registry.guards.entry("spectral").missing_extra() == "guards"
    assert registry.guards.entry("hello_guard").missing_extra() is None

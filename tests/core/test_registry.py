"""Names lead to classes; clashes, typos, missing extras and broken plugins are told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distributions import Site
from invarlock.core import registry
from invarlock.core.exceptions import ConfigError, DependencyError
from invarlock.core.inventory import explain
from invarlock.core.registry import Entry, nearest
from invarlock.eval.data import get_provider
from invarlock.policy.config import load_config


def test_our_own_names_are_registered() -> None:
    assert {"hf_causal", "hf_auto"} <= set(registry.adapters.entries())
    assert {"quant_rtn", "noop", "checkpoint"} <= set(registry.edits.entries())
    assert {"invariants", "spectral", "rmt", "variance", "hello_guard"} <= set(registry.guards.entries())
    assert {"wikitext2", "local_jsonl", "python_docs", "synthetic"} <= set(registry.providers.entries())


def test_what_is_needed_is_known_by_name_without_an_import() -> None:
    assert registry.providers.entry("hf_text").needs == (("datasets", "eval"),)
    assert registry.providers.entry("python_docs").needs == ()
    assert registry.guards.entry("rmt").needs == (("torch", "guards"),)
    assert [extra for _, extra in registry.adapters.entry("hf_mlm").needs] == ["adapters", "adapters"]


def test_auto_is_another_name_for_hf_auto() -> None:
    assert registry.adapters.entry("auto").name == "hf_auto"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown guard 'spectrl' \(did you mean 'spectral'\?\); expected one of: "):
        registry.guards.entry("spectrl")
    assert nearest("zzz", ["spectral"]) == ""


def test_listing_imports_no_plugin(distribute: Site) -> None:
    distribute("eager", "[invarlock.guards]\neager = eager_plugin:Guard\n", eager_plugin="raise SystemExit(9)")
    entry = registry.guards.entries()["eager"]
    assert (entry.origin, entry.distribution, entry.version, entry.kind) == ("Plugin", "eager", "3.0", "guard")
    assert "eager_plugin" not in sys.modules


def test_two_claims_to_a_name_raise_and_both_are_listed(distribute: Site) -> None:
    distribute("one", "[invarlock.guards]\nsame = one_plugin:Guard\n")
    distribute("two", "[invarlock.guards]\nsame = two_plugin:Guard\n")
    with pytest.raises(ConfigError, match="guard name 'same' is claimed twice: by .*; uninstall one of them"):
        registry.guards.entries()
    assert {entry.distribution for entry in registry.guards.claims() if entry.name == "same"} == {"one", "two"}


def test_a_plugin_cannot_take_a_name_of_ours(distribute: Site) -> None:
    distribute("thief", "[invarlock.guards]\nspectral = thief_plugin:Guard\n")
    with pytest.raises(ConfigError, match="guard name 'spectral' is claimed twice"):
        registry.guards.load("spectral")


def test_discovery_can_be_switched_off(distribute: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    distribute("extra", "[invarlock.guards]\nextra = extra_plugin:Guard\n")
    monkeypatch.setenv("INVARLOCK_DISABLE_PLUGIN_DISCOVERY", "1")
    assert "extra" not in registry.guards.entries()
    assert "spectral" in registry.guards.entries()


def test_a_plugin_that_cannot_load_shows_its_whole_error(distribute: Site) -> None:
    distribute("broken", "[invarlock.guards]\nbroken = broken_plugin:Guard\n", broken_plugin="1 / 0")
    with pytest.raises(ConfigError) as caught:
        registry.guards.load("broken")
    assert str(caught.value) == (
        "plugin 'broken' (broken_plugin:Guard, from broken 3.0) cannot be loaded: ZeroDivisionError: division by zero"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("target", ["nowhere_plugin:Guard", "empty_plugin:Guard"])
def test_a_module_or_class_that_is_not_there_is_named(distribute: Site, target: str) -> None:
    distribute("hollow", f"[invarlock.guards]\nhollow = {target}\n", empty_plugin="")
    with pytest.raises(ConfigError, match=f"plugin 'hollow' \\({target}, from hollow 3.0\\) cannot be loaded: "):
        registry.guards.load("hollow")


def test_arguments_reach_the_constructor_and_wrong_ones_suggest_the_nearest() -> None:
    guard = registry.guards.create("hello_guard", message="hi")
    assert guard.message == "hi"
    with pytest.raises(
        ConfigError, match=r"takes no argument 'mesage' \(did you mean 'message'\?\); expected one of: "
    ):
        registry.guards.create("hello_guard", mesage="hi")


def test_a_type_error_within_a_constructor_is_not_taken_for_wrong_arguments(distribute: Site) -> None:
    source = "class Guard:\n    def __init__(self, n=1):\n        'a' + n\n    def validate(self, *a): ...\n"
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


@pytest.mark.parametrize(
    ("group", "kind", "offers"),
    [
        ("guards", "guard", "validate"),
        ("edits", "edit", "apply"),
        ("adapters", "adapter", "load_model, describe, snapshot, restore"),
        ("providers", "data provider", "options, windows"),
    ],
)
def test_a_class_that_lacks_what_its_kind_needs_is_refused(
    distribute: Site, group: str, kind: str, offers: str
) -> None:
    distribute("bare", f"[invarlock.{group}]\nbare = bare_plugin:Bare\n", bare_plugin="class Bare: ...\n")
    with pytest.raises(ConfigError) as caught:
        getattr(registry, group).load("bare")
    assert str(caught.value) == (
        f"plugin 'bare' (bare_plugin:Bare, from bare 3.0) is no {kind}; expected a class with {offers}"
    )


PROVIDER = """
from dataclasses import dataclass
from typing import ClassVar
from invarlock.eval.data import Document, TextProvider

@dataclass(frozen=True)
class Numbers(TextProvider):
    name: ClassVar[str] = "numbers"
    upto: int = 3

    def documents(self, split=None):
        return [Document(str(n), "one more " * n) for n in range(1, self.upto + 1)]
"""


def test_a_provider_of_somebody_else_works_as_ours_do(distribute: Site) -> None:
    distribute("numbers", "[invarlock.providers]\nnumbers = numbers_plugin:Numbers\n", numbers_plugin=PROVIDER)
    assert registry.providers.entry("numbers").origin == "Plugin"
    assert len(get_provider({"kind": "numbers", "upto": 5}).documents()) == 5
    with pytest.raises(ConfigError, match=r"'upt' of data provider 'numbers' \(did you mean 'upto'\?\)"):
        get_provider("numbers", upt=5)
    with pytest.raises(ConfigError, match=r"unknown data provider 'nubmers' \(did you mean 'numbers'\?\)"):
        get_provider("nubmers")
    (explained,) = explain("numbers", "datasets")
    assert (explained.state, explained.parameters) == ("ready", ["split=None", "upto=3"])


def test_a_configuration_may_name_it(distribute: Site, tmp_path: Path) -> None:
    distribute("numbers", "[invarlock.providers]\nnumbers = numbers_plugin:Numbers\n", numbers_plugin=PROVIDER)
    path = tmp_path / "config.yaml"
    path.write_text("dataset: {provider: {kind: numbers, upto: 4}}\n")
    assert load_config(path, require_model=False).dataset.provider_options == {"upto": 4}
    path.write_text("dataset: {provider: numbers, upt: 4}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:1: unknown key 'dataset.upt' \(did you mean 'upto'\?\)"):
        load_config(path, require_model=False)

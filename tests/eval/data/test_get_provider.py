from __future__ import annotations

import subprocess
import sys

import pytest

import invarlock.eval.data as data
from invarlock.core import registry
from invarlock.core.exceptions import ConfigError
from invarlock.eval.data import PairProvider, TextProvider, get_provider


@pytest.mark.parametrize("name", registry.providers.entries())
def test_every_registered_name_gives_its_provider(name: str) -> None:
    provider = get_provider(name)
    assert provider.name == name
    assert isinstance(provider, PairProvider if "seq2seq" in name or "pairs" in name else TextProvider)
    assert type(provider) is getattr(data, type(provider).__name__)


def test_a_mapping_means_the_same_as_a_name_with_options() -> None:
    assert get_provider({"kind": "synthetic", "count": 5}) == get_provider("synthetic", count=5)
    assert get_provider({"kind": "synthetic", "count": 5}, count=7) == get_provider("synthetic", count=7)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("wikitext", {}, r"'wikitext' \(did you mean 'wikitext2'\?\)"),
        ("nothing_like_it", {}, "expected one of: .*python_docs"),
        ({"count": 5}, {}, "'kind'"),
        ("local_jsonl", {"text_feild": "body"}, r"'text_feild' .*did you mean 'text_field'\?"),
        ({"kind": "synthetic", "documents": 3}, {}, "'documents' .*expected one of: split, count, sentences"),
    ],
)
def test_wrong_names_and_options_are_refused_with_the_nearest_valid_one(spec, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        get_provider(spec, **options)


@pytest.mark.slow
def test_importing_the_room_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, invarlock.eval.data as d; d.get_provider('python_docs').documents(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets"} & set(loaded)

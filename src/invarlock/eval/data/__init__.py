"""Where evaluation text comes from: providers and the windows that they cut.

`get_provider(name, **options).windows(tokenizer, ...)` gives two disjoint, reproducible sets of windows.
"""

from __future__ import annotations

from collections.abc import Mapping

from invarlock.core import registry
from invarlock.core.exceptions import ConfigError
from invarlock.core.registry import nearest
from invarlock.eval.data.base import (
    Document,
    EvaluationWindow,
    Pair,
    PairProvider,
    Provider,
    TextProvider,
    provider_digest,
)
from invarlock.eval.data.hf import HFSeq2SeqProvider, HFTextProvider
from invarlock.eval.data.local_jsonl import LocalJsonlPairsProvider, LocalJsonlProvider
from invarlock.eval.data.python_code import PythonCodeProvider
from invarlock.eval.data.python_docs import PythonDocsProvider
from invarlock.eval.data.synthetic import SyntheticProvider, SyntheticSeq2SeqProvider
from invarlock.eval.data.wikitext2 import Wikitext2Provider

__all__ = [
    "Document",
    "EvaluationWindow",
    "HFSeq2SeqProvider",
    "HFTextProvider",
    "LocalJsonlPairsProvider",
    "LocalJsonlProvider",
    "Pair",
    "PairProvider",
    "Provider",
    "PythonCodeProvider",
    "PythonDocsProvider",
    "SyntheticProvider",
    "SyntheticSeq2SeqProvider",
    "TextProvider",
    "Wikitext2Provider",
    "get_provider",
    "provider_digest",
]


def get_provider(spec: str | Mapping[str, object], **options: object) -> Provider:
    """The provider that `spec` names: a registry name, or a mapping `{kind: name, **options}`.

    Keyword options win over those of the mapping. Raises `ConfigError` for an unknown name or option, with the
    nearest one that exists.
    """
    name: object = spec
    if isinstance(spec, Mapping):
        options = {key: value for key, value in spec.items() if key != "kind"} | options
        name = spec.get("kind")
    if not isinstance(name, str):
        raise ConfigError(f"got {name!r} as data provider, expected a name or a mapping with 'kind': name one")
    provider: type[Provider] = registry.providers.load(name)
    valid = provider.options()
    if unknown := [option for option in options if option not in valid]:
        raise ConfigError(
            f"unknown option {unknown[0]!r} of data provider {name!r}{nearest(unknown[0], valid)}; "
            f"expected one of: {', '.join(valid)}"
        )
    return provider(**options)  # type: ignore[arg-type]  # a provider checks the values of its own options

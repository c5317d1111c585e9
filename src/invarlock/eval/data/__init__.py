"""Where evaluation text comes from: providers and the windows that they cut.

`get_provider(name, **options).windows(tokenizer, ...)` gives two disjoint, reproducible sets of windows.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from invarlock.core.exceptions import ConfigError
from invarlock.core.registry import nearest, providers
from invarlock.eval.data.base import (
    Document,
    EvaluationWindow,
    Pair,
    PairProvider,
    Provider,
    TextProvider,
    provider_digest,
)

if TYPE_CHECKING:
    from invarlock.eval.data.hf import HFSeq2SeqProvider, HFTextProvider
    from invarlock.eval.data.local_jsonl import LocalJsonlPairsProvider, LocalJsonlProvider
    from invarlock.eval.data.python_docs import PythonDocsProvider
    from invarlock.eval.data.synthetic import SyntheticProvider, SyntheticSeq2SeqProvider
    from invarlock.eval.data.wikitext2 import Wikitext2Provider

__all__ = [
    "PROVIDERS",
    "Document",
    "EvaluationWindow",
    "HFSeq2SeqProvider",
    "HFTextProvider",
    "LocalJsonlPairsProvider",
    "LocalJsonlProvider",
    "Pair",
    "PairProvider",
    "Provider",
    "PythonDocsProvider",
    "SyntheticProvider",
    "SyntheticSeq2SeqProvider",
    "TextProvider",
    "Wikitext2Provider",
    "get_provider",
    "provider_digest",
]

PROVIDERS: dict[str, str] = {
    "wikitext2": "invarlock.eval.data.wikitext2:Wikitext2Provider",
    "hf_text": "invarlock.eval.data.hf:HFTextProvider",
    "local_jsonl": "invarlock.eval.data.local_jsonl:LocalJsonlProvider",
    "python_docs": "invarlock.eval.data.python_docs:PythonDocsProvider",
    "synthetic": "invarlock.eval.data.synthetic:SyntheticProvider",
    "hf_seq2seq": "invarlock.eval.data.hf:HFSeq2SeqProvider",
    "local_jsonl_pairs": "invarlock.eval.data.local_jsonl:LocalJsonlPairsProvider",
    "seq2seq": "invarlock.eval.data.synthetic:SyntheticSeq2SeqProvider",
}

_CLASSES = {target.partition(":")[2]: target for target in PROVIDERS.values()}


def get_provider(spec: str | Mapping[str, Any], **options: Any) -> Provider:
    """The provider that `spec` names: a registry name, or a mapping `{kind: name, **options}`.

    Keyword options win over those of the mapping. Raises `ConfigError` for an unknown name or option, with the
    nearest one that exists.
    """
    if isinstance(spec, Mapping):
        options = {key: value for key, value in spec.items() if key != "kind"} | options
        spec = spec.get("kind")  # type: ignore[assignment]  # checked on the next line
    if not isinstance(spec, str):
        raise ConfigError(f"got {spec!r} as data provider, expected a name or a mapping with 'kind': name one")
    provider: type[Provider] = providers().load(spec)
    valid = provider.options()
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"unknown option {option!r} of data provider {spec!r}{nearest(option, valid)}; "
                f"expected one of: {', '.join(valid)}"
            )
    return provider(**options)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name].partition(":")[0]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

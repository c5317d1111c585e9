"""What was done to a checkpoint is named right over architectures and forms of storage: a slice of the corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

#: edit, architecture, form of storage: every kind of edit once, every form with several
CASES = [
    ("2 bits a row", "neox", "dense"),
    ("3 bits in groups of 32", "bert", "pickled"),
    ("4 bits in groups of 128", "qwen", "dense"),
    ("5 bits asymmetric", "gpt2", "cast"),
    ("4 bits a column", "gpt2", "dense"),
    ("pruned 3:4", "t5", "dense"),
    ("pruned 2:8", "llama", "packed"),
    ("a head zeroed", "llama", "gguf"),
    ("a head zeroed", "gpt2", "dense"),
    ("rank 64", "llama", "dense"),
    ("rank 16", "neox", "cast"),
    ("DoRA of rank 4", "gpt2", "dense"),
    ("DoRA of rank 16", "bert", "pickled"),
    ("columns scaled", "neox", "packed"),
    ("transposed", "neox", "packed subject"),
    ("swapped across layers", "llama", "packed"),
    ("scales moved", "gpt2", "dense"),
    ("gains folded", "llama", "dense"),
    ("neurons in another order", "bert", "packed"),
    ("rows turned", "t5", "dense"),
    ("biases zeroed", "neox", "packed subject"),
    ("new rows", "bert", "dense"),
    ("a block constant", "qwen", "pickled"),
    ("a block constant", "llama", "cast"),
    ("gains folded", "bert", "packed"),
    ("rank 4 and pruned", "neox", "dense"),
    ("rank 8 and 8 bits", "qwen", "pickled"),
    ("8 bits in groups of 64", "gpt2", "cast"),
    ("3 bits a tensor", "neox", "pickled"),
    ("scaled", "llama", "gguf8"),
    ("merged by slerp", "neox", "dense"),
    ("another prefix", "qwen", "dense"),
    ("columns in another order and 4 bits", "neox", "dense"),
    ("columns turned and 4 bits", "neox", "dense"),
    ("sign and 4 bits", "bert", "dense"),
    ("rank 4 and sign", "llama", "dense"),
    ("rank 4 and scaled", "t5", "dense"),
    ("swapped and scaled", "gpt2", "pickled"),
    ("4 bits clipped", "llama", "pickled"),
    ("5 bits in groups of 32", "bert", "pickled"),
    ("a block empty", "gpt2", "packed subject"),
    ("re-initialised", "gpt2", "packed"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "model", "form"), CASES)
def test_what_was_done_is_named_with_its_figures(
    edit: str, model: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.diff_corpus import case

    done = case(edit, form, model, tmp_path)
    assert done is not None
    assert done[0] == []

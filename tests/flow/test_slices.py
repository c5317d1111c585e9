"""Several kinds of text in one certification: cut in proportion, measured in one pass, judged one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certification import FEW, gates, reread
from invarlock.assurance import render_certificate_html, render_certificate_markdown
from invarlock.certificate.verify import verify_certificate
from invarlock.core.exceptions import ConfigError, DataError
from invarlock.flow.certify import CertifyRequest, certify
from invarlock.reporting.terminal import summary_lines


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Forty documents of words and forty of digits."""
    folder = tmp_path_factory.mktemp("kinds")
    kinds = {
        "words": [" ".join(["the module returns an object"] * 12) + f" {n}" for n in range(40)],
        "digits": [" ".join(str((n + 7) * k % 997) for k in range(1, 60)) for n in range(40)],
    }
    slices = {}
    for name, texts in kinds.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        slices[name] = {"provider": "local_jsonl", "file": str(path)}
    return {"slices": slices, "seq_len": 48}


@pytest.mark.slow
def test_damage_that_one_kind_of_text_shows_fails_and_names_it(
    demo_model: Path, copy_model: Callable[..., Path], two_files: dict[str, Any], demo_tokenizer: Any, tmp_path: Path
) -> None:
    digits = sorted({token for n in range(1000) for token in demo_tokenizer(f" {n}")["input_ids"]})

    def forget(model: Any) -> None:
        rows = model.get_input_embeddings().weight
        rows[digits] = rows[digits].flip(0)

    subject = copy_model(demo_model, forget)
    request = CertifyRequest(
        subject=str(subject), baseline=str(demo_model), profile="dev", dataset=two_files, overrides=FEW, out=tmp_path
    )
    certificate = certify(request).certificate
    assert certificate["slices"]["digits"]["decision"] == "fail"
    assert any(reason["gate"].endswith("[digits]") for reason in certificate["verdict"]["reasons"])
    assert certificate["slices"]["digits"]["windows"] == certificate["slices"]["words"]["windows"] == 12
    assert sum(gates(certificate)[f"primary_metric[{name}]"] == "fail" for name in ("words", "digits")) == 1
    assert verify_certificate(reread(certificate)).intact
    for shown in (
        "\n".join(summary_lines(certificate)),
        render_certificate_markdown(certificate),
        render_certificate_html(certificate),
    ):
        assert "digits" in shown and "words" in shown


def _windows(dataset: dict[str, Any], demo_model: Path, **sample: int) -> Any:
    from invarlock.flow import steps
    from invarlock.flow.job import open_job
    from invarlock.flow.sampling import cut_windows
    from invarlock.policy.resolve import resolve_policy

    policy = resolve_policy("balanced", "dev", overrides={"sample": {**FEW["sample"], **sample}})
    job = open_job(policy, "auto", "cpu", (), None)
    return cut_windows(job, steps.read(job, str(demo_model)), dataset)


@pytest.mark.slow
def test_windows_are_dealt_by_share_and_mixed_so_that_any_first_part_holds_all_kinds(
    demo_model: Path, two_files: dict[str, Any]
) -> None:
    slices = {**two_files["slices"], "words": {**two_files["slices"]["words"], "share": 3}}
    windows = _windows({**two_files, "slices": slices}, demo_model, preview=9, final=8)
    assert [window.slice for window in windows.final] == ["words", "digits", "words", "words"] * 2 or [
        window.slice for window in windows.final
    ].count("digits") == 2
    assert sum(window.slice == "words" for window in windows.preview) == 7
    assert {window.slice for window in windows.preview[:4]} == {"words", "digits"}
    facts = windows.facts()
    assert facts.provider == "local_jsonl" and facts.slices is not None
    assert {name: part.requested for name, part in facts.slices.items()} == {"words": [7, 6], "digits": [2, 2]}
    again = type(windows).from_dict(reread(windows.to_dict()), windows.origin, facts.slices)
    assert again == windows


@pytest.mark.slow
def test_two_slices_of_the_same_text_are_refused(demo_model: Path, two_files: dict[str, Any]) -> None:
    same = {"a": two_files["slices"]["words"], "b": two_files["slices"]["words"]}
    with pytest.raises(DataError, match="share text"):
        _windows({"slices": same, "seq_len": 48}, demo_model)


@pytest.mark.slow
def test_fewer_windows_than_slices_are_refused(demo_model: Path, two_files: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="for 2 slices"):
        _windows(two_files, demo_model, preview=1, final=1)


@pytest.mark.slow
def test_without_data_the_interpreters_documentation_and_source_are_two_slices(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invarlock.flow import sampling

    monkeypatch.setattr(sampling.Wikitext2Provider, "is_cached", staticmethod(lambda: False))
    facts = _windows({"seq_len": 48}, demo_model).facts()
    assert facts.slices is not None
    assert {name: part.provider for name, part in facts.slices.items()} == {
        "docs": "python_docs",
        "code": "python_code",
    }

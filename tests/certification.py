"""Certifications of small trained models, measured once a session and shared by the tests of certify, verify and reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from invarlock.flow.certify import CertifyOutcome, CertifyRequest
from invarlock.flow.certify import certify as run_certify
from invarlock.policy.resolve import merge

SEQ_LEN = 48
WINDOWS = 12  # preview, and as many final
FEW: dict[str, Any] = {"sample": {"preview": WINDOWS, "final": WINDOWS}, "bootstrap": {"replicates": 100}}

Certify = Callable[..., CertifyOutcome]


def reread(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the certificate as somebody reads it from its file."""
    data: dict[str, Any] = json.loads(json.dumps(certificate, allow_nan=False))
    return data


def gates(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Return the decision of every gate by name."""
    return {gate["name"]: gate["decision"] for gate in certificate["gates"]}


def reasons(certificate: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Return (code, tensor) of every reason of the verdict."""
    return [(reason["code"], reason["tensor"]) for reason in certificate["verdict"]["reasons"]]


def round_weights(bits: int) -> Callable[[Any], None]:
    """Return a change that rounds every matrix to 2^bits - 1 levels a row."""

    def change(model: Any) -> None:
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2 and "wpe" not in name:
                scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-8) / (2 ** (bits - 1) - 1)
                tensor.copy_((tensor / scale).round() * scale)

    return change


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of real English, one a line, as JSON."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    documents = [text[:1500] for _, text in sorted(topics.items()) if len(text) > 300][:60]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def certify_models(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Certify:
    """Certify `subject` against `baseline` or `baseline_report` on a few windows of real text, in the dev profile."""

    def certify(subject: Path, baseline: Path | None = None, **request: Any) -> CertifyOutcome:
        data = {"provider": "local_jsonl", "file": str(text_file), "seq_len": SEQ_LEN, **request.pop("dataset", {})}
        chosen = {
            "profile": "dev",
            "out": tmp_path_factory.mktemp("runs"),
            "overrides": merge(FEW, request.pop("overrides", {})),
            **request,
        }
        baseline_id = None if baseline is None else str(baseline)
        return run_certify(CertifyRequest(subject=str(subject), baseline=baseline_id, dataset=data, **chosen))

    return certify


@pytest.fixture(scope="session")
def harmless(copy_model: Callable[..., Path], demo_model: Path) -> Path:
    """The demo model with its weights rounded to 8 bits."""
    return copy_model(demo_model, round_weights(8))


@pytest.fixture(scope="session")
def wrecked(copy_model: Callable[..., Path], demo_model: Path) -> Path:
    """The demo model with its weights rounded to 2 bits."""
    return copy_model(demo_model, round_weights(2))


@pytest.fixture(scope="session")
def damaged(rewrite_tensors: Callable[..., Path], demo_model: Path) -> Path:
    """The demo model with one NaN in its file."""

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["transformer.h.2.mlp.c_fc.weight"][5, 7] = float("nan")

    return rewrite_tensors(demo_model, spoil)


@pytest.fixture(scope="session")
def passed(certify_models: Certify, demo_model: Path, harmless: Path) -> CertifyOutcome:
    """A real PASS; its `source_report` is a measured baseline that other tests reuse."""
    return certify_models(harmless, demo_model)


@pytest.fixture(scope="session")
def failed(certify_models: Certify, passed: CertifyOutcome, wrecked: Path) -> CertifyOutcome:
    """A real FAIL on behaviour, against the same baseline."""
    return certify_models(wrecked, baseline_report=passed.source_report)


@pytest.fixture(scope="session")
def refused(certify_models: Certify, demo_model: Path, damaged: Path) -> CertifyOutcome:
    """A real FAIL before evaluation."""
    return certify_models(damaged, demo_model)

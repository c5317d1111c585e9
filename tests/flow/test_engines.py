"""Certifying what an engine serves: behaviour from the engine, weights from the files where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certification import Certify, gates, reread
from engine_server import Server, serve
from invarlock.assurance import verify_certificate
from invarlock.core.exceptions import ConfigError
from invarlock.flow.certify import CertifyRequest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def serving(load_model: Callable[[Path], Any], demo_tokenizer: Any) -> Callable[[Path], Any]:
    return lambda folder: serve(Server(load_model(folder), demo_tokenizer))


def test_a_served_subject_has_behaviour_from_the_engine_and_weights_from_its_files(
    certify_models: Certify,
    serving: Callable[[Path], Any],
    demo_model: Path,
    harmless: Path,
    wrecked: Path,
    tmp_path: Path,
) -> None:
    with serving(harmless) as server:
        outcome = certify_models(harmless, demo_model, engine=f"vllm={server.url}", out=tmp_path)
    certificate, found = outcome.certificate, gates(outcome.certificate)
    assert outcome.status == "PASS", certificate["verdict"]
    assert (found["spectral"], found["invariants"], found["rmt"], found["variance"]) == ("pass", "pass", "off", "off")
    assert "served by vllm, which gives no activations" in certificate["rmt"]["message"]
    engine = certificate["provenance"]["runtime"]["subject"]["engine"]
    assert (engine["kind"], engine["version"], engine["top"]) == ("vllm", "9.9", 20)
    assert (
        certificate["meta"]["device"] == "served" and "engine" not in certificate["provenance"]["runtime"]["baseline"]
    )
    assert certificate["weights"]["changes"], "sketches come from the files"
    assert verify_certificate(reread(certificate)).passed
    assert not list(tmp_path.rglob(".partial/*")), "answers are kept no longer than needed"
    report = outcome.source_report
    with serving(wrecked) as server:  # the files are harmless, what is served is not
        outcome = certify_models(harmless, baseline_report=report, engine=f"vllm={server.url}")
    assert outcome.status == "FAIL" and gates(outcome.certificate)["divergence_kl"] == "fail"


def test_two_engines_are_compared_by_behaviour_alone(
    certify_models: Certify, serving: Callable[[Path], Any], demo_model: Path
) -> None:
    with serving(demo_model) as server, serving(demo_model) as other:
        engines = {"engine": f"openai={server.url}", "baseline_engine": f"vllm={other.url}"}
        outcome = certify_models(Path("served-elsewhere"), demo_model, intent="engine", **engines)
        assert outcome.status == "PASS", outcome.certificate["verdict"]
        found = gates(outcome.certificate)
        assert {found[name] for name in ("spectral", "rmt", "variance", "invariants")} == {"off"}
        assert outcome.certificate["divergence"]["kl_mean"] < 1e-6
        assert verify_certificate(reread(outcome.certificate)).passed
        outcome = certify_models(Path("served-elsewhere"), demo_model, **engines)
    assert outcome.status == "INCONCLUSIVE", "weights that were to be judged are not at hand"
    assert "--intent engine" in json.dumps(outcome.certificate["verdict"])


def test_requests_that_no_engine_can_serve_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be edited"):
        CertifyRequest(subject="x", baseline="y", engine="vllm=http://127.0.0.1:1", edit={"name": "noop"})
    with pytest.raises(ConfigError, match="measured already"):
        CertifyRequest(subject="x", baseline_report=Path("y"), baseline_engine="vllm=http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="engine is 'vllm'"):
        CertifyRequest(subject="x", baseline="y", engine="vllm")

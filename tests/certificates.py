"""Certificates for tests: made by the real `make_certificate` from reports of small, seeded measurements.

`make_cert(kind)` gives the JSON form of one of KINDS; `make_evidence`, `make_report` and `certify` are its parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invarlock.assurance import make_certificate
from invarlock.core.api import RunReport
from invarlock.evidence.histogram import histogram
from invarlock.evidence.model import DataFacts, Evidence, ModelFacts, Runtime, Structure, TensorFacts
from invarlock.evidence.plain import canonical_digest
from invarlock.evidence.rows import WindowRows
from invarlock.policy.resolve import Policy, resolve_policy
from invarlock.stats.linalg import pack, sign_vectors

__all__ = ["HOSTILE", "KINDS", "certify", "make_cert", "make_evidence", "make_report", "make_weights"]

KINDS = ("pass", "fail", "inconclusive", "refused", "hostile", "accuracy", "non_finite", "self")
HOSTILE = "<script>alert('x')</script> | **b** `c` [l](javascript:0) ]]> \x00\u202e\n# $\\frac{1}$ {{ 7*7 }}"

Weights = dict[str, NDArray[np.float32]]
_SHAPES = {"attn.c_attn": (24, 72), "attn.c_proj": (24, 24), "mlp.c_fc": (24, 96), "mlp.c_proj": (96, 24)}
_LAYERS = 4


def make_weights(seed: int = 0) -> Weights:
    """Return the matrices of a four-layer model, random."""
    random = np.random.default_rng(seed)
    names = [(f"h.{layer}.{part}.weight", shape) for layer in range(_LAYERS) for part, shape in _SHAPES.items()]
    return {
        name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in [("wte.weight", (128, 24)), *names]
    }


def _family(name: str) -> str:
    return "attn" if ".attn." in name else "ffn" if ".mlp." in name else "embed"


def _spectrum(name: str, weight: NDArray[np.float32]) -> dict[str, Any]:
    rows, columns = (np.linalg.norm(weight, axis=axis) for axis in (1, 0))
    return {
        "name": name,
        "family": _family(name),
        "by": "name",
        "role": "embedding" if _family(name) == "embed" else "linear",
        "shape": list(weight.shape),
        "sigma": float(np.linalg.svd(weight, compute_uv=False)[0]),
        "frobenius": float(np.linalg.norm(weight)),
        "rows": pack(rows if _family(name) == "embed" else np.sort(rows)),
        "columns": pack(np.sort(columns)),
    }


def _edge(name: str, ratio: float) -> dict[str, Any]:
    return {
        "name": name, "family": _family(name), "tokens": 1024, "ratio": ratio, "features": 192, "constant": 0,
        "dead_windows": 0,
    }  # fmt: skip


def _structure(weights: Weights, non_finite: Mapping[str, int]) -> Structure:
    tensors = [
        TensorFacts(
            name=name,
            shape=list(value.shape),
            dtype="F32",
            digest=hashlib.sha256(value.tobytes() + bytes([non_finite.get(name, 0)])).hexdigest(),
            non_finite=non_finite.get(name, 0),
        )
        for name, value in weights.items()
    ]
    return Structure(source="file", tensors=tensors, embedding_rows=128, output_rows=128)


def make_evidence(
    *,
    weights: Weights | None = None,
    model_id: str = "acme/tiny",
    shift: float = 0.0,
    spread: float = 0.0,
    kl: float | None = None,
    flips: float = 0.0,
    windows: int = 200,
    tokens: int = 128,
    correct: float | None = None,
    edges: float = 1.0,
    non_finite: Mapping[str, int] | None = None,
    lost: int = 0,
    seed: int = 1,
) -> Evidence:
    """Return what a model might have shown on `windows` + `windows` windows of `tokens` tokens, four to a document.

    `shift` and `spread` (nats) move its losses from those of every other evidence; `kl` (mean nats per token) and
    `flips` (rate) stand in a subject's evidence only. `correct` makes it an accuracy. The first `lost` losses are null.
    """
    weights = make_weights() if weights is None else weights
    base, own = np.random.default_rng(99), np.random.default_rng(seed)
    parts, counts = [], np.zeros(0)
    for start in (0, windows):
        loss = base.normal(3.2, 0.4, windows) + shift + spread * own.standard_t(4, windows)
        values: list[float | None] = loss.tolist()
        rows: dict[str, Any] = {
            "tokens": [tokens] * windows,
            "loss": [None] * lost + values[lost:] if start == 0 else values,
        }
        if kl is not None:
            per_token = own.lognormal(np.log(kl) - 0.9, 1.34, (windows, tokens)) if kl else np.zeros((windows, tokens))
            rows["kl_sum"], rows["kl_max"] = per_token.sum(1).tolist(), per_token.max(1).tolist()
            rows["flips"] = own.binomial(tokens, flips, windows).tolist()
            counts = np.append(counts, per_token)
        if correct is not None:
            hard = base.uniform(size=windows)
            rows["correct"] = (hard + own.normal(0, 0.02, windows) < correct).astype(float).tolist()
        numbers = range(start, start + windows)
        parts.append(
            WindowRows.of(
                [hashlib.sha256(f"w{i}".encode()).hexdigest()[:16] for i in numbers],
                [f"doc-{i // 4}" for i in numbers],
                rows,
            )
        )
    return Evidence(
        metric_kind="ppl_causal" if correct is None else "accuracy",
        model=ModelFacts(
            id=model_id, adapter="hf_causal", model_class="GPT2LMHeadModel", dtype="float32",
            parameters=sum(value.size for value in weights.values()), behaviour={"n_head": 4},
            tokenizer_digest="ab" * 32, tokenizer_size=128,
        ),
        data=DataFacts(
            provider="python_docs", seq_len=tokens + 1, stride=tokens + 1, split="validation",
            requested=[windows, windows], digest=canonical_digest(["text", windows, tokens]),
        ),
        preview=parts[0],
        final=parts[1],
        structure=_structure(weights, non_finite or {}),
        guards={
            "spectral": {"modules": [_spectrum(*item) for item in weights.items()], "unreadable": []},
            "rmt": {"modules": [_edge(name, edges * (1.4 + i / 50)) for i, name in enumerate(weights)]},
        },
        sketches={name: _sketch(value) for name, value in weights.items()},
        kl_histogram=None if kl is None else histogram(counts).tolist(),
        contracts={"loss": "c0ffee", "spectral": "5eed", "rmt": "ed9e"},
        reference_digest="cd" * 32,
        runtime=Runtime(device="cpu", dtype="float32", batch_tokens=4096, threads=2, versions={"torch": "2.13.0"}),
    )  # fmt: skip


def _sketch(weight: NDArray[np.float32]) -> str:
    signs = sign_vectors(max(weight.shape), 16)
    return pack(signs[: weight.shape[0]].T @ weight @ signs[: weight.shape[1]])


def _policy(overrides: Mapping[str, Any] | None = None) -> Policy:
    chosen = {"guards": {"order": ["invariants", "spectral", "rmt"]}, **(overrides or {})}
    return resolve_policy("balanced", "ci", overrides=chosen, relaxed=False)


def make_report(evidence: Evidence, policy: Policy | None = None, **others: Any) -> RunReport:
    """Return the report of a run that showed this. `others`: `edit`, `guards` and entries of `meta`."""
    policy = policy or _policy()
    meta: dict[str, Any] = {
        "run_id": "base-run",
        "created": "2025-06-01T12:00:00+00:00",
        "policy": {**policy.provenance(), "values": policy.values},
        "plugins": {"adapter": "hf_causal"},
        "guard_overhead": {"evaluated": True, "ratio": 1.0, "windows": 32, "skipped": None},
    }
    edit, guards = others.pop("edit", {"name": "checkpoint"}), others.pop("guards", {})
    made = evidence.model_dump(mode="json")
    return RunReport(meta={**meta, **others}, edit=edit, guards=guards, status="success", evidence=made)


def certify(
    baseline: Evidence, subject: Evidence, *, overrides: Mapping[str, Any] | None = None, **others: Any
) -> dict[str, Any]:
    """Return the certificate of two pieces of evidence under tier balanced, profile ci. `others` go to `make_report`."""
    return make_certificate(make_report(subject, _policy(overrides), **others), make_report(baseline))


def _rounded(weights: Weights, step: float = 1 / 127) -> Weights:
    scale = {name: np.abs(value).max() * step for name, value in weights.items()}
    return {name: (np.round(value / scale[name]) * scale[name]).astype(np.float32) for name, value in weights.items()}


def _broken(weights: Weights) -> Weights:
    """Round all weights, shuffle one matrix and blow up another."""
    edited = _rounded(weights)
    shuffled = np.random.default_rng(3).permutation(edited["h.2.mlp.c_fc.weight"].ravel())
    edited["h.2.mlp.c_fc.weight"] = shuffled.reshape(edited["h.2.mlp.c_fc.weight"].shape)
    edited["h.1.attn.c_proj.weight"] = edited["h.1.attn.c_proj.weight"] * np.float32(2.5)
    return edited


def _refused(baseline: Evidence, damaged: Mapping[str, int]) -> dict[str, Any]:
    nothing = WindowRows.of([], [], {"tokens": [], "loss": []})
    found = {"preview": nothing, "final": nothing, "guards": {}, "sketches": {}, "contracts": {}}
    model = baseline.model.model_copy(update={"id": "acme/tiny-broken"})
    subject = baseline.model_copy(update={**found, "model": model, "structure": _structure(make_weights(), damaged)})
    overhead = {"evaluated": False, "ratio": None, "windows": 0, "skipped": "nothing was evaluated"}
    why = "the subject was refused before evaluation because of what its files hold"
    return certify(baseline.model_copy(update=found), subject, refused=why, guard_overhead=overhead)


def _hostile(baseline: Evidence) -> dict[str, Any]:
    """Put HOSTILE wherever a certificate takes text from elsewhere."""
    edited = {**_rounded(make_weights())}
    subject = make_evidence(weights=edited, model_id=HOSTILE, kl=0.003, flips=0.02, shift=0.002, spread=0.01)
    bad = {"code": HOSTILE, "module": HOSTILE, "message": HOSTILE}
    plugin = {
        "passed": False, "evaluated": True, "action": HOSTILE, "message": HOSTILE,
        "metrics": {HOSTILE: HOSTILE, "n": float("nan")}, "warnings": [HOSTILE, {"x": [HOSTILE]}], "errors": [bad],
    }  # fmt: skip
    certificate = certify(
        baseline.model_copy(update={"model": baseline.model.model_copy(update={"id": HOSTILE})}),
        subject,
        guards={HOSTILE: plugin},
        edit={"name": HOSTILE},
        env_flags={HOSTILE: HOSTILE},
    )
    certificate["weights"]["changes"][0]["name"] = HOSTILE
    certificate["weights"]["changes"][0]["matches"] = HOSTILE
    certificate["weights"]["culprits"] = [HOSTILE]
    for row in certificate["spectral"]["facts"]["modules"][:2]:
        row["name"] = row["family"] = HOSTILE
    certificate["spectral"]["errors"] = [bad]
    certificate["verdict"]["reasons"][0].update(code=HOSTILE, tensor=HOSTILE)
    certificate["dataset"]["options"] = {HOSTILE: HOSTILE}
    return certificate


def make_cert(kind: str) -> dict[str, Any]:
    """Return a certificate of one of KINDS, as it would be read from its JSON file."""
    sizes = {"inconclusive": {"windows": 60}, "accuracy": {"correct": 0.7}}.get(kind, {})
    baseline = make_evidence(**sizes)
    harmless = {"weights": _rounded(make_weights()), "model_id": "acme/tiny-int8"}
    if kind == "self":
        return certify(baseline, make_evidence(kl=0.0))
    if kind == "pass":
        return certify(baseline, make_evidence(**harmless, kl=0.003, flips=0.022, shift=0.003, spread=0.01))
    if kind == "fail":
        broken = {"weights": _broken(make_weights()), "model_id": "acme/tiny-broken", "edges": 1.3}
        return certify(baseline, make_evidence(**broken, kl=0.31, flips=0.24, shift=0.16, spread=0.12))
    if kind == "inconclusive":
        return certify(baseline, make_evidence(**harmless, **sizes, kl=0.04, flips=0.09, shift=0.105, spread=0.06))
    if kind == "accuracy":
        return certify(baseline, make_evidence(**harmless, correct=0.695))
    if kind == "non_finite":
        return certify(baseline, make_evidence(**harmless, kl=0.003, flips=0.02, lost=3))
    if kind == "refused":
        return _refused(baseline, {"h.2.mlp.c_fc.weight": 7})
    if kind == "hostile":
        return _hostile(baseline)
    raise ValueError(f"got kind {kind!r}; expected one of {', '.join(KINDS)}")

"""The typed form of `evaluation.cert.json`, version v1: the single source of its JSON Schema.

A section is either recorded (what was measured or configured: rows, tables, facts, names) or derived from recorded ones
by `make.derive`. `verify` derives again and compares. Numbers that were measured and are not finite are null.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from invarlock.evidence.model import DataFacts, ModelFacts, Runtime, Structure

__all__ = [
    "SCHEMA_VERSION",
    "Certificate",
    "Gate",
    "GateDecision",
    "GuardSection",
    "PairedRows",
    "Reason",
    "Validation",
    "Verdict",
    "json_schema",
]

SCHEMA_VERSION = "v1"
GateDecision = Literal["pass", "fail", "warn", "inconclusive", "not_evaluated", "off"]
Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Pair = tuple[float | None, float | None]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gate(_Section):
    """One check. `basis` says what is held against the limit: an interval's end, a point estimate, a verdict."""

    name: str
    measured: float | str | None
    limit: float | str | None
    basis: str
    decision: GateDecision
    reason: str


class Reason(_Section):
    """Why the verdict is what it is."""

    code: str
    message: str
    gate: str
    tensor: str | None = None


class Verdict(_Section):
    status: Status
    reasons: list[Reason]


class Validation(_Section):
    """Booleans that readers in the field know; one that was not evaluated is absent."""

    primary_metric_acceptable: bool | None = None
    primary_metric_tail_acceptable: bool | None = None
    preview_final_drift_acceptable: bool | None = None
    guard_overhead_acceptable: bool | None = None
    invariants_pass: bool | None = None
    spectral_stable: bool | None = None
    rmt_stable: bool | None = None
    hysteresis_applied: bool | None = None
    moe_observed: bool | None = None
    moe_identity_ok: bool | None = None


class PairedRows(_Section):
    """Per-window columns of one split, both sides side by side. Losses in nats per scored token."""

    window_ids: list[str]
    document_ids: list[str]
    tokens: list[int]
    baseline_loss: list[float | None]
    subject_loss: list[float | None]
    kl_sum: list[float | None] | None = None
    kl_max: list[float | None] | None = None
    kl_exact_sum: list[float | None] | None = None
    flips: list[int] | None = None
    baseline_correct: list[float] | None = None
    subject_correct: list[float] | None = None


class Windows(_Section):
    preview: int
    final: int
    seed: int
    stats: dict[str, float | int | bool | None]


class Dataset(_Section):
    provider: str
    options: dict[str, Any]
    seq_len: int
    stride: int | None
    split: str | None
    windows: Windows


class PrimaryMetric(_Section):
    """`ci` is the interval of the log ratio (or of the difference in points), `display_ci` its exponential."""

    kind: str
    unit: str
    direction: Literal["lower", "higher"]
    preview: float | None
    final: float | None
    baseline_preview: float | None
    baseline_final: float | None
    ratio_vs_baseline: float | None
    log_ratio: float | None
    delta_pp: float | None = None
    ci: Pair
    display_ci: Pair
    ci_level: float
    method: str
    replicates: int
    seed: int
    clusters: int
    degenerate: bool
    std_error: float | None
    gating_basis: str
    limit: float | None
    hysteresis: float | None
    decision: Literal["pass", "fail", "inconclusive", "not_evaluated"]
    reason: str
    hysteresis_applied: bool
    minimum_detectable_effect: float | None = None
    windows_needed: int | None = None
    mcnemar_p: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None


class GuardSection(_Section):
    """One guard: the recorded `facts` of both sides (`structure` holds those of `invariants`), and the verdict on them."""

    evaluated: bool
    passed: bool
    action: str
    message: str
    facts: dict[str, Any] | None
    policy: dict[str, Any]
    metrics: dict[str, Any]
    warnings: list[dict[str, Any]]
    errors: list[dict[str, Any]]


class PluginGuardSection(_Section):
    """A plugin guard's own result, recorded as it came."""

    passed: bool
    evaluated: bool
    action: str
    message: str
    metrics: dict[str, Any]
    warnings: list[Any]
    errors: list[Any]


class StructureSection(_Section):
    """What `invariants` compares, for both sides."""

    baseline: Structure
    subject: Structure
    baseline_behaviour: dict[str, Any]
    subject_behaviour: dict[str, Any]
    baseline_tokenizer: tuple[str | None, int | None]
    subject_tokenizer: tuple[str | None, int | None]


class Divergence(_Section):
    """Of the subject's next-token distributions from the baseline's, nats per token, coarsened (a lower bound)."""

    kl_mean: float | None
    kl_ci: Pair
    kl_q50: float | None
    kl_q99: float | None
    kl_max: float | None
    kl_exact_mean: float | None  # over whole distributions, on the few windows for which the baseline's were kept
    kl_coarsened_there: float | None  # the coarsened figure on those windows, for comparison
    kl_exact_windows: int
    flip_rate: float | None
    flip_ci: Pair
    tokens: int
    histogram: list[int]
    histogram_edges: str
    lower_bound: bool = True
    reference_matches: bool


class Tail(_Section):
    windows: int
    q50: float | None
    q90: float | None
    q95: float | None
    q99: float | None
    max: float | None
    tail_mass: float | None
    epsilon: float
    quantile: float
    value: float | None
    ci: Pair
    status: str
    reason: str


class Weights(_Section):
    """Digests of both checkpoints' tensors, and which weights changed most (sketched)."""

    baseline_digest: str
    subject_digest: str
    identical: bool
    changes: list[dict[str, Any]]
    culprits: list[str]
    uniform: bool


class Overhead(_Section):
    """The metric with guards attached over the metric without, on the same windows and weights."""

    evaluated: bool
    ratio: float | None
    windows: int
    skipped: str | None = None


class Meta(_Section):
    created: str
    tool: str
    tool_version: str
    profile: str
    tier: str
    intent: str
    device: str
    adapter: str
    baseline_model: ModelFacts
    subject_model: ModelFacts


class BaselineRef(_Section):
    run_id: str | None
    model_id: str
    evidence_digest: str | None
    reused: bool


class Provenance(_Section):
    provider_digest: str
    env_flags: dict[str, str]
    versions: dict[str, str]
    runtime: dict[str, Runtime]
    contracts: dict[str, dict[str, str]]
    evidence_digests: dict[str, str]


class Confidence(_Section):
    label: Literal["High", "Medium", "Low"]
    basis: str


class Certificate(_Section):
    """One certificate."""

    schema_version: Literal["v1"]
    run_id: str
    meta: Meta
    dataset: Dataset
    primary_metric: PrimaryMetric
    artifacts: dict[str, Any]
    plugins: dict[str, Any]
    validation: Validation
    gates: list[Gate]
    auto: dict[str, Any]
    edit: dict[str, Any]
    baseline_ref: BaselineRef
    structure: StructureSection
    invariants: GuardSection
    spectral: GuardSection | None = None
    rmt: GuardSection | None = None
    variance: GuardSection | None = None
    plugin_guards: dict[str, PluginGuardSection] = Field(default_factory=dict)
    divergence: Divergence | None = None
    primary_metric_tail: Tail | None = None
    guard_overhead: Overhead
    system_overhead: dict[str, Any] = Field(default_factory=dict)
    telemetry: dict[str, Any] = Field(default_factory=dict)
    resolved_policy: dict[str, Any]
    policy_provenance: dict[str, Any]
    policy_digest: str
    provenance: Provenance
    data: DataFacts
    weights: Weights
    evaluation_windows: dict[Literal["preview", "final"], PairedRows]
    verdict: Verdict
    confidence: Confidence

    def data_rows(self) -> int:
        """Return how many windows were recorded."""
        return sum(len(rows.window_ids) for rows in self.evaluation_windows.values())


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a certificate."""
    schema = Certificate.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "InvarLock certificate v1", **schema}

"""The typed form of `evaluation.cert.json`, version v1: the single source of its JSON Schema.

`Recorded` is what was measured or configured: rows, tables, facts, names. `Certificate` extends it by what follows, so
that reading a certificate as `Recorded` and deriving again must give the same certificate. A section of both kinds is
split in the same way (`WeightsRecord`, `Weights`). Numbers that were measured and are not finite are null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from invarlock.evidence.model import DataFacts, GlanceFacts, ModelFacts, Runtime, Structure
from invarlock.evidence.plain import ABSENT, Plain
from invarlock.evidence.rows import PairedRows
from invarlock.guards.boundary import BUILT_IN_GUARDS

__all__ = [
    "SCHEMA_VERSION",
    "BaselineRecord",
    "BaselineRef",
    "Certificate",
    "Confidence",
    "Coverage",
    "Dataset",
    "Divergence",
    "DivergenceRecord",
    "ExpertsRecord",
    "Gate",
    "GateDecision",
    "GuardRecord",
    "GuardSection",
    "Look",
    "Looks",
    "LooksRecord",
    "Meta",
    "MetricChoice",
    "Overhead",
    "Pair",
    "NoiseDistance",
    "NoiseRecord",
    "PairedRows",
    "PeaksRecord",
    "PluginGuardSection",
    "PrimaryMetric",
    "Provenance",
    "Reason",
    "Recorded",
    "SliceSection",
    "Split",
    "Status",
    "StructureSection",
    "Tail",
    "Validation",
    "Verdict",
    "Weights",
    "WeightsRecord",
    "Windows",
    "json_schema",
]

SCHEMA_VERSION: Literal["v1"] = "v1"
GateDecision = Literal["pass", "fail", "warn", "inconclusive", "not_evaluated", "off"]
Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Pair = tuple[float | None, float | None]
Split = Literal["preview", "final"]
_RECORD = ConfigDict(extra="ignore")  # what follows from it stands in the same section
_WHOLE = ConfigDict(extra="forbid")


class Gate(Plain):
    """One check. `basis` says what is held against the limit: an interval's end, a point estimate, a verdict."""

    name: str
    measured: float | str | None
    limit: float | str | None
    basis: str
    decision: GateDecision
    reason: str


class Reason(Plain):
    """Why the verdict is what it is."""

    code: str
    message: str
    gate: str
    tensor: str | None = None


class Verdict(Plain):
    status: Status
    reasons: list[Reason]


_Said = Annotated[bool | None, ABSENT]


class Validation(Plain):
    """Booleans that readers in the field know; one that was not evaluated is absent."""

    primary_metric_acceptable: _Said = None
    primary_metric_tail_acceptable: _Said = None
    preview_final_drift_acceptable: _Said = None
    guard_overhead_acceptable: _Said = None
    invariants_pass: _Said = None
    spectral_stable: _Said = None
    rmt_stable: _Said = None
    hysteresis_applied: _Said = None
    moe_observed: _Said = None
    moe_identity_ok: _Said = None


class Windows(Plain):
    preview: int
    final: int
    seed: int
    stats: dict[str, float | int | bool | None | dict[str, dict[str, int]]]


class Dataset(Plain):
    provider: str
    options: dict[str, Any]
    seq_len: int
    stride: int | None
    split: str | None
    windows: Windows


class MetricChoice(Plain):
    """Which metric; `reason` is recorded where nothing was evaluated, and says why not."""

    model_config = _RECORD

    kind: str
    reason: str = ""


class PrimaryMetric(MetricChoice):
    """`ci` is the interval of the log ratio (or of the difference in points), `display_ci` its exponential."""

    model_config = _WHOLE

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
    documents_needed: Annotated[int | None, ABSENT] = None  # in all, of this kind
    mcnemar_p: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None


class GuardRecord(Plain):
    """The measurements of both sides, as one built-in guard paired them (`structure` holds those of `invariants`)."""

    model_config = _RECORD

    facts: dict[str, Any] | None


class GuardSection(GuardRecord):
    """One guard: the recorded `facts` of both sides and the verdict on them."""

    model_config = _WHOLE

    evaluated: bool
    passed: bool
    action: str
    message: str
    policy: dict[str, Any]
    metrics: dict[str, Any]
    warnings: list[dict[str, Any]]
    errors: list[dict[str, Any]]


class PluginGuardSection(Plain):
    """A plugin guard's own result, recorded as it came."""

    passed: bool
    evaluated: bool
    action: str
    message: str
    metrics: dict[str, Any]
    warnings: list[Any]
    errors: list[Any]


class StructureSection(Plain):
    """What `invariants` compares, for both sides."""

    baseline: Structure
    subject: Structure
    baseline_behaviour: dict[str, Any]
    subject_behaviour: dict[str, Any]
    baseline_tokenizer: tuple[str | None, int | None]
    subject_tokenizer: tuple[str | None, int | None]
    baseline_usage: Annotated[dict[str, Any] | None, ABSENT] = None
    subject_usage: Annotated[dict[str, Any] | None, ABSENT] = None


class DivergenceRecord(Plain):
    """The counts of KL values per token, and whether they were measured against this baseline."""

    model_config = _RECORD

    histogram: list[int]
    reference_matches: bool
    unbiased: Annotated[bool | None, ABSENT] = None  # absent: a lower bound, of coarsened distributions


class Divergence(DivergenceRecord):
    """Of the subject's next-token distributions from the baseline's, nats per token: estimated without bias, or of
    coarsened distributions (a lower bound)."""

    model_config = _WHOLE

    kl_mean: float | None
    kl_ci: Pair
    kl_q50: float | None
    kl_q99: float | None
    kl_max: float | None
    kl_exact_mean: float | None  # over whole distributions, on the few windows for which the baseline's were kept
    kl_coarsened_there: float | None  # the estimate on those windows, for comparison
    kl_exact_windows: int
    flip_rate: float | None
    flip_ci: Pair
    tokens: int
    histogram_edges: str
    lower_bound: bool = True


class Tail(Plain):
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
    status: GateDecision
    reason: str


class SliceSection(Plain):
    """One kind of text among several: its figures, and what its gates decided together."""

    provider: str
    windows: int
    documents: int
    tokens: int
    decision: Literal["pass", "fail", "inconclusive"]
    primary_metric: PrimaryMetric
    primary_metric_tail: Tail | None
    divergence: Divergence | None


class WeightsRecord(Plain):
    """How much each weight changed (sketched)."""

    model_config = _RECORD

    changes: list[dict[str, Any]]


class Weights(WeightsRecord):
    """Digests of both checkpoints' tensors, and which weights changed most."""

    model_config = _WHOLE

    baseline_digest: str
    subject_digest: str
    identical: bool
    culprits: list[str]
    uniform: bool


class Overhead(Plain):
    """The metric with guards attached over the metric without, on the same windows and weights."""

    evaluated: bool
    ratio: float | None
    windows: int
    skipped: str | None = None


class Meta(Plain):
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


class PeaksRecord(Plain):
    """The largest magnitude of each block's output on the two sides, in the type that they were computed in."""

    baseline: dict[str, float | None]
    subject: dict[str, float | None]


class LooksRecord(Plain):
    """How much text was planned, and how many windows of preview and final each look reached; `glance`: before them."""

    model_config = _RECORD

    planned_documents: int
    planned_windows: tuple[int, int]
    planned_tokens: int
    reached: list[tuple[int, int]]
    glance: Annotated[GlanceFacts | None, ABSENT] = None

    @property
    def ended_at_glance(self) -> bool:
        """Whether no look was made after the glance."""
        return self.glance is not None and self.reached == [self.glance.windows]


class Look(Plain):
    """One look at the evidence so far; `level` is one-sided, for PASS and FAIL each. `decision`: all gates together."""

    documents: int
    windows: tuple[int, int]
    tokens: int
    level: float
    decision: GateDecision


class Looks(LooksRecord):
    """The looks that were made, the last of which decided, or the glance alone where it did; `share_used` is of the planned
    tokens."""

    model_config = _WHOLE

    made: list[Look]
    share_used: float


class NoiseRecord(Plain):
    """What the baseline showed against itself, computed in another way: `name` says what was changed, from `usual` to
    `other`."""

    name: str
    usual: str
    other: str
    windows: int
    documents: int
    tokens: int
    log_ratio: float | None
    std_error: float | None
    kl_mean: float | None
    flip_rate: float | None


class NoiseDistance(Plain):
    """How far the log ratio lies beyond the `floor`, the largest of the baseline against itself (by changing `name`), in
    standard errors of both: (|x| - floor) / sqrt(se^2 + se_floor^2). It decides nothing."""

    name: str
    floor: float
    floor_error: float
    distance: float


class ExpertsRecord(Plain):
    """How many tokens were routed to each expert on the two sides, by the block that holds them."""

    baseline: dict[str, list[int]]
    subject: dict[str, list[int]]


class Coverage(Plain):
    """What the text would have met with a chance of 97.5 %: the smallest share of tokens, and of documents, that a fault
    must touch."""

    tokens: int
    smallest_share: float
    documents: int
    smallest_share_of_documents: float


class BaselineRecord(Plain):
    model_config = _RECORD

    run_id: str | None
    reused: bool
    pack: Annotated[str | None, ABSENT] = None  # the address of the pack that it was read from


class BaselineRef(BaselineRecord):
    model_config = _WHOLE

    model_id: str
    evidence_digest: str | None


class Provenance(Plain):
    provider_digest: str
    env_flags: dict[str, str]
    versions: dict[str, str]
    runtime: dict[str, Runtime]
    contracts: dict[str, dict[str, str]]
    evidence_digests: dict[str, str]


class Confidence(Plain):
    label: Literal["High", "Medium", "Low"]
    basis: str


class Recorded(Plain):
    """The part of a certificate that was measured or configured; everything else follows from it by `derivation`."""

    model_config = _RECORD

    schema_version: Literal["v1"]
    derivation: Annotated[int | None, ABSENT] = None  # absent is 1
    meta: Meta
    primary_metric: MetricChoice
    plugins: dict[str, Any]
    auto: dict[str, Any]
    edit: dict[str, Any]
    baseline_ref: BaselineRecord
    structure: StructureSection
    spectral: GuardRecord | None = None
    rmt: GuardRecord | None = None
    variance: GuardRecord | None = None
    plugin_guards: dict[str, PluginGuardSection] = Field(default_factory=dict)
    divergence: DivergenceRecord | None = None
    guard_overhead: Overhead
    system_overhead: dict[str, Any] = Field(default_factory=dict)
    telemetry: dict[str, Any] = Field(default_factory=dict)
    resolved_policy: dict[str, Any]
    policy_provenance: dict[str, Any]
    provenance: Provenance
    data: DataFacts
    weights: WeightsRecord
    evaluation_windows: dict[Split, PairedRows]
    #: what was said as it was made: data left out, settings overridden
    notes: Annotated[list[str] | None, ABSENT] = None
    activation_peaks: Annotated[PeaksRecord | None, ABSENT] = None
    looks: Annotated[LooksRecord | None, ABSENT] = None  # None: all of the text, in one look
    experts: Annotated[ExpertsRecord | None, ABSENT] = None
    layers_paired: Annotated[dict[str, str] | None, ABSENT] = None  # of a pruned subject: its layer, the baseline's
    noise_floor: Annotated[list[NoiseRecord] | None, ABSENT] = None

    @property
    def refused(self) -> str | None:
        """Why nothing was evaluated; None where there are rows."""
        return None if any(rows.window_ids for rows in self.evaluation_windows.values()) else self.primary_metric.reason

    @property
    def guard_facts(self) -> dict[str, dict[str, Any] | None]:
        """The paired measurements of the built-in guards that have a record."""
        records = {name: getattr(self, name, None) for name in BUILT_IN_GUARDS[1:]}
        return {name: record.facts for name, record in records.items() if record is not None}


class Certificate(Recorded):
    """One certificate."""

    model_config = _WHOLE

    run_id: str
    dataset: Dataset
    primary_metric: PrimaryMetric
    artifacts: dict[str, Any]
    validation: Validation
    gates: list[Gate]
    baseline_ref: BaselineRef
    invariants: GuardSection
    spectral: GuardSection | None = None
    rmt: GuardSection | None = None
    variance: GuardSection | None = None
    divergence: Divergence | None = None
    primary_metric_tail: Tail | None = None
    looks: Annotated[Looks | None, ABSENT] = None
    coverage: Annotated[Coverage | None, ABSENT] = None
    policy_digest: str
    weights: Weights
    verdict: Verdict
    confidence: Confidence
    slices: Annotated[dict[str, SliceSection] | None, ABSENT] = None
    noise_distance: Annotated[NoiseDistance | None, ABSENT] = None

    @property
    def guards(self) -> dict[str, GuardSection]:
        """The sections of the built-in guards that there are, by name."""
        sections = {name: getattr(self, name) for name in BUILT_IN_GUARDS}
        return {name: section for name, section in sections.items() if section is not None}

    def data_rows(self) -> int:
        """Return how many windows were recorded."""
        return sum(len(rows.window_ids) for rows in self.evaluation_windows.values())


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a certificate."""
    schema = Certificate.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "InvarLock certificate v1", **schema}

"""The typed form of a piece of evidence. Arrays per token live beside it; everything a comparison needs is here.

A number that was measured and is not finite is stored as None: JSON has no NaN, and None fails every gate.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from invarlock.evidence.plain import ABSENT, Plain, canonical_digest, finite_or_none
from invarlock.evidence.rows import WindowRows

__all__ = [
    "DataFacts",
    "EngineFacts",
    "Evidence",
    "GlanceFacts",
    "ModelFacts",
    "Plan",
    "Runtime",
    "Structure",
    "TensorFacts",
    "TokenFile",
    "WindowRows",
    "canonical_digest",
    "finite_or_none",
]


class TensorFacts(Plain):
    """One stored tensor: `dtype` in safetensors' spelling (F32, BF16, ...), `digest` over dtype, shape and bytes."""

    name: str
    shape: list[int]
    dtype: str
    digest: str
    non_finite: int = 0


class Structure(Plain):
    """The tensors of a checkpoint or live model, under the architecture's own names."""

    source: Literal["file", "model"]
    tensors: list[TensorFacts]
    missing: list[str] = Field(default_factory=list)  # expected by the architecture, absent here
    unexpected: list[str] = Field(default_factory=list)  # present here, unknown to the architecture
    misshapen: list[str] = Field(default_factory=list)  # "name: got [..], expected [..]"
    tied: list[list[str]] = Field(default_factory=list)  # [name, the name that it shares its tensor with]
    norms: list[str] = Field(default_factory=list)  # normalisation weights
    buffers: list[str] = Field(default_factory=list)  # tensors that are no parameters: infinities may belong there
    embedding_rows: int | None = None
    output_rows: int | None = None

    def weights_digest(self) -> str:
        """Return SHA-256 over the tensors' names, shapes and digests, whatever their order or files."""
        rows = sorted([t.name, *map(str, t.shape), t.digest] for t in self.tensors)
        return canonical_digest(rows)


class ModelFacts(Plain):
    """Which model this is. `behaviour` holds the configuration values that change what it computes, `usage` what its
    files say of how it is used; evidence of earlier releases has none."""

    id: str
    adapter: str
    model_class: str | None = None
    parameters: int
    dtype: str | None = None
    describe: dict[str, Any] = Field(default_factory=dict)
    behaviour: dict[str, Any] = Field(default_factory=dict)
    tokenizer_digest: str | None = None
    tokenizer_size: int | None = None
    usage: Annotated[dict[str, Any] | None, ABSENT] = None


class DataFacts(Plain):
    """Where the windows came from; `digest` covers ids, documents and tokens. `prefix` and `suffix` are the special
    tokens around every window, not scored; evidence of earlier releases, which had none, does not say. `slices`: the
    same of each kind of text, by name, where there are several. `vocabulary_seen`: how many ids the windows hold (`seen`)
    of how many (`size`), the `share`, and `unseen_mass` (`stats.coverage`). `texts`: a digest of the documents that windows
    were cut from, whole; `remarks`: what a reader should know of them."""

    provider: str
    options: dict[str, Any] = Field(default_factory=dict)
    seq_len: int
    stride: int | None = None
    seed: int = 42
    split: str | None = None
    requested: list[int]
    digest: str
    reused: bool = False
    prefix: Annotated[list[int] | None, ABSENT] = None
    suffix: Annotated[list[int] | None, ABSENT] = None
    slices: Annotated[dict[str, DataFacts] | None, ABSENT] = None
    vocabulary_seen: Annotated[dict[str, float] | None, ABSENT] = None
    texts: Annotated[str | None, ABSENT] = None
    remarks: Annotated[list[str] | None, ABSENT] = None


class GlanceFacts(Plain):
    """The first documents, on which a subject can only fail: their windows of preview and final, and the scored tokens of
    the largest document of the plan."""

    windows: tuple[int, int]
    largest: int


class Plan(Plain):
    """How much text was planned (documents, windows of preview and final, scored tokens), and how many windows of each
    split were measured look by look so far, a glance before them where there was one. The digest of the data covers all
    that was planned."""

    documents: int
    windows: tuple[int, int]
    tokens: int
    reached: list[tuple[int, int]]
    glance: Annotated[GlanceFacts | None, ABSENT] = None


class TokenFile(Plain):
    """The file beside the report that holds per-token arrays."""

    name: str
    sha256: str
    bytes_per_token: float


class EngineFacts(Plain):
    """A served engine that scored the windows: who it is, and how many ids it tells of each token's distribution."""

    kind: str
    version: str | None
    host: str
    model: str
    top: int
    whole_vocabulary: bool
    repeat_difference: float | None  # nats: the largest between two answers to one question


class Runtime(Plain):
    """What the numbers depend on besides model and text. `device` is `served` where an engine computed."""

    device: str
    dtype: str
    batch_tokens: int
    threads: int
    versions: dict[str, str]
    engine: Annotated[EngineFacts | None, ABSENT] = None


class Evidence(Plain):
    """What one model showed."""

    format: Literal["invarlock-evidence-v1"] = "invarlock-evidence-v1"
    metric_kind: str
    model: ModelFacts
    data: DataFacts
    preview: WindowRows
    final: WindowRows
    structure: Structure
    guards: dict[str, dict[str, Any]] = Field(default_factory=dict)
    sketches: dict[str, Any] = Field(default_factory=dict)
    kl_histogram: list[int] | None = None
    contracts: dict[str, str] = Field(default_factory=dict)
    reference_digest: str | None = None  # of the baseline's token file: this side's own, or the one it was held against
    token_file: TokenFile | None = None
    kl_unbiased: Annotated[bool | None, ABSENT] = None  # absent: a lower bound, of coarsened distributions
    plan: Annotated[Plan | None, ABSENT] = None  # None: all of the text was measured, in one look
    peaks: Annotated[dict[str, float | None] | None, ABSENT] = None  # largest |output| of each block, over all windows
    experts: Annotated[dict[str, list[int]] | None, ABSENT] = None  # tokens routed to each expert, by block
    runtime: Runtime

    def digest(self) -> str:
        """Return SHA-256 over all that was recorded."""
        return canonical_digest(self.model_dump(mode="json"))

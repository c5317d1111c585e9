"""The limits of a resolved policy, typed. Their values stand in the tiers alone; here is what there is to set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "AccuracyLimits",
    "Band",
    "Bootstrap",
    "DivergenceLimits",
    "Limits",
    "Mode",
    "OverheadLimits",
    "RatioLimits",
    "Sample",
    "TailLimits",
]

#: YAML reads a bare `off` as false
Mode = Annotated[Literal["off", "warn", "fail"], BeforeValidator(lambda mode: "off" if mode is False else mode)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True)


class RatioLimits(_Section):
    """Of the perplexity ratio: `limit` above, `min` below where it is set; `hysteresis` withholds FAIL, never PASS."""

    limit: float
    hysteresis: float
    min: float | None = None
    ci_level: float


class Band(_Section):
    min: float
    max: float


class TailLimits(_Section):
    """Of the differences of log-loss per window (nats)."""

    mode: Mode
    min_windows: int
    quantile: float
    quantile_max: float | None
    epsilon: float
    mass_max: float | None = None


class DivergenceLimits(_Section):
    """`kl_max` in nats per token, `flip_max` a share of the tokens."""

    mode: Mode
    kl_max: float
    flip_max: float


class AccuracyLimits(_Section):
    """`floor_pp` in percentage points."""

    floor_pp: float
    min_examples: int


class OverheadLimits(_Section):
    required: bool
    max_ratio: float


class Sample(_Section):
    preview: int
    final: int
    min_tokens: int
    min_documents: int = 0  # effective ones; the first versions of the tiers had no floor
    early_stop: bool = False  # decide look by look
    early_documents: int = 60  # that a look before the last one takes at least
    shortfall: Literal["stop", "warn"]


class Bootstrap(_Section):
    replicates: Annotated[int, Field(le=1_000_000)]
    seed: int
    bca: bool = True


class Limits(_Section):
    """What each gate is held to. `metrics` has every section as it stands in the tiers; a gate added later reads its own
    there, and does not apply where an older version of the tiers has none."""

    metrics: dict[str, dict[str, Any]]
    ratio: RatioLimits = Field(validation_alias=AliasPath("metrics", "pm_ratio"))
    drift: Band = Field(validation_alias=AliasPath("metrics", "drift"))
    tail: TailLimits = Field(validation_alias=AliasPath("metrics", "pm_tail"))
    divergence: DivergenceLimits = Field(validation_alias=AliasPath("metrics", "divergence"))
    accuracy: AccuracyLimits = Field(validation_alias=AliasPath("metrics", "accuracy"))
    overhead: OverheadLimits = Field(validation_alias=AliasPath("metrics", "guard_overhead"))
    sample: Sample
    bootstrap: Bootstrap
    guards: dict[str, Any]

    @property
    def order(self) -> list[str]:
        """The guards asked for, in the order in which they run."""
        return list(self.guards["order"])

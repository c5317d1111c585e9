"""The forms of what `--json` prints: one model an envelope, the source of the schemas in `data/envelopes.schema.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from invarlock.certificate.schema import Verdict

__all__ = ["ENVELOPES", "envelope_schemas"]


def _envelope(name: str, **fields: Any) -> type[BaseModel]:
    strict = ConfigDict(extra="forbid")
    annotated: dict[str, Any] = {key: (kind, ...) for key, kind in fields.items()}
    model: type[BaseModel] = create_model(name, __config__=strict, **annotated)
    return model


_Summary = _envelope("VerifySummary", ok=bool, passed=int, failed=int)
_Count = _envelope("CertificateCount", count=int)
_Exit = _envelope("Resolution", exit_code=Literal[0, 1, 2, 3, 4])
_Finding = _envelope("DoctorFinding", code=str, level=Literal["ERROR", "WARNING", "NOTE"], message=str)
_Levels = _envelope("DoctorSummary", error=int, warning=int, note=int)

#: format_version -> what such an object holds
ENVELOPES: dict[str, type[BaseModel]] = {
    "certify-v1": _envelope(
        "Certify",
        format_version=Literal["certify-v1"],
        verdict=Verdict,
        primary_metric=dict[str, Any],
        files=dict[str, str],
        source_report=str | None,
        edited_report=str | None,
        timings=dict[str, float],
        exit_code=Literal[0, 1, 4],
    ),
    "run-v1": _envelope(
        "Run",
        format_version=Literal["run-v1"],
        status=Literal["success", "rollback", "failed"],
        reason=str | None,
        error=str | None,
        primary_metric=dict[str, Any] | None,
        guards=dict[str, bool],
        attempts=list[dict[str, Any]] | None,
        report=str | None,
        model=str | None,
        timings=dict[str, float],
        exit_code=Literal[0, 1],
    ),
    "verify-v1": _envelope(
        "Verify",
        format_version=Literal["verify-v1"],
        summary=_Summary,
        certificate=_Count,
        results=list[dict[str, Any]],
        resolution=_Exit,
        component=Literal["verify"],
        ts=str,
    ),
    "plugins-v1": _envelope(
        "Plugins",
        format_version=Literal["plugins-v1"],
        component=Literal["plugins"],
        category=str,
        discovery=bool,
        items=list[dict[str, Any]],
        ts=float,
    ),
    "doctor-v1": _envelope(
        "Doctor",
        format_version=Literal["doctor-v1"],
        component=Literal["doctor"],
        summary=_Levels,
        findings=list[_Finding],  # type: ignore[valid-type]  # a model made a few lines above
        resolution=_Exit,
        ts=float,
    ),
    "calibration-v1": _envelope(
        "Calibration",
        format_version=Literal["calibration-v1"],
        sweep=str,
        runs=int,
        guards=dict[str, Any],
        file=str,
    ),
    "version": _envelope("Version", version=str, schema_version=Literal["v1"], python=str),
}


def envelope_schemas() -> dict[str, Any]:
    """Return one JSON Schema (draft 2020-12) for each envelope, under its format version."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {name: {"$schema": dialect, **model.model_json_schema()} for name, model in ENVELOPES.items()}

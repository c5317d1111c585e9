"""The forms of what `--json` prints: one model an envelope, the source of the schemas in `data/envelopes.schema.json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from invarlock.certificate.schema import Verdict

__all__ = ["ENVELOPES", "envelope_schemas"]

_Record = dict[str, Any]
_EXIT = {"exit_code": Literal[0, 1, 2, 3, 4]}
#: format_version -> its other fields; what is printed without one stands under the command's name
_FIELDS: dict[str, dict[str, Any]] = {
    "certify-v1": {
        "verdict": Verdict,
        "primary_metric": _Record,
        "files": dict[str, str],
        "source_report": str | None,
        "edited_report": str | None,
        "timings": dict[str, float],
        "exit_code": Literal[0, 1, 4],
    },
    "run-v1": {
        "status": Literal["success", "rollback", "failed"],
        "reason": str | None,
        "error": str | None,
        "verdict": Verdict | None,
        "primary_metric": _Record | None,
        "guards": dict[str, bool],
        "attempts": list[_Record] | None,
        "report": str | None,
        "model": str | None,
        "timings": dict[str, float],
        "exit_code": Literal[0, 1],
    },
    "verify-v1": {
        "summary": {"ok": bool, "passed": int, "failed": int},
        "certificate": {"count": int},
        "results": list[_Record],
        "resolution": _EXIT,
        "component": Literal["verify"],
        "ts": str,
    },
    "plugins-v1": {
        "component": Literal["plugins"],
        "category": str,
        "discovery": bool,
        "items": list[_Record],
        "ts": float,
    },
    "doctor-v1": {
        "component": Literal["doctor"],
        "summary": {"error": int, "warning": int, "note": int},
        "findings": [{"code": str, "level": Literal["ERROR", "WARNING", "NOTE"], "message": str}],
        "resolution": _EXIT,
        "ts": float,
    },
    "calibration-v1": {"sweep": str, "runs": int, "guards": _Record, "file": str},
    "version": {"version": str, "schema_version": Literal["v1"], "python": str},
}


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    """Return a model that takes these fields and no others; a mapping is one within it, a list of one a list of them."""

    def kind(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return list[kind(key, value[0])]  # type: ignore[misc]  # a type made here
        return _model(name + key.capitalize(), value) if isinstance(value, dict) else value

    made: dict[str, Any] = {key: (kind(key, value), ...) for key, value in fields.items()}
    model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **made)
    return model


#: format_version -> what such an object holds
ENVELOPES = {
    form: _model(
        form.partition("-")[0].capitalize(), {"format_version": Literal[form], **fields} if "-" in form else fields
    )
    for form, fields in _FIELDS.items()
}


def envelope_schemas() -> dict[str, Any]:
    """Return one JSON Schema (draft 2020-12) for each envelope, under its format version."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {name: {"$schema": dialect, **model.model_json_schema()} for name, model in ENVELOPES.items()}

"""What every stored form is made of: frozen models with a JSON form, one spelling of numbers, one digest."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final

import rfc8785
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

__all__ = ["ABSENT", "Plain", "canonical", "canonical_digest", "finite_or_none", "is_canonical"]

_EXACT = 2**53  # whole floats from here on stay floats: not every whole number is one


def canonical(value: Any) -> Any:
    """Return JSON data in its one spelling: a whole float as an integer (1.0 is 1, -0.0 is 0; RFC 8785), NaN and
    infinities as None."""
    if type(value) is float:
        return int(value) if value.is_integer() and abs(value) < _EXACT else value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_canonical(number: object) -> bool:
    """Say whether a number is spelled as `canonical` spells it; all that is no float is."""
    return type(number) is not float or type(canonical(number)) is float


def canonical_digest(value: object) -> str:
    """Return SHA-256 (hex) over the RFC 8785 canonical JSON of `value`."""
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()  # type: ignore[arg-type]  # what is no JSON raises


def finite_or_none(value: float) -> float | None:
    """Return the float, or None where it is NaN or infinite."""
    number = float(value)
    return number if math.isfinite(number) else None


#: marks a field that is left out of the JSON form where it is None. Every field added to a stored form carries it, so
#: that what was recorded before keeps its digest.
ABSENT: Final = "absent where None"


class Plain(BaseModel):
    """Frozen data with a JSON form; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_serializer(mode="wrap")
    def _leave_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = dump(self)
        for name in _absent(type(self)):
            if data.get(name, ABSENT) is None:
                del data[name]
        return data


@functools.cache
def _absent(form: type[BaseModel]) -> tuple[str, ...]:
    return tuple(name for name, field in form.model_fields.items() if ABSENT in field.metadata)

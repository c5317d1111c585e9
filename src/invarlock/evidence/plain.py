"""What every stored form is made of: frozen models with a JSON form, one spelling of numbers, one digest."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any, Final

import rfc8785
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from invarlock.core.files import plain

__all__ = ["ABSENT", "Plain", "canonical", "canonical_digest", "finite_or_none", "is_canonical"]

#: returns data in the one spelling that is written and hashed
canonical = plain


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

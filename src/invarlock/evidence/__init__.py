"""Evidence: what one model showed on one set of windows, as plain data that can be stored, sent and compared."""

from __future__ import annotations

from invarlock.evidence.model import Evidence, ModelFacts, Structure, TensorFacts, WindowRows

__all__ = ["Evidence", "ModelFacts", "Structure", "TensorFacts", "WindowRows"]

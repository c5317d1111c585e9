"""Findings of guards that are notes and no failures, because of what the subject does or was meant to be.

1. Where the behaviour is preserved to rounding, weights that every token passes through may differ: folded norm gains,
   smoothing, rotations and a head stored beside its embedding change weights and nothing else. What no token of the
   windows shows stays a failure: rows of embeddings and heads, experts that no token was routed to, values that are not
   finite, missing tensors, and configuration that acts on longer texts than the windows are.
2. Under intent `restructure` the subject is built differently on purpose: shapes, names and layer counts are notes, and
   behaviour is judged in full. What its own architecture needs and does not have stays a failure.
3. Under intent `finetune` rows of embeddings may have been trained; that they hold what other rows held stays a failure.
4. Under intent `engine` the same weights are served in another way: behaviour alone is judged, and what the files differ
   in is noted, but for values that are not finite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from invarlock.certificate.figures import Figures
from invarlock.certificate.schema import GuardSection, Recorded
from invarlock.guards.routing import expert_of, not_exercised

__all__ = ["Finding", "behaviour_preserved", "with_notes"]

#: the largest mean KL (nats per token), share of flips and |log ratio| that single-precision arithmetic in another order
#: makes; measured reparametrisations (smoothing, folded gains, rotations in float32) stay at 1e-11, 0 and 1e-8
_MOST = (1e-5, 2e-3, 1e-4)
_BEYOND = re.compile(r"window|chunk|position|rope|max_.*length")  # keys that act beyond the length of the windows
_EXERCISED = (
    "tied", "untied", "dtype_mixed", "spectral_sigma", "spectral_stable_rank", "spectral_column_norm",
    "spectral_row_norm", "spectral_growth", "spectral_extra", "rmt_edge", "rmt_extra", "rmt_missing",
)  # fmt: skip
_REBUILT = (
    "tensor_missing", "tensor_unexpected", "tensor_shape", "norm_missing", "config_changed", "architecture", "tied",
    "untied", "E002", "spectral_missing", "spectral_extra", "spectral_shape", "rmt_missing", "rmt_extra",
    "rmt_unusable", "variance_tap",
)  # fmt: skip

#: rows that training may have written anew, such as those of tokens that got a meaning
_TRAINED = ("rows_overwritten", "rows_scaled")

Finding = Mapping[str, Any]


def behaviour_preserved(found: Figures) -> bool:
    """Whether the subject behaves as its baseline to rounding, on every measure of it."""
    d, metric = found.divergence, found.metric
    if d is None or not d.reference_matches:
        return False
    figures = (d.kl_mean, d.flip_rate, metric.log_ratio)
    return all(value is not None and abs(value) <= most for value, most in zip(figures, _MOST, strict=True))


def with_notes(sections: Mapping[str, GuardSection], r: Recorded, found: Figures) -> dict[str, GuardSection]:
    """Return the sections with the findings that are no failures among their warnings."""
    if r.meta.intent == "restructure":
        needed = {*r.structure.subject.missing, *(line.split(":")[0] for line in r.structure.subject.misshapen)}
        return _noted(
            sections,
            lambda section, f: f["code"] in _REBUILT and f.get("module") not in needed,
            "of what was built differently are noted under intent restructure",
        )
    if r.meta.intent == "finetune":
        sections = _noted(sections, lambda section, f: f["code"] in _TRAINED, "on rows only warn under intent finetune")
    if r.meta.intent == "engine":
        return _noted(sections, lambda section, f: f["code"] != "non_finite", "are noted under intent engine")
    if not behaviour_preserved(found):
        return dict(sections)
    idle = not_exercised(r.experts.baseline, r.experts.subject) if r.experts is not None else set()

    tied = r.structure.subject_behaviour.get("tie_word_embeddings") is not False

    def noted(section: GuardSection, finding: Finding) -> bool:
        if finding["code"] == "untied" and (r.derivation or 1) > 2 and tied:
            return False  # the file holds a head that the configuration does not let anybody load
        return _exercised(section, finding) and expert_of(str(finding.get("module"))) not in idle

    return _noted(sections, noted, "on weights that every token passes through are noted: behaviour is preserved")


def _exercised(section: GuardSection, finding: Finding) -> bool:
    if finding["code"] == "config_changed":
        return not _BEYOND.search(str(finding.get("key")))
    if finding["code"] == "spectral_row_norm":
        modules = (section.facts or {}).get("modules", ())
        return not any(m["by_row"] for m in modules if m["name"] == finding["module"])
    return finding["code"] in _EXERCISED


def _noted(
    sections: Mapping[str, GuardSection], noted: Callable[[GuardSection, Finding], bool], why: str
) -> dict[str, GuardSection]:
    out = {}
    for name, section in sections.items():
        moved = [finding for finding in section.errors if noted(section, finding)]
        errors = [finding for finding in section.errors if finding not in moved]
        if moved and section.evaluated:
            message = errors[0]["message"] if errors else f"{len(moved)} finding(s) {why}, first: {moved[0]['message']}"
            changes = {
                "passed": not errors,
                "errors": errors,
                "warnings": [*moved, *section.warnings],
                "message": message,
            }
            section = section.model_copy(update={**changes, "action": section.action if errors else "warn"})
        out[name] = section
    return out

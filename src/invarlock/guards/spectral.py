"""Spectral guard: the largest singular value, the stable rank and the row and column norms of every weight matrix.

Growth g = s1/s0 - 1 and z = ln(s1/s0) / tau of the module's family. A module violates when |g| exceeds the deadband,
|z| exceeds kappa of its family, and its p-value 2 * Phi(-|z|) survives the multiple-testing rule over all modules. With
the packaged tau and kappa the deadband alone decides, since beyond it |z| is 9.8 and more: the others are for who sets
them wider. Up to `max_caps` violations warn, more fail. Fatal by themselves: a ratio of singular values outside
[1/2, 2], a stable rank under a quarter of the baseline's, a norm ratio of a row or column outside [0.1, 10].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from invarlock.core.api import AdapterLike, ModelLike
from invarlock.core.exceptions import ConfigError, DataError
from invarlock.eval.sources.base import Source
from invarlock.evidence.windows import Window
from invarlock.guards.base import Facts, Finding, Policy, Result, Stats, StatsGuard, by_name, finding, result
from invarlock.guards.families import WeightMatrix, unreadable_weights, weight_matrices
from invarlock.guards.packing import packing_findings
from invarlock.guards.rows import NamedTokens, compare_rows, row_codes, row_findings
from invarlock.stats.linalg import (
    SIGMA_CONTRACT,
    finite,
    norms,
    pack,
    sigma_max,
    stable_rank,
    unpack,
)
from invarlock.stats.multiplicity import bh, bonferroni

__all__ = ["SpectralGuard"]

_TESTS = {"bh": bh, "bonferroni": bonferroni}
_TAILS, _MIDDLE = 32, 64  # of a sorted profile of norms: the lowest and highest 32, and 64 evenly spaced between
_FEW = 16  # a column of fewer weights has no norm to speak of: rounding may zero it, as in a gate of shape [1, width]
_DEAD = 1e-3  # a row under this fraction of the baseline's median norm has no ratio to speak of
_MAX_SEVERITY = 99.0
# ratio: (fatal below, warn below, warn above, fatal above)
_BOUNDS: dict[str, tuple[float, float, float, float]] = {
    "sigma": (0.5, 0.0, math.inf, 2.0),
    "stable_rank": (0.25, 0.5, math.inf, math.inf),
    "row_norm": (0.1, 0.25, 4.0, 10.0),
    "column_norm": (0.1, 0.25, 4.0, 10.0),
}
_REACH = {"sigma": math.log(2), "stable_rank": math.log(4), "row_norm": math.log(10), "column_norm": math.log(10)}


class SpectralGuard(StatsGuard):
    """Compares the spectra of the subject's weights with the baseline's.

    Policy keys and constructor arguments: `deadband` (of |g|), `kappa` and `tau` by family, `max_caps`,
    `multiple_testing` {method: bh|bonferroni, alpha} (these three change nothing unless set so wide that they reach beyond
    the deadband), `scope` ("all" or families in which growth is judged),
    `sigma_quantile` and `correction_enabled`: in a run, an offender that grew past that quantile of its family's
    baseline singular values is scaled down to it.
    """

    name = "spectral"
    defaults: ClassVar[dict[str, Any]] = {
        "sigma_quantile": 0.95,
        "deadband": 0.10,
        "kappa": {"ffn": 3.8, "attn": 4.8, "embed": 3.8, "router": 3.8, "other": 3.8},
        "tau": {"ffn": 0.005, "attn": 0.005, "embed": 0.005, "router": 0.005, "other": 0.005},
        "max_caps": 5,
        "multiple_testing": {"method": "bh", "alpha": 0.05},
        "correction_enabled": False,
        "scope": "all",
    }

    def contract(self) -> dict[str, Any]:
        kept = f"sorted {_TAILS}+{_MIDDLE}+{_TAILS}; rows of embeddings and heads in order"
        return {**SIGMA_CONTRACT, "norms": kept, "version": 1}

    def measure(self, model: ModelLike, adapter: AdapterLike) -> Stats:
        modules = [_measure(weight) for weight in weight_matrices(model, adapter)]
        return {"modules": modules, "unreadable": unreadable_weights(model)}

    def pair(self, baseline: Stats, subject: Stats) -> Facts:
        both, missing, extra = by_name(baseline["modules"], subject["modules"])
        tokens = subject.get("tokens") or []
        packed, packed_now = set(baseline["unreadable"]), set(subject["unreadable"])
        return {
            "modules": [_pair(old, new, tokens) for old, new in both],
            "missing": [name for name in missing if name not in packed | packed_now],
            "extra": [name for name in extra if name not in packed | packed_now],
            "not_comparable": sorted(packed | packed_now),
            "packed_differently": sorted(packed ^ packed_now),
            **({"tokens": tokens} if tokens else {}),
        }

    def judge(self, facts: Facts, policy: Policy) -> Result:
        policy = {**self.defaults, **policy}
        modules = facts["modules"]
        errors = [
            finding(f"spectral_{kind}", name, f"{name} is {kind} in the subject; expected the baseline's weights")
            for kind in ("missing", "extra")
            for name in facts[kind]
        ]
        warnings: list[Finding] = []
        severities = dict.fromkeys((*facts["missing"], *facts["extra"]), _MAX_SEVERITY)
        for module in modules:
            fatal, mild, severities[module["name"]] = _judge_module(module)
            rows = row_findings(module["name"], module.get("changed_rows"), facts.get("tokens") or ())
            severities[module["name"]] = _MAX_SEVERITY if rows else severities[module["name"]]
            errors += [*rows, *fatal]
            warnings += mild
        for inner in packing_findings(facts.get("packed", ())):
            errors.append(inner)
            severities[inner["module"]] = _MAX_SEVERITY
        violations = _violations(modules, policy)
        (errors if len(violations) > policy["max_caps"] else warnings).extend(violations)
        order = sorted(severities, key=lambda name: -severities[name])  # stable: the model's order among equals
        for findings in (errors, warnings):
            findings.sort(key=lambda finding: -severities[finding["module"]])
        if packed := facts["packed_differently"]:
            text = f"{len(packed)} weights are packed on one side and were not compared, the first {packed[0]}"
            warnings.append(finding("spectral_not_comparable", packed[0], text))
        growths = [abs(math.exp(x) - 1) for m in modules if (x := _log_ratio(m["sigma"])) is not None]
        metrics = {
            "modules": len(modules),
            "not_comparable": len(facts["not_comparable"]),
            "max_growth": max(growths, default=None),
            "violations": len(violations),
            "max_caps": policy["max_caps"],
            "worst": [{"module": name, "severity": severities[name]} for name in order[:5] if severities[name] > 0],
        }
        found: dict[str, Any] = {"metrics": metrics, "warnings": warnings, "errors": errors}
        if not modules:
            message = "spectral: no weight matrix could be compared; expected dense 2-D weights on both sides"
            return result(False, message, **found, evaluated=False)
        return result(not errors, f"spectral: {_summary(len(modules), errors, violations)}", **found)

    def remedy(
        self, model: ModelLike, adapter: AdapterLike, outcome: Result, windows: Sequence[Window], source: Source
    ) -> tuple[Result, bool]:
        """Scale down, in place, each offender whose sigma exceeds its family's quantile of the baseline, where the policy
        asks for it, and judge the corrected weights."""
        import torch

        if not self.policy["correction_enabled"] or self.baseline is None or self.subject is None:
            return outcome, False
        offenders = {f["module"] for f in (*outcome["errors"], *outcome["warnings"]) if f["code"] == "spectral_growth"}
        sigmas = {module["name"]: module["sigma"] for module in self.subject["modules"] if module["name"] in offenders}
        corrections = []
        for weight in weight_matrices(model, adapter) if sigmas else ():
            peers = [m["sigma"] for m in self.baseline["modules"] if m["family"] == weight.family and m["sigma"]]
            cap = float(np.quantile(peers, self.policy["sigma_quantile"])) if peers else math.inf
            sigma = sigmas.get(weight.name)
            if sigma is not None and sigma > cap:
                with torch.no_grad():
                    weight.tensor().mul_(cap / sigma)
                corrections.append({"module": weight.name, "sigma": sigma, "scaled_to": cap})
        if not corrections:
            return outcome, False
        self.subject = self.measure(model, adapter)
        outcome = self.judge(self.pair(self.baseline, self.subject), self.policy)
        outcome["metrics"]["corrections"] = corrections
        return outcome, True


def _measure(weight: WeightMatrix) -> dict[str, Any]:
    tensor = weight.tensor()
    rows, columns = norms(tensor)
    in_order = weight.role != "linear"
    return {
        **{key: getattr(weight, key) for key in ("name", "family", "by", "role")},
        "shape": list(weight.shape),
        "sigma": finite(sigma_max(tensor)),
        "frobenius": finite(math.sqrt(float(np.square(rows).sum()))),
        "rows": pack(rows if in_order else _profile(rows)),
        "columns": pack(_profile(columns)),
        **({"directions": row_codes(tensor)} if in_order else {}),
    }


def _profile(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keep of sorted norms the tails whole and the middle thinned out; at most 128 values."""
    ordered = np.sort(values)
    if len(ordered) <= 2 * _TAILS + _MIDDLE:
        return ordered
    middle = np.linspace(_TAILS, len(ordered) - _TAILS - 1, _MIDDLE).astype(np.intp)
    picked = np.concatenate([np.arange(_TAILS), middle, np.arange(len(ordered) - _TAILS, len(ordered))])
    return np.asarray(ordered[picked], dtype=np.float64)


def _pair(before: Mapping[str, Any], after: Mapping[str, Any], tokens: NamedTokens) -> dict[str, Any]:
    tables = [(unpack(side["rows"]), side["directions"]) for side in (before, after) if "directions" in side]
    named = [number for number, _ in tokens]
    rows = compare_rows(tables[0], tables[1], before["shape"][1], named) if len(tables) == 2 else None
    return {
        "name": before["name"],
        "family": before["family"],
        "same_shape": before["shape"] == after["shape"],
        **{key: [before[key], after[key]] for key in ("sigma", "frobenius")},
        "row_norm": _extremes(_vector_norms(before, "rows"), _vector_norms(after, "rows")),
        "column_norm": _extremes(_vector_norms(before, "columns"), _vector_norms(after, "columns")),
        "by_row": before["role"] != "linear",
        **({"changed_rows": rows} if rows is not None and rows["rows"] else {}),
    }


def _vector_norms(module: Mapping[str, Any], kind: str) -> NDArray[np.float64]:
    """Return the norms of the rows or columns; where these hold only a few weights, the norm of the whole instead.

    Rows of embeddings and heads count one by one, however short.
    """
    length = module["shape"][0 if kind == "columns" else 1]
    if length >= _FEW or (kind == "rows" and module["role"] != "linear"):
        return unpack(module[kind])
    return np.array([module["frobenius"]], dtype=np.float64)  # None is NaN


def _extremes(old: NDArray[np.float64], new: NDArray[np.float64]) -> dict[str, Any]:
    """Return the smallest and largest ratio of norms, new over old, and where; None where it has no value.

    A row that is dead in the baseline is left out, unless it rose above the median of the living: then its ratio is
    taken to that median.
    """
    nothing = dict.fromkeys(("min", "at_min", "max", "at_max"))
    if len(old) != len(new) or not len(old) or not (np.isfinite(old).all() and np.isfinite(new).all()):
        return nothing
    living = old[old > 0]
    if not len(living):
        return nothing if new.any() else {"min": 1.0, "at_min": 0, "max": 1.0, "at_max": 0}
    median = float(np.median(living))
    dead = old < _DEAD * median
    ratio = np.where(dead, np.maximum(new / median, 1.0), new / np.where(dead, 1.0, old))
    low, high = int(ratio.argmin()), int(ratio.argmax())
    return {"min": float(ratio[low]), "at_min": low, "max": float(ratio[high]), "at_max": high}


def _log_ratio(pair: Iterable[float | None]) -> float | None:
    """ln(after / before); 0 when both are zero; None when a value is missing, not finite or alone zero."""
    before, after = (finite(value) for value in pair)
    if before is None or after is None or before < 0 or after < 0:
        return None
    if before == after:
        return 0.0
    return math.log(after / before) if before > 0 and after > 0 else None


def _judge_module(module: Mapping[str, Any]) -> tuple[list[Finding], list[Finding], float]:
    """Return the fatal findings, the mild ones, and the severity: 1 is at a fatal bound."""
    name = module["name"]
    if problem := _unusable(module):
        return [finding(f"spectral_{problem[0]}", name, f"{name}: {problem[1]}")], [], _MAX_SEVERITY
    fatal: list[Finding] = []
    mild: list[Finding] = []
    severity = 0.0
    for kind, ratio, place in _ratios(module):
        fatal_low, warn_low, warn_high, fatal_high = _BOUNDS[kind]
        reach = abs(math.log(ratio)) / _REACH[kind] if ratio > 0 else _MAX_SEVERITY
        if kind != "stable_rank" or ratio < 1:
            severity = max(severity, min(reach, _MAX_SEVERITY))
        what = f"{name}: {kind.replace('_', ' ')} ratio {ratio:.4g}{place}"
        if not fatal_low <= ratio <= fatal_high:
            fatal.append(finding(f"spectral_{kind}", name, f"{what}; expected [{fatal_low:g}, {fatal_high:g}]"))
        elif not warn_low <= ratio <= warn_high:
            mild.append(finding(f"spectral_{kind}", name, f"{what}; expected [{warn_low:g}, {warn_high:g}]"))
    return fatal, mild, severity


def _unusable(module: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say why a module has no ratios, or None when it has."""
    before, after = (finite(value) for value in module["sigma"])
    extremes = [module[kind][end] for kind in ("row_norm", "column_norm") for end in ("min", "max")]
    if module["same_shape"] is not True:
        return "shape", "the shape changed; expected the baseline's"
    if before is None or after is None or None in map(finite, module["frobenius"]):
        side = "baseline" if before is None else "subject"
        return "nonfinite", f"sigma or a norm is not finite in the {side}; expected finite weights"
    if before > 0 and after == 0:
        return "zero", "the matrix is zero in the subject; expected weights"
    if before == 0 and after > 0:
        return "zero", "the matrix is zero in the baseline only; expected zero"
    if before > 0 and not min(module["frobenius"]) > 0:
        return "nonfinite", "the norm is zero where sigma is not; expected the norm of the same matrix"
    if None in map(finite, extremes):
        return "nonfinite", "row or column norms are missing or not finite"
    return None


def _ratios(module: Mapping[str, Any]) -> Iterable[tuple[str, float, str]]:
    (s0, s1), (f0, f1) = module["sigma"], module["frobenius"]
    if s0 == 0:
        return  # zero on both sides
    yield "sigma", s1 / s0, ""
    yield "stable_rank", stable_rank(f1, s1) / stable_rank(f0, s0), ""
    for kind in ("row_norm", "column_norm"):
        in_order = module["by_row"] and kind == "row_norm"
        for end in ("min", "max"):
            place = f" at row {module[kind]['at_' + end]}" if in_order else ""
            yield kind, module[kind][end], place


def _violations(modules: list[dict[str, Any]], policy: Policy) -> list[Finding]:
    """List the modules whose growth violates; a module without a ratio counts as tested with p = 1, being fatal."""
    testing = policy["multiple_testing"]
    if testing["method"] not in _TESTS:
        raise ConfigError(f"got multiple_testing.method {testing['method']!r}; expected one of {sorted(_TESTS)}")
    in_scope = [m for m in modules if policy["scope"] == "all" or m["family"] in policy["scope"]]
    judged = [(m, log_ratio) for m in in_scope if (log_ratio := _log_ratio(m["sigma"])) is not None]
    scores = [log_ratio / _by_family(policy, "tau", m["family"]) for m, log_ratio in judged]
    p_values = [math.erfc(abs(z) / math.sqrt(2)) for z in scores]
    survives = _TESTS[testing["method"]](p_values, testing["alpha"], m=len(modules))
    found = []
    for (module, log_ratio), z, rejected in zip(judged, scores, survives, strict=True):
        growth, family = math.exp(log_ratio) - 1, module["family"]
        if rejected and abs(growth) > policy["deadband"] and abs(z) > _by_family(policy, "kappa", family):
            text = (
                f"{module['name']}: sigma changed by {growth:+.1%}, beyond {policy['deadband']:.0%} (family {family})"
            )
            found.append(finding("spectral_growth", module["name"], text))
    return found


def _by_family(policy: Policy, key: str, family: str) -> float:
    table = {**SpectralGuard.defaults[key], **policy[key]}
    value = finite(table.get(family, table["other"]))
    if value is None or value <= 0:
        raise DataError(f"got spectral.{key} {table.get(family)!r} for {family}; expected a number above 0")
    return value


def _summary(count: int, errors: list[Finding], violations: list[Finding]) -> str:
    if errors:
        return f"{errors[0]['message']}" + (f" and {len(errors) - 1} more" if len(errors) > 1 else "")
    if violations:
        return f"{len(violations)} of {count} matrices changed beyond the deadband, within the allowance"
    return f"{count} matrices within bounds"

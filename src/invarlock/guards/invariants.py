"""The structural guard: the same tensors, finite, tied as before, under the same configuration and tokenizer.

It compares two tables of tensors (`Structure`), read from safetensors files before any model is loaded, or off a live
model. Every finding names the tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from invarlock.checkpoints.behaviour import behaviour
from invarlock.checkpoints.structure import live_structure
from invarlock.core.api import AdapterLike, ModelLike
from invarlock.evidence.model import Evidence, Structure
from invarlock.guards.base import Facts, Finding, Policy, Result, Stats, StatsGuard, result
from invarlock.guards.usage import config_findings, said_once, tokenizer_findings, usage_findings

__all__ = ["InvariantsGuard", "baseline_damage", "behaviour_of", "stats_of"]

_MOST_NAMED = 20
_MEANT = ("config", "usage")  # groups that a fine-tune may change on purpose


def _finding(code: str, tensor: str | None, message: str, group: str = "structure") -> Finding:
    return {"code": code, "tensor": tensor, "module": tensor, "message": message, "group": group}


def _tensors(old: Structure, new: Structure) -> Iterator[Finding]:
    before, after = ({t.name: t for t in side.tensors} for side in (old, new))
    for name, tensor in after.items():
        if tensor.non_finite and not (name in before and before[name].non_finite):
            message = f"{name} holds {tensor.non_finite} NaN or infinite value(s); expected none"
            yield _finding("non_finite", name, message)
    for name in sorted((before.keys() - after.keys() | set(new.missing)) - {alias for alias, _ in new.tied}):
        yield _finding("tensor_missing", name, f"{name} is missing; the baseline has it")
    for name, tensor in after.items():
        if name in before and (expected := before[name].shape) != tensor.shape:
            yield _finding("tensor_shape", name, f"{name} has shape {tensor.shape}; expected {expected}")
    known = before.keys() | {alias for alias, _ in old.tied}
    for name in (name for name in after if name not in known):
        yield _finding("tensor_unexpected", name, f"{name} is not in the baseline")


def _ties(old: Structure, new: Structure) -> Iterator[Finding]:
    before, digests = ({t.name: t.digest for t in side.tensors} for side in (old, new))
    still = {alias for alias, _ in new.tied}
    for alias, partner in new.tied:
        if alias in before and before[alias] != before.get(partner):
            yield _finding("tied", alias, f"{alias} is now tied to {partner}; the baseline keeps them apart")
    for alias, partner in old.tied:
        if alias in digests and alias not in still and digests[alias] != digests.get(partner):
            yield _finding("untied", alias, f"{alias} is no longer tied to {partner}: their values differ")


def _norms(old: Structure, new: Structure) -> Iterator[Finding]:
    for name in sorted(set(old.norms) - set(new.norms)):
        if new.norms:  # a checkpoint of an architecture that we cannot build lists none
            yield _finding("norm_missing", name, f"normalisation weight {name} is gone", "norms")


def _dtypes(old: Structure, new: Structure) -> Iterator[Finding]:
    before = {t.name: t.dtype for t in old.tensors}
    types: dict[str, list[str]] = defaultdict(list)
    for tensor in new.tensors:
        if tensor.dtype in {"F32", "F16", "BF16", "F64"} and before.get(tensor.name, tensor.dtype) != tensor.dtype:
            types[tensor.dtype].append(tensor.name)
    changed = sum(len(names) for names in types.values())
    if changed and (len(types) > 1 or changed < len([t for t in new.tensors if t.dtype.startswith(("F", "BF"))])):
        for dtype, names in sorted(types.items()):
            message = f"{len(names)} tensor(s) are {dtype} while the others kept their type, first {names[0]}"
            yield _finding("dtype_mixed", names[0], message, "dtype")


def _misfits(old: Structure, new: Structure, named: set[str | None]) -> Iterator[Finding]:
    """Tensors that do not fit the subject's own configuration, so that it cannot be loaded."""
    for line in new.misshapen:
        name = line.split(":")[0]
        if line not in old.misshapen and name not in named:
            yield _finding("tensor_shape", name, f"{line} by the subject's own configuration")


def baseline_damage(structure: Structure) -> list[Finding]:
    """Return why a baseline cannot serve as one: non-finite parameters, missing or mis-shaped tensors."""
    damaged = [t for t in structure.tensors if t.non_finite and t.name not in structure.buffers]
    return [
        *(_finding("non_finite", t.name, f"{t.name} holds {t.non_finite} NaN or infinite value(s)") for t in damaged),
        *(_finding("tensor_missing", name, f"{name} is missing") for name in structure.missing),
        *(_finding("tensor_shape", line.split(":")[0], line) for line in structure.misshapen),
    ]


def behaviour_of(model: ModelLike) -> dict[str, Any]:
    """Return the configuration of a live model, as far as it changes what it computes; {} where it has none."""
    config = getattr(model, "config", None)
    return behaviour(config) if hasattr(config, "to_dict") else {}


def stats_of(evidence: Evidence) -> Stats:
    """Return what the guard measured on the model of a piece of evidence."""
    model = evidence.model
    tokenizer = (model.tokenizer_digest, model.tokenizer_size)
    return InvariantsGuard.stats_from(evidence.structure, model.behaviour, *tokenizer, model.usage)


class InvariantsGuard(StatsGuard):
    """Compare structure. Knobs:

    strict_mode: warnings fail too. on_fail: `warn`, `rollback` or `abort`. profile_checks: which of the optional groups
    of checks run (`norms`, `dtype`, `config` with how the model is used, `tokenizer`; structure always does). intent:
    under `finetune` changed configuration and usage warn.
    """

    name = "invariants"
    defaults: ClassVar[dict[str, Any]] = {
        "strict_mode": False,
        "on_fail": "rollback",
        "profile_checks": ["norms", "dtype", "config", "tokenizer"],
        "intent": "preserve",
    }

    def __init__(
        self,
        *,
        strict_mode: bool | None = None,
        on_fail: str | None = None,
        profile_checks: list[str] | None = None,
        **others: object,
    ) -> None:
        given = {"strict_mode": strict_mode, "on_fail": on_fail, "profile_checks": profile_checks}
        super().__init__(**{key: value for key, value in given.items() if value is not None}, **others)

    def contract(self) -> dict[str, Any]:
        return {"tensors": "names, shapes, types, sha256 digests, non-finite counts"}

    def measure(self, model: ModelLike, adapter: AdapterLike) -> Stats:
        """Read the table off a live model; `stats_from` does the same for what was read elsewhere."""
        return self.stats_from(live_structure(model), behaviour_of(model), None, None)

    @staticmethod
    def stats_from(
        structure: Structure,
        behaviour: Mapping[str, Any],
        tokenizer_digest: str | None,
        tokenizer_size: int | None,
        usage: Mapping[str, Any] | None = None,
    ) -> Stats:
        """Return the measurement made of parts that were read elsewhere; the first releases recorded no `usage`."""
        tokenizer = {"tokenizer_digest": tokenizer_digest, "tokenizer_size": tokenizer_size}
        how = {"behaviour": dict(behaviour), "usage": None if usage is None else dict(usage)}
        return {"structure": structure.model_dump(mode="json"), **how, **tokenizer}

    def pair(self, baseline: Stats, subject: Stats) -> Facts:
        """List every difference, each with the check group that it belongs to."""
        old, new = (Structure.model_validate(side["structure"]) for side in (baseline, subject))
        findings = [finding for check in (_tensors, _ties, _norms, _dtypes) for finding in check(old, new)]
        findings += config_findings(baseline, subject)
        findings += _misfits(old, new, {finding["tensor"] for finding in findings})
        findings += tokenizer_findings(baseline, subject, new)
        findings += usage_findings(baseline, subject)
        return {"findings": said_once(baseline, subject, findings), "tensors_compared": len(new.tensors)}

    def judge(self, facts: Facts, policy: Policy) -> Result:
        """Fail on any finding, but for the groups that only warn."""
        enabled = {"structure", *policy.get("profile_checks", self.defaults["profile_checks"])}
        if "config" in enabled:
            enabled |= {"usage", "note"}
        soft = {"dtype", "note", *(_MEANT if policy.get("intent") == "finetune" else ())}
        if policy.get("strict_mode"):
            soft = set()
        kept = [f for f in facts["findings"] if f["group"] in enabled]
        errors = [f for f in kept if f["group"] not in soft]
        warnings = [f for f in kept if f["group"] in soft]
        compared = facts["tensors_compared"]
        if not compared:
            return result(False, "no tensors to compare", evaluated=False)
        shown = errors or warnings
        message = str(shown[0]["message"]) if shown else f"{compared} tensors agree"
        message += f" (and {len(shown) - 1} more)" if len(shown) > 1 else ""
        if warnings and not errors:  # what was demoted stands here itself, and no success
            message += " (only warns under intent finetune)" if warnings[0]["group"] in _MEANT else " (only warns)"
        return result(
            not errors,
            message,
            action=str(policy.get("on_fail", "rollback")) if errors else None,
            metrics={"tensors_compared": compared, "findings": len(kept)},
            warnings=warnings[:_MOST_NAMED],
            errors=errors[:_MOST_NAMED],
        )

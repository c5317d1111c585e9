"""The part of `invariants` that compares how two checkpoints are configured and used: settings, tokenizer, roles, templates.

What an earlier release recorded is compared as that release did: its measurements have no `usage` (None).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from invarlock.evidence.model import Structure
from invarlock.guards.base import Finding, Stats, finding

__all__ = ["config_findings", "said_once", "tokenizer_findings", "usage_findings"]

_TENSORS_DIFFER = {"tensor_missing", "tensor_unexpected", "tensor_shape", "norm_missing"}
_PLACES = (("config", "config.json"), ("generation", "generation_config.json"), ("tokenizer", "tokenizer"))


def _finding(code: str, message: str, group: str, **more: object) -> Finding:
    return {**finding(code, None, message), "tensor": None, "group": group, **more}


def config_findings(old: Stats, new: Stats) -> Iterator[Finding]:
    """Compare what is computed. From the first `usage` on, a key that one side lacks counts as its class's default."""
    before, after = old["behaviour"], new["behaviour"]
    ours, theirs, anew = new.get("usage") or {}, old.get("usage") or {}, new.get("usage") is not None
    passed_over = {key for key in ours.get("at_default", ()) if key not in before}
    passed_over |= {key for key in theirs.get("at_default", ()) if key not in after}
    if anew and old.get("usage") is None:
        passed_over.add("pad_token_id")  # which baselines of earlier releases never recorded
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or key in passed_over:
            continue
        limit_only = anew and key == "max_position_embeddings" and _rotary(before) and _rotary(after)
        message = f"configuration {key} is {after.get(key)!r}; the baseline has {before.get(key)!r}"
        if key == "model_type" and anew:
            message = _architectures(old, new)
        yield _finding("config_changed", message, "note" if limit_only else "config", key=key)


def _rotary(behaviour: Mapping[str, Any]) -> bool:
    """Whether positions are rotary and computed without the length that the configuration names."""
    if not {"rope_parameters", "rope_theta"} & behaviour.keys():
        return False
    given = behaviour.get("rope_parameters") or behaviour.get("rope_scaling") or {}
    settings = [given, *(value for value in given.values() if isinstance(value, dict))]  # some have one a kind of layer
    kinds = {one.get("rope_type", one.get("type")) for one in settings} - {None}
    return kinds <= {"default", "linear"}


def _architectures(old: Stats, new: Stats) -> str:
    names = [(side.get("usage") or {}).get("architecture") or side["behaviour"]["model_type"] for side in (old, new)]
    return f"two different architectures: {names[0]} and {names[1]}"


def said_once(old: Stats, new: Stats, findings: list[Finding]) -> list[Finding]:
    """Say of two architectures that they are two, and not of every tensor and setting that the other does not have."""
    kinds = {side["behaviour"].get("model_type") for side in (old, new)}
    apart = not _TENSORS_DIFFER.isdisjoint(finding["code"] for finding in findings)
    if new.get("usage") is None or len(kinds) < 2 or None in kinds or not apart:
        return findings
    rest = [finding for finding in findings if finding["code"] not in _TENSORS_DIFFER | {"config_changed"}]
    return [_finding("architecture", _architectures(old, new), "structure"), *rest]


def usage_findings(old: Stats, new: Stats) -> Iterator[Finding]:
    """Compare how the model is used: tokens with a role, chat template, sampling. Nothing where a side has no record.

    A role that the baseline gives to no token is a note, but for what ends a text: that changes where it stops.
    """
    before, after = old.get("usage") or {}, new.get("usage") or {}
    places: dict[tuple[str, str, str], list[str]] = {}
    for place, file in _PLACES:
        was, now = (_roles(side.get(place)) for side in (before, after))
        if was is None or now is None:
            continue
        for role in sorted(was.keys() | now.keys()):
            untold = role not in now and after.get("rebuilt") or role not in was and before.get("rebuilt")
            if was.get(role) != now.get(role) and role not in new["behaviour"] and not untold:
                places.setdefault((role, repr(was.get(role)), repr(now.get(role))), []).append(file)
    for (role, was_one, is_one), files in places.items():
        message = f"{role} is {is_one} ({', '.join(files)}); the baseline has {was_one}"
        group = "note" if was_one == "None" and not role.startswith(("eos", "stop")) else "usage"
        yield _finding("role_changed", message, group, key=role)
    if {"chat_template"} <= before.keys() & after.keys() and before["chat_template"] != after["chat_template"]:
        templates = [side["chat_template"] for side in (before, after)]
        shown = [f"{t['first_line']!r} (digest {t['digest'][:8]})" if t else "none" for t in templates]
        message = f"the chat template is {shown[1]}; the baseline has {shown[0]}"
        yield _finding("chat_template", message, "usage" if templates[0] else "note")
    sampled = [side.get("sampling") or {} for side in (before, after)]
    for key in sorted(sampled[0].keys() | sampled[1].keys() if all(sampled) else ()):
        was, now = (side.get(key) for side in sampled)
        if was != now:
            message = f"generation setting {key} is {now!r}; the baseline has {was!r}"
            yield _finding("sampling_changed", message, "note", key=key)


def _roles(facts: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return facts.get("roles", facts) if facts is not None else None


def _encoded(facts: Mapping[str, Any] | None) -> str | None:
    """Say how many of the chosen documents the two tokenizers encode differently; None where none, or none was encoded."""
    if not facts or not facts["differing"]:
        return None
    counts = f"{facts['differing']} of {facts['documents']}"
    return f"encodes {counts} documents otherwise than the baseline's, the first {facts['first']!r}"


def tokenizer_findings(old: Stats, new: Stats, structure: Structure) -> Iterator[Finding]:
    ours, theirs = new.get("tokenizer_digest"), old.get("tokenizer_digest")
    facts, known = ((side.get("usage") or {}).get("tokenizer") or {} for side in (new, old))
    encoded = _encoded((new.get("usage") or {}).get("encoded"))
    if facts and not known and old.get("usage") is None:
        ours = facts["first_digest"]  # as baselines of the first release have it
    if new.get("usage") is not None and bool(ours) != bool(theirs):
        side = "baseline" if ours else "subject"
        message = f"the tokenizer was not evaluated: the {side} has none"
        yield _finding("tokenizer_not_evaluated", message, "note")
    elif ours and theirs and ours != theirs:
        rebuilt = any((side.get("usage") or {}).get("rebuilt") for side in (new, old))
        kind = "effect" if rebuilt else "encoding"
        if facts and known and facts[kind] == known.get(kind):
            if facts["roles"] == known["roles"] and not rebuilt:  # else each role is named
                message = "the tokenizer flags other tokens as special than the baseline's"
                yield _finding("role_changed", message, "usage")
        else:
            message = (
                f"the tokenizer differs from the baseline's: {new.get('tokenizer_size')} tokens, digest {ours[:8]}; "
                f"expected {old.get('tokenizer_size')}, {theirs[:8]}"
            )
            yield _finding("E002", message + (f"; it {encoded}" if encoded else ""), "tokenizer")
            encoded = None
    if encoded:
        yield _finding("E002", f"the tokenizer {encoded}", "tokenizer")
    size = new.get("tokenizer_size")
    for what, rows in (("embedding", structure.embedding_rows), ("output layer", structure.output_rows)):
        if size is not None and rows is not None and rows < size:
            message = f"the {what} has {rows} rows for {size} tokens; expected at least one a token"
            yield _finding("vocabulary_size", message, "tokenizer")

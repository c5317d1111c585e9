"""Sketches: a few hundred numbers of each tensor from which two models can be compared without either being present.

The sketch of a matrix W [m, n] is S = A^T W B with k = 16 fixed +-1 vectors a side, kept as k * k float32. Both sides
take the same vectors (those of the smaller dimension are the beginning of those of the larger), so that

- for i != j, S_ij = a_i^T W b_j has mean 0 and E[S_ij^2] = ||W||_F^2: the mean square off the diagonal is an unbiased
  estimate, of the relative error `linalg.sketch_error`: 9 % at best, 50 % where the effective rank is 1. Half of that is
  the error of the norm, so that what is read from a sketch is told to one digit. On the diagonal the two vectors are
  the same and the mean is the trace, so the diagonal is left out;
- sketches of equal shapes are comparable across layers: a swap shows as a match under another name;
- the sketch of W^T is S^T: a transposition shows too.

Sketches are linear: the difference of two is the sketch of the difference. A vector is projected on 64 such vectors,
or kept whole when it is no longer than that. A sketch names a culprit; it gates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from invarlock.adapters.offload import named_weights, value_of, within_reach
from invarlock.guards.families import classify, is_expert_stack
from invarlock.stats.linalg import finite, pack, sign_vectors, unpack

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NO_CHANGE",
    "SKETCH_CONTRACT",
    "Culprits",
    "compare_all",
    "compare_sketches",
    "culprits",
    "off_diagonal",
    "rough",
    "sketch_model",
    "sketch_stack",
    "sketch_tensor",
]

_K = 16
_VECTORS = 64
SKETCH_CONTRACT: dict[str, Any] = {"k": _K, "vectors": _VECTORS, "signs": "pcg64-sign-bits", "seed": 0, "version": 1}

_CHUNK = 1 << 25  # elements converted to float32 at once: 128 MB
_UNCHANGED = 1e-5  # relative; another thread count or device moves a sketch by less
_MATCH = 0.99
_FLIPPED = -0.9
_OFF_DIAGONAL = ~np.eye(_K, dtype=np.bool_).ravel()
_MIN_GROUP = 5  # a family with fewer members is compared with all matrices
_STANDOUT_Z, _STANDOUT_RATIO, _MIN_SPREAD = 5.0, 3.0, 0.1


def sketch_tensor(tensor: Tensor, name: str) -> str:
    """Sketch one tensor of any shape; more than two dimensions are flattened to [first, rest]. NaN stays NaN."""
    import torch

    data = tensor.detach()
    if data.ndim > 2:
        data = data.reshape(data.shape[0], -1)
    if data.numel() == 0:
        return pack([])
    if data.ndim < 2:
        values = data.reshape(-1).to(torch.float32).cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is shown as not finite
            return pack(values if len(values) <= _VECTORS else sign_vectors(len(values), _VECTORS).T @ values)
    rows, columns = data.shape
    signs = torch.from_numpy(np.array(sign_vectors(max(rows, columns), _K))).to(data.device)
    total = np.zeros((_K, _K))
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = data[start : start + step].to(torch.float32)
        total += (signs[start : start + len(part)].T @ (part @ signs[:columns])).cpu().numpy()
    return pack(total)


def sketch_stack(tensor: Tensor, name: str) -> Iterator[tuple[str, str]]:
    """Yield (name, sketch) of a tensor; of a stack of experts one pair each, named `name[i]`."""
    stacked = is_expert_stack(name, tensor.ndim)
    parts = {f"{name}[{i}]": tensor[i] for i in range(len(tensor))} if stacked else {name: tensor}
    yield from ((part, sketch_tensor(matrix, part)) for part, matrix in parts.items())


def sketch_model(model: Any) -> dict[str, str]:
    """Sketch every parameter of a model that is plain numbers, tied ones once."""
    import torch

    plain = (row for row in named_weights(model) if type(row[2]) in (torch.nn.Parameter, torch.Tensor))
    values = ((n, value_of(owner, n.rpartition(".")[2])) for n, owner, p in plain if within_reach(owner, p))
    return dict(pair for name, value in values for pair in sketch_stack(value, name))


def compare_sketches(before: str, after: str) -> dict[str, float | None]:
    """Return `rel_change` ||dW|| / ||W||, `cosine` and `norm_ratio` ||W'|| / ||W||; None where they have no value.

    Unchanged zeros give 0, 1 and 1. Sketches of another length, values that are not finite, and a tensor that was
    zero and no longer is give None.
    """
    return _compare(*(off_diagonal(unpack(sketch)) for sketch in (before, after)))


def compare_all(
    baseline: Mapping[str, str], subject: Mapping[str, str], families: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Compare the tensors that both sides have, in the baseline's order, as rows that `culprits` reads.

    A row holds `name`, `family` (`vector` for fewer than two dimensions), the three figures of `compare_sketches`
    and, where it was recognised, `matches`: the name of the baseline's tensor that now stands here, or `transposed`.
    """
    names = [name for name in baseline if name in subject]
    old = {name: unpack(baseline[name]) for name in names}
    rows = []
    for name in names:
        new = unpack(subject[name])
        family = (families or {}).get(name) or classify(name, ())[0]
        row: dict[str, Any] = {"name": name, "family": family if len(new) == _K * _K else "vector"}
        row |= _compare(off_diagonal(old[name]), off_diagonal(new))
        if row["cosine"] is not None and row["cosine"] < _MATCH and len(new) == _K * _K:
            row |= _recognise(name, new, old)
        elif row["cosine"] is None and old[name].shape == new.shape and not old[name].any():
            row["was_zero"] = True
        rows.append(row)
    return rows


#: what is said where no tensor changed
NO_CHANGE = "no tensor changed"


@dataclass(frozen=True)
class Culprits:
    """What changed. `named`: the tensors that stand out, worst first, each {name, what, rel_change, cosine, ...}.

    `uniform` is True when tensors changed and none stands out; `text` says either in one line.
    """

    named: list[dict[str, Any]]
    uniform: bool
    text: str


def culprits(rows: Sequence[Mapping[str, Any]]) -> Culprits:
    """Name the tensors whose change stands out from that of their family, or say that the change is uniform.

    A tensor stands out when more than half of its peers are unchanged and it is not; when the logarithm of its
    relative change lies 5 robust deviations above their median, and the change is 3 times theirs; when its cosine fell
    under 0.5 where theirs is above 0.9; or when what happened to it was recognised: it holds what another one held, is
    transposed or has its sign flipped. Peers are the family, or all matrices where the family is small.
    """
    changes = {row["name"]: _size(row) for row in rows}
    changed = [row for row in rows if changes[row["name"]] >= _UNCHANGED]
    standing = []
    for row in changed:
        peers = [other for other in rows if other["family"] == row["family"]]
        if len(peers) < _MIN_GROUP and row["family"] != "vector":
            peers = [other for other in rows if other["family"] != "vector"]
        excess = _excess(row, peers, changes)
        if excess is not None or _recognised(row):
            standing.append((changes[row["name"]] if excess is None else excess, {**row, "what": _what(row)}))
    if named := [row for _, row in sorted(standing, key=lambda pair: -pair[0])]:
        shown = "; ".join(f"{row['name']} ({row['what']})" for row in named[:3])
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return Culprits(named, False, f"stands out: {shown}{more}")
    if not changed:
        return Culprits([], False, NO_CHANGE)
    sizes = [changes[row["name"]] for row in changed]
    low, high = min(sizes), max(sizes)
    families = ", ".join(sorted({row["family"] for row in changed}))
    size = f"{low:.1g}" if low == high else f"{low:.1g} to {high:.1g}"
    return Culprits([], True, f"uniform: {len(changed)} of {len(rows)} tensors ({families}), relative change {size}")


def off_diagonal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entries of a matrix's sketch that tell of its size and direction; those of a vector's all do."""
    return values[_OFF_DIAGONAL] if len(values) == _K * _K else values


def _compare(old: NDArray[np.float64], new: NDArray[np.float64]) -> dict[str, float | None]:
    nothing = dict.fromkeys(("rel_change", "cosine", "norm_ratio"))
    if old.shape != new.shape or not (np.isfinite(old).all() and np.isfinite(new).all()):
        return nothing
    before, after = float(np.linalg.norm(old)), float(np.linalg.norm(new))
    if before == 0.0:
        return nothing if after else {"rel_change": 0.0, "cosine": 1.0, "norm_ratio": 1.0}
    cosine = float(old @ new) / (before * after) if after else 0.0
    return {
        "rel_change": finite(float(np.linalg.norm(new - old)) / before),
        "cosine": finite(min(1.0, max(-1.0, cosine))),
        "norm_ratio": finite(after / before),
    }


def _recognise(name: str, new: NDArray[np.float64], old: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    def alike(values: NDArray[np.float64]) -> bool:
        return (_compare(off_diagonal(values), off_diagonal(new))["cosine"] or 0.0) > _MATCH

    if alike(old[name].reshape(_K, _K).T.ravel()):
        return {"transposed": True}
    others = (other for other, values in old.items() if other != name and len(values) == len(new) and alike(values))
    match = next(others, None)
    return {} if match is None else {"matches": match}


def _size(row: Mapping[str, Any]) -> float:
    """Relative change of a row; infinite where it could not be computed, 1 where zeros became something."""
    if row.get("was_zero"):
        return 1.0
    value = finite(row["rel_change"])
    return math.inf if value is None else value


def _excess(row: Mapping[str, Any], peers: list[Mapping[str, Any]], changes: Mapping[str, float]) -> float | None:
    """Return how far a row stands out from its peers, or None when it does not."""
    size = changes[row["name"]]
    typical = float(np.median([min(changes[peer["name"]], 1e9) for peer in peers]))
    if typical < _UNCHANGED or math.isinf(size):
        return size / _UNCHANGED
    logs = np.log([min(max(changes[peer["name"]], _UNCHANGED), 1e9) for peer in peers])
    spread = max(1.4826 * float(np.median(np.abs(logs - np.median(logs)))), _MIN_SPREAD)
    far = math.log(size / typical) / spread
    if far > _STANDOUT_Z and size > _STANDOUT_RATIO * typical:
        return size / typical
    cosines = [peer["cosine"] for peer in peers if peer["cosine"] is not None]
    cosine = row["cosine"]
    if cosine is not None and cosine < 0.5 and float(np.median(cosines)) > 0.9 and not row.get("was_zero"):
        return max(size / typical, 1.0)
    return None


def _recognised(row: Mapping[str, Any]) -> bool:
    cosine = finite(row["cosine"])
    return bool(row.get("matches") or row.get("transposed")) or (cosine is not None and cosine < _FLIPPED)


def _what(row: Mapping[str, Any]) -> str:
    """Say in words what happened to a tensor: what its values told (`operation`), else what its figures do."""
    if row.get("operation"):
        return str(row["operation"])
    cosine, ratio = row["cosine"], row["norm_ratio"]
    if row.get("was_zero"):
        return "was zero, is not any more"
    if cosine is None or ratio is None:
        return "not finite or of another shape"
    if row.get("matches"):
        return f"holds what {row['matches']} held"
    if row.get("transposed"):
        return "transposed"
    if ratio < 1e-6:
        return "zeroed"
    if abs(cosine) > 0.9999 and abs(ratio - 1) > 0.005:
        return f"scaled by {math.copysign(ratio, cosine):.4g}"
    if cosine < _FLIPPED:
        return f"sign flipped, cosine {cosine:.2f}"
    if abs(cosine) < 0.5:
        return f"shuffled, swapped or re-initialised, cosine {cosine:.2f}"
    return f"changed by {rough(row['rel_change'])}, cosine {cosine:.2f}"


def rough(share: float) -> str:
    """Return a share in per cent to the one digit that a sketch gives."""
    return f"{100.0 * float(f'{share:.1g}'):.6g}%"

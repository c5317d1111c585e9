"""The primary metrics: how each scores windows, what it is called, and which section of the policy holds its limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from invarlock.core.exceptions import DataError

__all__ = ["METRICS", "Metric", "Task", "metric_of"]

Task = Literal["causal", "mlm", "seq2seq"]


@dataclass(frozen=True)
class Metric:
    """One kind of primary metric.

    `task` says how a source scores tokens. `limits` is the section of `metrics` in the policy that holds the limit: a
    perplexity ratio has an upper one, an accuracy difference (percentage points) a lower one.
    """

    kind: str
    task: Task
    unit: Literal["perplexity", "accuracy"] = "perplexity"
    direction: Literal["lower", "higher"] = "lower"
    limits: Literal["pm_ratio", "accuracy"] = "pm_ratio"

    @property
    def is_accuracy(self) -> bool:
        """Whether answers are scored (right or wrong) and not next-token distributions."""
        return self.unit == "accuracy"


_PERPLEXITIES = (Metric(f"ppl_{task}", task) for task in get_args(Task))
#: the share of tokens that are the likeliest ones; of answers to questions alone (pairs) where it is called VQA
_ACCURACIES = (Metric(kind, "causal", "accuracy", "higher", "accuracy") for kind in ("accuracy", "vqa_accuracy"))
METRICS: dict[str, Metric] = {metric.kind: metric for metric in (*_PERPLEXITIES, *_ACCURACIES)}


def metric_of(kind: str) -> Metric:
    """Return the metric of that kind; DataError for an unknown one."""
    if kind not in METRICS:
        raise DataError(f"metric kind is {kind!r}; expected one of: {', '.join(METRICS)}")
    return METRICS[kind]

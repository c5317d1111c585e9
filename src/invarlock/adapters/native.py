"""Running a packed model by its format's own runtime, and the proof that the runtime and our reader read the same weights.

The model stays the dense one, whose weights the guards read (bitsandbytes repacks its own at the first forward); its packed
layers hand their inputs to those of the runtime, so that what the runtime does to activations shows too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from invarlock.checkpoints.packed import PackedFolder, packing_facts
from invarlock.checkpoints.quiet import quiet_transformers
from invarlock.core.api import ModelLike
from invarlock.core.exceptions import ModelLoadError
from invarlock.core.files import first_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

__all__ = ["attach", "execution_facts", "hand_over", "said", "same_model"]

#: `quant_method` -> the package that runs it on any device. Others compute from dequantized weights here too.
_RUNTIMES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors", "torchao": "torchao"}
#: mean KL in nats between runtime and reader. Weight-only kernels differ by the order of their sums; rounding activations
#: to 8 bits was seen to cost 3e-4 (integers) to 1.5e-3 (floats); zero points read one off cost 3e-2
_SAME, _SAME_BUT_ACTIVATIONS = 1e-3, 1e-2
_TAKEN_OVER = 1e-6  # what is left between the runtime's model and ours once its layers are ours
_TOKENS = 256
#: how a runtime says that it lacks a kernel, a package or a kind of layer: the dense weights still run
_LACKING = (ImportError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError)
_facts: WeakKeyDictionary[ModelLike, dict[str, Any]] = WeakKeyDictionary()


def execution_facts(model: ModelLike) -> dict[str, Any]:
    """Return what a report says of the runtime that executes a model; {} where none was tried."""
    return _facts.get(model, {})


def said(model: ModelLike, facts: dict[str, Any]) -> None:
    """Keep what a report says of the runtime that executes a model."""
    _facts[model] = facts


def attach(model: PreTrainedModel, folder: Path, token_ids: Sequence[int], **options: Any) -> None:
    """Have the format's own runtime execute the packed layers of `model`, where it is installed and runs them here.

    `token_ids`: a text that both must read alike; `options` go to `from_pretrained`. Raises ModelLoadError where they do not.
    """
    packing = packing_facts(folder)
    package = _RUNTIMES.get(str(packing.get("quant_method")))
    if package is None or importlib.util.find_spec(package) is None:
        return
    try:
        logging.getLogger(package).setLevel(logging.ERROR)  # for good: it speaks at every forward
        told = io.StringIO()  # bars of progress
        with quiet_transformers(), warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(told):
            native = type(model).from_pretrained(
                folder, local_files_only=True, device_map={"": model.device}, **options
            )
            packed = _packed_modules(folder)
            for name, parameter in native.named_parameters():  # a loader may keep the file's type in what is not packed
                if name.rpartition(".")[0] not in packed and parameter.is_floating_point():
                    parameter.data = parameter.data.to(model.dtype)
            facts = hand_over(model, native.eval(), packed, token_ids, packing["rounds_activations"])
    except ModelLoadError as error:
        raise ModelLoadError(f"{folder} ({package}): {error}") from None
    except _LACKING as error:
        why = f"{package} does not run it here ({first_line(error)})"
        _facts[model] = {"notes": [*packing["notes"], f"{why}; its dequantized weights were executed"]}
        return
    version = metadata.version(package.replace("_", "-"))
    _facts[model] = {"executed": "native", "notes": [], "runtime": {"package": package, "version": version, **facts}}


def same_model(
    model: Callable[..., Any], native: Callable[..., Any], token_ids: Sequence[int], rounds_activations: bool
) -> tuple[float, int]:
    """Return the mean KL of a reader's model from the runtime's, and on how many tokens. Raises ModelLoadError where it is no
    rounding, and ValueError where it cannot be told."""
    ids, limit = token_ids[:_TOKENS], _SAME_BUT_ACTIVATIONS if rounds_activations else _SAME
    told, found = (_log_probs(one, ids) for one in (native, model))
    if not found.isfinite().all():  # a damaged model, which is to be judged and not refused
        raise ValueError("the model computes what is not finite")
    kl = _divergence(told, found)
    if not kl <= limit:
        raise ModelLoadError(
            f"its runtime and the reader of this package differ by a mean KL of {kl:.2g} on {len(ids)} tokens; expected "
            f"at most {limit:g}: one of the two misreads it"
        )
    return kl, len(ids)


def hand_over(
    model: Module, native: Module, packed: set[str], token_ids: Sequence[int], rounds_activations: bool
) -> dict[str, float]:
    """Let the modules of `native` that are named `packed` compute those of `model`; return by how much the two differed.

    Raises ModelLoadError where they read another model, and ValueError where not all of the runtime can be taken over.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    kl, count = same_model(model, native, token_ids, rounds_activations)
    ours, theirs = (dict(one.named_modules()) for one in (model, native))
    if odd := [n for n in sorted(packed) if n not in theirs or not isinstance(ours.get(n), torch.nn.Linear | Conv1D)]:
        raise ValueError(f"{odd[0]} is no linear layer")
    for name in packed:
        ours[name].forward = theirs[name].__call__  # not its `forward`: what unpacks it at first use is a hook
    left = _divergence(_log_probs(native, token_ids[:_TOKENS]), _log_probs(model, token_ids[:_TOKENS]))
    if not left <= _TAKEN_OVER:
        for name in packed:
            del ours[name].forward
        raise ValueError("more of it than its linear layers is packed")
    return {"kl": kl, "tokens": count}


def _packed_modules(folder: Path) -> set[str]:
    return {name.removesuffix(".weight") for name in PackedFolder(folder, None).parts().values()}


def _log_probs(model: Callable[..., Any], token_ids: Sequence[int]) -> Tensor:
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([token_ids])).logits.double().cpu(), -1)


def _divergence(told: Tensor, found: Tensor) -> float:
    return float((told.exp() * (told - found)).sum(-1).mean())

"""How near the estimated divergence is to the exact one, how it varies with the draws, and what it takes on disk.

    python -m benchmarks.divergence [MODEL ...]     every trained model at 8, 4, 3 and 2 bits, and with a zeroed matrix

`estimate`, `sd`: of the exact mean KL, over `SEEDS` drawings of tail ids on the same tokens; `bound`: the lower bound of
the distributions coarsened to the same ids; `heaviest`: the largest q / p of an id that was drawn; `share`: of the
estimate, of its heaviest token; `quarters`: mean KL in the first quarter of a window over that in the last one.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.faults.__main__ import MODELS

from invarlock.adapters import HF_Auto_Adapter
from invarlock.edits import RTNQuantEdit
from invarlock.eval.data import get_provider
from invarlock.eval.divergence import kl_and_flips, reference_rows
from invarlock.evidence.reference import TokenReference, joined, write_reference
from invarlock.evidence.windows import mask_tokens, windows_from_provider

SEEDS = 20
WINDOWS, SEQ_LEN = 32, 128


def _log_probs(model: Any, task: str, windows: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The log-probabilities and labels of every window's scored tokens."""
    found, labels = [], []
    for window in windows:
        ids = torch.tensor([window.input_ids])
        target = torch.tensor(window.labels if window.labels is not None else window.input_ids)
        with torch.inference_mode():
            if task == "seq2seq":
                logits = model(input_ids=ids, labels=target[None]).logits[0]
            else:
                logits = model(input_ids=ids).logits[0]
        if task == "causal":
            logits, target = logits[:-1], target[1:]
        kept = target != -100
        found.append(logits[kept].float().log_softmax(-1))
        labels.append(target[kept])
    return found, labels


def _zeroed(model: Any) -> None:
    name, weight = max(
        model.named_parameters(), key=lambda item: (item[1].ndim == 2) * ("2" in item[0]) * item[1].numel()
    )
    with torch.no_grad():
        weight.zero_()


EDITS: dict[str, Callable[[Any], object]] = {
    **{
        f"{bits} bits": lambda model, bits=bits: RTNQuantEdit(bitwidth=bits).apply(model, None) for bits in (8, 4, 3, 2)
    },
    "zeroed": _zeroed,
}


def _estimates(
    before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor
) -> tuple[list[torch.Tensor], float, torch.Tensor]:
    """The KL of every token by every seed, the heaviest ratio drawn, and the lower bound on the same ids."""
    generator, found, heaviest = torch.Generator().manual_seed(1), [], 0.0
    for _ in range(SEEDS):
        place = torch.rand(len(labels), generator=generator, dtype=torch.float64)
        rows = reference_rows(before, labels, place)
        found.append(kl_and_flips(rows, after, labels)[0])
        assert rows.tail_ids is not None and rows.tail_log_probs is not None
        heaviest = max(heaviest, float((after.gather(-1, rows.tail_ids.long()) - rows.tail_log_probs).exp().max()))
    bare = TokenReference(rows.ids, rows.log_probs, rows.label_log_prob)
    return found, heaviest, kl_and_flips(bare, after, labels)[0]


def main() -> None:
    heads = ("exact", "estimate", "sd", "bound", "heaviest", "share", "quarters")
    print(f"{'model':<6} {'edit':<7} " + " ".join(f"{head:>9}" for head in heads))
    for name in sys.argv[1:] or MODELS:
        adapter = HF_Auto_Adapter()
        model = adapter.load_model(str(MODELS[name]), device="cpu")
        task, tokenizer = adapter.task, adapter.tokenizer(str(MODELS[name]))
        spec = {"kind": "seq2seq", "task": "reverse"} if task == "seq2seq" else "python_docs"
        parts = get_provider(spec).windows(tokenizer, preview_n=WINDOWS, final_n=1, seq_len=SEQ_LEN)
        cut = windows_from_provider(*parts, SEQ_LEN, (WINDOWS, 1))
        if task == "mlm":
            cut = mask_tokens(cut, tokenizer.mask_token_id, tokenizer.all_special_ids, seed=42)
        old, labels = _log_probs(model, task, cut.preview)
        for edit, change in EDITS.items():
            subject = copy.deepcopy(model)
            change(subject)
            new, _ = _log_probs(subject, task, cut.preview)
            before, after, target = torch.cat(old), torch.cat(new), torch.cat(labels)
            exact = (before.double().exp() * (before.double() - after.double())).sum(-1)
            found, heaviest, bound = _estimates(before, after, target)
            means = torch.stack([kl.mean() for kl in found]) / exact.mean()
            share = float(found[0].max() / found[0].sum())
            place = torch.cat([torch.arange(len(x)) / len(x) for x in labels])
            quarters = float(exact[place < 0.25].mean() / exact[place >= 0.75].mean())
            bounded = float(bound.mean() / exact.mean())
            shown = (float(exact.mean()), float(means.mean()), float(means.std()), bounded, heaviest, share, quarters)
            print(f"{name:<6} {edit:<7} " + " ".join(f"{value:9.4g}" for value in shown), flush=True)
    rows = reference_rows(old[0], labels[0], torch.zeros(len(labels[0]), dtype=torch.float64))
    with tempfile.TemporaryDirectory() as folder:
        facts = write_reference(replace(joined([rows] * 50)), Path(folder) / "rows")
    print(f"{facts.bytes_per_token:.0f} bytes a token")


if __name__ == "__main__":
    main()

"""Certify tiny random models of many architectures against themselves, at 8 bits and broken; print and store the table.

    python -m benchmarks.architectures [--only llama ...] [--windows 12]

Every model has two layers and random weights (large ones, so that its distributions are not flat) and the tokenizer of a
model of tests/assets. Expected: itself PASS with a ratio of exactly 1; 8 bits what random weights make of them, mostly
PASS; two experts of a router swapped FAIL, with the router named; a model of images and text is refused by name. Rows go to
benchmarks/results/architectures.txt and .json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from invarlock.core.exceptions import InvarlockError
from invarlock.flow.certify import CertifyRequest, certify

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("architecture", "class", "against", "ratio", "kl", "flips", "verdict", "named", "seconds")
Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """One architecture: its class, what its configuration has beyond `SMALL`, whose tokenizer it takes, and what of
    `SMALL` it computes itself."""

    name: str
    config: dict[str, Any] = {}
    tokenizer: str = "llama"
    without: tuple[str, ...] = ()


SMALL = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_TINY_T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_TINY_BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.1, "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}  # fmt: skip
_TINY_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
CASES = {
    "llama": Case("LlamaForCausalLM"),
    "mistral": Case("MistralForCausalLM", {"sliding_window": 32}),
    "gemma2": Case("Gemma2ForCausalLM", {"sliding_window": 32, "attn_logit_softcapping": 50.0}),
    "gemma3_text": Case("Gemma3ForCausalLM", {"sliding_window": 32, "sliding_window_pattern": 2}),
    "gemma3": Case("Gemma3ForConditionalGeneration", {"text_config": SMALL, "vision_config": _TINY_VISION}),
    "qwen2": Case("Qwen2ForCausalLM"),
    "qwen3": Case("Qwen3ForCausalLM"),
    "qwen2_moe": Case("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", _EXPERTS),
    "mixtral": Case("MixtralForCausalLM", _EXPERTS),
    "gpt_oss": Case("GptOssForCausalLM", {**_EXPERTS, "sliding_window": 32}),
    "mamba": Case("MambaForCausalLM", {"state_size": 8}),
    "mamba2": Case("Mamba2ForCausalLM", {"state_size": 16, "num_heads": 8, "n_groups": 2, "chunk_size": 32}),
    "falcon": Case(
        "FalconForCausalLM", {"new_decoder_architecture": False, "multi_query": True}, without=("head_dim",)
    ),
    "phi": Case("PhiForCausalLM"),
    "opt": Case("OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "bloom": Case("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "gpt_neox": Case("GPTNeoXForCausalLM"),
    "gpt2": Case("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "bert": Case("BertForMaskedLM", tokenizer="bert"),
    "roberta": Case("RobertaForMaskedLM", {"max_position_embeddings": 300, "pad_token_id": 1}, "bert"),
    "t5": Case("T5ForConditionalGeneration", {**_TINY_T5, "eos_token_id": 1}, "t5"),
    "bart": Case("BartForConditionalGeneration", {**_TINY_BART, "eos_token_id": 1}, "t5"),
}


def build(kind: str, case: Case, target: Path) -> Path:
    """Write a random model of an architecture."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key not in case.without}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **case.config})
    getattr(transformers, case.name)(config).eval().save_pretrained(target)
    for path in (ROOT / "tests" / "assets" / "models" / case.tokenizer).glob("tokenizer*"):
        shutil.copyfile(path, target / path.name)
    return target


def eight_bits(tensors: Tensors) -> Tensors | None:
    """Round every matrix to 255 levels a row."""
    return {name: _rounded(t) if t.ndim > 1 and t.is_floating_point() else t for name, t in tensors.items()}


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    step = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
    return (tensor / step).round() * step


def swapped_experts(tensors: Tensors) -> Tensors | None:
    """Swap two rows of the last router, so that its tokens go to each other's experts; None for a model without one."""
    routers = [n for n, t in tensors.items() if n.endswith(("gate.weight", "router.weight")) and len(t) == 4]
    if not routers:
        return None
    router = tensors[routers[-1]].clone()
    router[[0, 1]] = router[[1, 0]]
    return {**tensors, routers[-1]: router}


CHANGES: dict[str, Callable[[Tensors], Tensors | None]] = {"8 bits": eight_bits, "swapped experts": swapped_experts}


def subjects(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "itself", folder
    tensors = load_file(folder / "model.safetensors")
    for name, change in CHANGES.items():
        if (changed := change(tensors)) is not None:
            target = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-{name}")))
            save_file({n: t.contiguous() for n, t in changed.items()}, target / "model.safetensors", {"format": "pt"})
            yield name, target


def judged(subject: Path, baseline: Path, windows: int, out: Path, provider: str) -> dict[str, Any]:
    """Certify, and return what the table shows of it."""
    sizes = {"sample": {"preview": windows, "final": windows}, "bootstrap": {"replicates": 200}}
    request = CertifyRequest(
        str(subject), str(baseline), profile="dev", overrides=sizes, out=out, cache=False,
        dataset={"provider": provider, "seq_len": 96},
    )  # fmt: skip
    started = time.perf_counter()
    try:
        certificate = certify(request).certificate
    except InvarlockError as error:
        return {
            "verdict": type(error).__name__,
            "named": str(error).replace(f"{out.parent}/", "")[:100],
            "seconds": time.perf_counter() - started,
        }
    divergence = certificate.get("divergence") or {}
    reasons = certificate["verdict"]["reasons"]
    return {
        "ratio": certificate["primary_metric"]["ratio_vs_baseline"],
        "kl": divergence.get("kl_mean"),
        "flips": divergence.get("flip_rate"),
        "verdict": certificate["verdict"]["status"],
        "named": next((r["tensor"] for r in reasons if r["tensor"]), None) or ", ".join(r["code"] for r in reasons),
        "seconds": time.perf_counter() - started,
    }


def table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [COLUMNS, *(tuple(cell(row.get(column)) for column in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=12, help="preview windows, and as many final")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for kind, case in CASES.items():
            if given.only and kind not in given.only:
                continue
            baseline = build(kind, case, Path(work) / kind)
            for against, subject in subjects(baseline):
                provider = "seq2seq" if case.tokenizer == "t5" else "python_docs"
                found = judged(subject, baseline, given.windows, Path(work) / "runs", provider)
                rows.append({"architecture": kind, "class": case.name, "against": against, **found})
                print(table(rows).splitlines()[-1], flush=True)
    if not given.only:
        (RESULTS / "architectures.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "architectures.txt").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()

"""Certify every format against itself, against its original, and damaged inside; print the table and store it.

    python -m benchmarks.formats CHECKPOINTS [--only llama-gptq ...] [--windows 12] [--kinds 1]

CHECKPOINTS holds one folder a format and their original, `llama` (`gptoss-dense` for `gptoss-*`). A model that is meant
to differ (an adapter) is certified with intent finetune. Damaged is a copy with one change inside one packed matrix. Rows
go to benchmarks/results/formats.json as they come, and the table to formats.txt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MATRICES = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.down_proj")  # the last that a model has
COLUMNS = (
    "format",
    "against",
    "read",
    "executed",
    "reader KL",
    "ratio",
    "kl",
    "verdict",
    "named",
    "seconds",
    "peak MB",
)
_SCALES = ("scales", "SCB", "weight_scale", "weight_scale_inv", "_weight_scale")
_CODES = ("qweight", "weight_packed", "_weight_qdata", "weight", "_blocks")
_ZEROS = ("qzeros", "weight_zero_point", "_weight_zero_point")
_EXPONENTS = ("_scales",)  # of two, in a byte

Change = Callable[[Any], Any]


def _with(value: float) -> Change:
    def change(tensor: Any) -> Any:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


#: what is done to the stored parts of one matrix, by the names of the parts
DAMAGE: dict[str, dict[tuple[str, ...], Change]] = {
    "sign of scales": {_SCALES: lambda t: -t, ("_blocks",): lambda t: t ^ 0x88},
    "scales x 4": {_SCALES: lambda t: t.float().mul(4).to(t.dtype), _EXPONENTS: lambda t: t + 2},
    "NaN scale": {_SCALES: _with(float("nan")), _EXPONENTS: _with(255)},
    "shuffled codes": {_CODES: lambda t: t.flip(0)},
    "zero points off by one": {_ZEROS: lambda t: t + (0x11111111 if t.element_size() == 4 else 1)},
    "shuffled group index": {("g_idx", "weight_g_idx"): lambda t: t.roll(len(t) // 2 + 5)},
    "zero points of another version": {},  # of the configuration: see `_other_version`
}


def _damaged(folder: Path, kind: str, target: Path) -> Path | None:
    """Return a copy with one part of one matrix changed; None where the format has no such part."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    settings = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    tensors = load_file(folder / "model.safetensors")
    matrix = next(m for m in reversed(MATRICES) if any(name.startswith(m) for name in tensors))
    parts = {name.removeprefix(matrix).removeprefix("."): name for name in tensors if name.startswith(matrix)}
    changes = [(parts[n], how) for names, how in DAMAGE[kind].items() for n in names if n in parts]
    version = _other_version(settings) if kind == "zero points of another version" else None
    if not changes and version is None:
        return None
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    if version is not None:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "quantization_config": version}))
        return target
    name, change = changes[0]
    tensors[name] = change(tensors[name]).contiguous()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, target / "model.safetensors", metadata=metadata)
    return target


def _other_version(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of a GPTQ file that says of its zero points that they are stored in the other way."""
    key = {"gptq": "checkpoint_format", "auto-round": "packing_format"}.get(settings.get("quant_method", ""))
    if key is None or "awq" in settings.get(key, ""):
        return None
    plain = ("gptq", "gptq_v2") if key == "checkpoint_format" else ("auto_round:auto_gptq", "auto_round")
    return {**settings, key: plain[0] if settings.get(key) in (plain[1], "auto_round:gptqmodel") else plain[1]}


def _certify(subject: Path, baseline: Path, intent: str, windows: int, out: Path) -> dict[str, Any]:
    """Certify and return a row's figures; a baseline that was measured before is taken from its report under `out`."""
    from invarlock.core.exceptions import InvarlockError
    from invarlock.flow.certify import CertifyRequest, certify

    sample = {"sample": {"preview": windows, "final": windows}, "bootstrap": {"replicates": 200}}
    data = {"provider": "python_docs", "seq_len": 96}
    found = sorted((out / baseline.name).glob("source/*/report.json")) if subject != baseline else []
    request = CertifyRequest(
        subject=str(subject), baseline=None if found else str(baseline), baseline_report=found[0] if found else None,
        intent=intent, profile="dev", dataset={} if found else data, overrides=sample, out=out / baseline.name,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        certificate = certify(request).certificate
    except InvarlockError as error:
        return {"verdict": type(error).__name__, "named": str(error)[:120], "seconds": time.perf_counter() - started}
    reasons = certificate["verdict"]["reasons"]
    facts = certificate["meta"]["subject_model"]["describe"]
    divergence = certificate.get("divergence") or {}
    return {
        "read": facts.get("quant_method")
        or (facts.get("adapter") or {}).get("kind")
        or ("as it is" if facts else None),
        "executed": facts.get("executed", "native" if facts else "refused first"),
        "reader KL": (facts.get("runtime") or {}).get("kl"),
        "ratio": certificate["primary_metric"]["ratio_vs_baseline"],
        "kl": divergence.get("kl_mean"),
        "verdict": certificate["verdict"]["status"],
        "named": next((r["tensor"] for r in reasons if str(r["tensor"]).startswith(MATRICES)), None)
        or next((r["tensor"] or r["code"] for r in reasons), ""),
        "seconds": time.perf_counter() - started,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _cases(root: Path, only: list[str], kinds: int, work: Path) -> Any:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and (not only or path.name in only)]
    for place, folder in enumerate(folders):
        baseline = root / ("gptoss-dense" if folder.name.startswith("gptoss") else "llama")
        adapter = (folder / "adapter_config.json").is_file()
        yield folder.name, "itself", folder, folder, "preserve"
        if folder == baseline:
            continue
        yield folder.name, "its original", folder, baseline, "finetune" if adapter else "preserve"
        turned = [*DAMAGE][place % len(DAMAGE) :] + [*DAMAGE][: place % len(DAMAGE)]
        made = (
            (kind, _damaged(folder, kind, work / f"{folder.name}-{place}-{kind}")) for kind in turned if not adapter
        )
        for kind, damaged in itertools.islice((one for one in made if one[1]), kinds):
            yield folder.name, f"damaged: {kind}", damaged, baseline, "preserve"


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    cells = [[cell(row.get(column)) for column in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in (COLUMNS, *cells)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=12, help="preview windows, and as many final")
    parser.add_argument("--kinds", type=int, default=len(DAMAGE), help="kinds of damage a format, in turn")
    given = parser.parse_args()
    import torch  # noqa: F401 - each certification is a child of this process, for a peak of its own
    import transformers.models.llama.modeling_llama  # noqa: F401

    import invarlock.flow.certify  # noqa: F401

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, against, *pair in _cases(given.checkpoints.resolve(), given.only, given.kinds, Path(work)):
            found = pool.apply(_certify, (*pair, given.windows, Path(work) / "runs"))
            rows.append({"format": name, "against": against, **found})
            print(_table(rows).splitlines()[-1], flush=True)
            (RESULTS / "formats.json").write_text(json.dumps(rows, indent=1) + "\n")
            (RESULTS / "formats.txt").write_text(_table(rows) + "\n")


if __name__ == "__main__":
    main()

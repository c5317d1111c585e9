"""How far the coarsened divergence lies below the exact one, and what its evidence takes on disk.

    python -m benchmarks.divergence          every trained model at 8, 4, 3 and 2 bits, about two minutes

Both figures come from one certificate, over the windows whose whole distributions were kept; KL in nats per token.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.faults.__main__ import MODELS

from invarlock.flow.certify import CertifyRequest, certify

BITS = (8, 4, 3, 2)


def measure(folder: Path, bits: int, out: Path) -> dict[str, Any]:
    outcome = certify(
        CertifyRequest(
            subject=str(folder),
            baseline=str(folder),
            edit={"name": "quant_rtn", "plan": {"bitwidth": bits}},
            profile="dev",
            dataset={"seq_len": 128},
            out=out,
        )
    )
    assert outcome.source_report is not None
    token_file = json.loads(outcome.source_report.read_text(encoding="utf-8"))["evidence"]["token_file"]
    return {**outcome.certificate["divergence"], "bytes_per_token": token_file["bytes_per_token"]}


def main() -> None:
    print(f"{'model':<6} {'bits':>4} {'exact':>10} {'coarsened':>10} {'share':>6} {'windows':>8} {'bytes/token':>12}")
    for name, folder in MODELS.items():
        for bits in BITS:
            with tempfile.TemporaryDirectory() as out:
                found = measure(folder, bits, Path(out))
            exact, coarsened = found["kl_exact_mean"], found["kl_coarsened_there"]
            figures = f"{exact:10.3g} {coarsened:10.3g} {coarsened / exact:6.2f}"
            print(f"{name:<6} {bits:>4} {figures} {found['kl_exact_windows']:>8} {found['bytes_per_token']:>12.0f}")


if __name__ == "__main__":
    main()

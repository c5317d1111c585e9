"""`invarlock demo`: certify a good and a bad edit of the packaged model, offline."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Option

from invarlock.cli.console import progress, say, width
from invarlock.cli.errors import VERDICT_CODES
from invarlock.core.exceptions import InvarlockError
from invarlock.flow.certify import CertifyRequest, certify
from invarlock.reporting.bundle import HTML, claimed, write_bundle
from invarlock.reporting.terminal import summary_lines

__all__ = ["DEMO_EDITS", "demo"]

#: label, bits, and the verdict that a trained model gets for real
DEMO_EDITS = (("8-bit", 8, "PASS"), ("2-bit", 2, "FAIL"))


def demo(out: Annotated[Path, Option(help="Folder for the two certificates.")] = Path("demo-out")) -> int:
    """Round the weights of a small trained model to 8 and to 2 bits, and certify both against the original.

    Everything runs offline, in under a minute on two cores. The exit code is 0 when the verdicts are those that the two
    edits deserve: PASS and FAIL.
    """
    model = str(resources.files("invarlock.data").joinpath("demo_model"))
    measured: Path | None = None  # the baseline's report, once there is one
    pages = []
    for label, bits, expected in DEMO_EDITS:
        request = CertifyRequest(
            subject=model,
            baseline=None if measured else model,
            baseline_report=measured,
            profile="ci_cpu",
            dataset={"provider": "python_docs", "seq_len": 160},
            edit={"name": "quant_rtn", "plan": {"bitwidth": bits}},
            edit_label=label,
            out=out / "runs",
        )
        with claimed(out / label), progress("demo", passes=1 if measured else 2) as tick:
            outcome = certify(request, tick)
            pages.append(write_bundle(outcome.certificate, out / label)[HTML])
        measured = outcome.source_report
        say(f"$ invarlock certify --baseline demo --subject demo-{label}")
        say("\n".join(summary_lines(outcome.certificate, out / label, width())))
        say(f"exit code {VERDICT_CODES[outcome.status]}\n")
        if outcome.status != expected:
            raise InvarlockError(f"the {label} edit of the demo model got {outcome.status}; expected {expected}")
    say("Look at the two certificates:")
    for page in pages:
        say(f"  {page}")
    return 0

"""Several processes measure together: the same certificate on any number, and a rank that dies costs what it had begun."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

#: certifies as one rank; `dies` names the batch before which this rank is killed; what it computed is counted
_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from invarlock.cli.errors import report_error
from invarlock.eval.sources import ranked
from invarlock.flow.certify import CertifyRequest, certify

given = json.loads(sys.argv[1])
saved, computed = ranked._save, []

def save(part, path):
    if given["dies"] == [int(os.environ["RANK"]), path.stem]:
        os.kill(os.getpid(), signal.SIGKILL)
    computed.append(path.stem)
    saved(part, path)

ranked._save = save
ranked.RankedSource.__init__.__kwdefaults__["batch_tokens"] = 192
try:
    outcome = certify(CertifyRequest(**{**given["request"], "out": Path(given["out"])}))
except Exception as error:
    sys.exit(report_error(error))
print(json.dumps({"certificate": outcome.certificate, "computed": len(computed)}))
"""


Launch = Callable[..., list[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def launch(demo_model: Path, text_file: Path) -> Launch:
    """Certify the demo model against itself on `world` ranks; `dies` is (rank, batch)."""

    def run(world: int, out: Path, dies: tuple[int, str] | None = None) -> list[subprocess.CompletedProcess[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
        data = {"provider": "local_jsonl", "file": str(text_file), "seq_len": 48}
        few = {"sample": {"preview": 8, "final": 8}, "bootstrap": {"replicates": 50}}
        request = {"subject": str(demo_model), "baseline": str(demo_model), "profile": "dev", "dataset": data}
        given = json.dumps({"request": {**request, "overrides": few}, "out": str(out), "dies": dies})
        shared = {**os.environ, **place, "INVARLOCK_RANK_TIMEOUT": "120", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, given],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        said = [process.communicate(timeout=250) for process in ranks]
        return [subprocess.CompletedProcess((), p.returncode, *text) for p, text in zip(ranks, said, strict=True)]

    return run


def _figures(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The certificate without times and ids."""
    assert process.returncode == 0, process.stderr
    certificate: dict[str, Any] = json.loads(process.stdout)["certificate"]
    for place, key in (("meta", "created"), ("baseline_ref", "run_id"), ("telemetry", "timings")):
        del certificate[place][key]
    del certificate["run_id"]
    return certificate


def test_any_number_of_ranks_gives_the_same_certificate_and_a_lost_one_is_named(launch: Launch, tmp_path: Path) -> None:
    (leader,) = launch(1, tmp_path / "alone")
    alone, batches = _figures(leader), json.loads(leader.stdout)["computed"]
    assert alone["verdict"]["status"] == "PASS"

    survivor, killed = launch(2, tmp_path / "two", dies=(1, "00003"))
    assert killed.returncode == -9 and survivor.returncode not in (0, 130)
    assert "RANK-LOST" in survivor.stderr and "--out" in survivor.stderr
    kept = len(list((tmp_path / "two" / ".partial").rglob("*.safetensors")))
    assert kept >= 2

    first, second = launch(2, tmp_path / "two")
    assert _figures(first) == alone, "the same bits on two ranks, whatever was kept"
    assert second.returncode == 0
    assert sum(json.loads(one.stdout)["computed"] for one in (first, second)) == batches - kept
    assert len(list((tmp_path / "two").rglob("report.json"))) == 2, "the leader alone writes"
    assert not (tmp_path / "two" / ".partial").exists()

    assert _figures(launch(3, tmp_path / "three")[0]) == alone

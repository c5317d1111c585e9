"""A gate on a new figure per window: a column, a gate and a limit. What was certified before keeps verifying.

A source file computes the figure (`eval/sources/torch_model.py`); here it is made up.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from invarlock.policy.resolve import resolve_policy

ROOT = Path(__file__).parents[2]

#: file -> (anchor, what is put before it)
EDITS = {
    "evidence/rows.py": (
        '    Column("correct",',
        '    Column("entropy", "number", "side", "mean entropy of the next-token distribution, nats"),\n',
    ),
    "certificate/gates.py": (
        '    GateKind("token_flips",',
        '    GateKind("entropy", _entropy, symptom=True),\n',
    ),
    "data/tiers.yaml": (
        "    accuracy: &accuracy",
        "    entropy: &entropy {rise_max: 0.2}\n",
    ),
}
GATE = """
def _entropy(m: Measured) -> Outcome | None:
    limits = m.limits.metrics.get("entropy")
    if limits is None or m.rows is None or m.rows["subject_entropy"] is None:
        return None
    rise = float((m.rows.need("subject_entropy") - m.rows.need("baseline_entropy")).mean())
    decision: GateDecision = "pass" if rise <= limits["rise_max"] else "fail"
    return Outcome(rise, limits["rise_max"], "point estimate", decision, f"entropy rose by {rise:.3f} nats")


@dataclass(frozen=True)
class GateKind:"""
TRIAL = """
import copy, json, pathlib, sys
import invarlock
from certificates import certify, make_evidence
from invarlock.assurance import verify_certificate
from invarlock.evidence.rows import WindowRows

assert pathlib.Path(invarlock.__file__).is_relative_to(sys.argv[1])


def with_entropy(evidence, value):
    def rows(old):
        data = {k: v for k, v in old.model_dump().items() if v is not None and not k.endswith("_ids")}
        return WindowRows.of(old.window_ids, old.document_ids, {**data, "entropy": [value] * len(old.tokens)})

    return evidence.model_copy(update={"preview": rows(evidence.preview), "final": rows(evidence.final)})


for value, decision in ((2.1, "pass"), (2.5, "fail")):
    made = certify(with_entropy(make_evidence(), 2.0), with_entropy(make_evidence(kl=0.001), value))
    made = json.loads(json.dumps(made))
    assert {g["name"]: g["decision"] for g in made["gates"]}["entropy"] == decision
    assert verify_certificate(made).intact
    forged = copy.deepcopy(made)
    forged["evaluation_windows"]["final"]["subject_entropy"][0] = 0.5
    assert not verify_certificate(forged).intact
assert "entropy" not in {g["name"] for g in certify(make_evidence(), make_evidence(kl=0.001))["gates"]}
for path in pathlib.Path(sys.argv[2]).glob("*.json"):
    if not path.name.endswith(".report.json"):
        assert verify_certificate(json.loads(path.read_text())).intact, path.name
print("held")
"""


@pytest.mark.slow
def test_a_gate_on_a_new_figure_is_one_entry_each_in_three_files(tmp_path: Path) -> None:
    package = tmp_path / "invarlock"
    shutil.copytree(ROOT / "src" / "invarlock", package, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    data = package / "data"
    version = resolve_policy().tiers_version
    before = data / "tiers" / str(version)  # the version before stays as it was
    shutil.copytree(data / "profiles", before / "profiles")
    shutil.copyfile(data / "tiers.yaml", before / "tiers.yaml")
    for name, (anchor, addition) in EDITS.items():
        text = (package / name).read_text(encoding="utf-8")
        assert text.count(anchor) == 1, name
        (package / name).write_text(text.replace(anchor, addition + anchor), encoding="utf-8")
    tiers = (data / "tiers.yaml").read_text(encoding="utf-8").replace(f"version: {version}", f"version: {version + 1}")
    tiers = tiers.replace("      accuracy: *accuracy", "      accuracy: *accuracy\n      entropy: *entropy")
    tiers = tiers.replace("      accuracy: {<<", "      entropy: *entropy\n      accuracy: {<<")
    (data / "tiers.yaml").write_text(tiers, encoding="utf-8")
    gates = package / "certificate" / "gates.py"
    text = gates.read_text(encoding="utf-8")
    gates.write_text(text.replace("\n@dataclass(frozen=True)\nclass GateKind:", GATE), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", TRIAL, str(tmp_path), str(ROOT / "tests" / "assets" / "certificates")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "held"), done.stderr

"""Generated pages agree with the code, links lead somewhere, and facts that pages repeat are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from invarlock.certificate.third import GATE_NAMES

from .pages import DOCS, ROOT

ERRORS = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "build_docs.py"), "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_and_no_link_is_broken(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reference" / "cli.html").is_file()


def test_every_pairing_code_of_the_source_is_explained() -> None:
    used = {code for path in (ROOT / "src").rglob("*.py") for code in re.findall(r'"(E\d{3})"', path.read_text())}
    assert used and used == set(re.findall(r"^\| `(E\d{3})`", ERRORS, re.MULTILINE))


def test_every_section_of_a_certificate_is_described() -> None:
    from invarlock.certificate.schema import Certificate

    page = (DOCS / "reference" / "certificates.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+)`", page)) | {"schema_version", "run_id"}
    assert set(Certificate.model_fields) <= described


def test_the_divergence_page_has_the_limits_of_the_tiers() -> None:
    from invarlock.policy.resolve import TIERS, resolve_policy

    page = (DOCS / "assurance" / "05-divergence.md").read_text(encoding="utf-8")
    for tier in TIERS:
        limits = resolve_policy(tier, "ci").values["metrics"]["divergence"]
        assert f"| {tier} | {limits['kl_max']:.2f} | {100 * limits['flip_max']:.0f} % |" in page


def test_every_gate_of_the_code_stands_in_the_decision_rule() -> None:
    page = (DOCS / "assurance" / "04-decision-rule.md").read_text(encoding="utf-8")
    for name in GATE_NAMES:
        assert f"`{name}`" in page


def test_the_table_of_false_passes_is_that_of_the_interval() -> None:
    from invarlock.stats import studentised

    page = (DOCS / "assurance" / "03-ratio-and-interval.md").read_text(encoding="utf-8")
    figures = re.findall(r"0\.\d{3} \(0\.\d{3}\)", str(studentised.__doc__))
    assert len(figures) == 21 and figures == re.findall(r"0\.\d{3} \(0\.\d{3}\)", page)


def test_the_spectral_bounds_are_those_of_the_guard() -> None:
    from invarlock.guards import spectral

    page = (DOCS / "assurance" / "06-guards.md").read_text(encoding="utf-8")
    low, warn_low, warn_high, high = spectral._BOUNDS["row_norm"]
    assert f"| norm of a row or column | [{low:g}, {high:g}] | [{warn_low:g}, {warn_high:g}] |" in page
    low, warn_low, _, _ = spectral._BOUNDS["stable_rank"]
    assert f"below {low:g} | below {warn_low:g}" in page
    assert "| σ | [{:g}, {:g}] | — |".format(*(spectral._BOUNDS["sigma"][i] for i in (0, 3))) in page


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target

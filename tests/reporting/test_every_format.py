"""What holds for every format and every kind of certificate."""

from __future__ import annotations

import contextlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn import render_html

from invarlock import reporting
from invarlock.core.exceptions import CertificateError
from invarlock.reporting import (
    compare,
    explain,
    explanations,
    render_junit,
    render_markdown,
    summary_lines,
)
from invarlock.reporting.view import parse, view

Cert = Callable[[str], dict[str, Any]]
RENDERERS = (render_markdown, render_html, render_junit, explain)
NO_NUMBER = re.compile(r"(?<![\w.])(nan|-?inf|None|undefined)(?![\w.])")


def _plain(text: str) -> str:
    """Undo what the formats escape, and their line breaks."""
    return " ".join(html.unescape(re.sub(r"\\([\\`*_{}\[\]()#+!|~$])", r"\1", text)).split())


@pytest.mark.slow
@pytest.mark.parametrize("render", RENDERERS)
def test_verdict_names_and_every_gate_are_shown(render: Callable[..., str], each: dict[str, Any]) -> None:
    text = _plain(render(each))
    shown = view(parse(each))
    assert shown.status in text and shown.status == each["verdict"]["status"]
    assert len(shown.gates) == len(each["gates"]) >= 2
    for row in shown.gates:
        assert row.title[:28] in text  # long names of plugins are cut in the middle there
        assert row.measured in text
        assert _plain(row.why)[:60] in text or render is explain  # wrapped at 80 columns there


@pytest.mark.slow
@pytest.mark.parametrize("render", RENDERERS)
def test_no_number_reads_nan_inf_or_none(render: Callable[..., str], each: dict[str, Any]) -> None:
    text = re.sub(r"<style>.*?</style>", "", render(each), flags=re.DOTALL)
    assert not NO_NUMBER.findall(re.sub(r"[\w-]+: none|=\"none\"", "", text))


@pytest.mark.slow
@pytest.mark.parametrize("render", RENDERERS)
def test_the_same_certificate_gives_the_same_bytes(render: Callable[..., str], cert: Cert) -> None:
    render = reporting.render_html if render is render_html else render  # drawn anew
    assert render(cert("fail")) == render(cert("fail"))


@pytest.mark.parametrize("render", (*RENDERERS, summary_lines, explanations))
def test_what_is_no_certificate_is_refused(render: Callable[..., Any], cert: Cert) -> None:
    broken = cert("pass")
    del broken["verdict"]
    with pytest.raises(CertificateError, match="verdict"):
        render(broken)


@pytest.mark.slow
@pytest.mark.parametrize("render", RENDERERS)
def test_strange_recorded_facts_do_not_break_the_page(render: Callable[..., str], cert: Cert) -> None:
    strange = cert("fail")
    strange["spectral"]["facts"] = {
        "modules": ["x", {"name": 3, "sigma": "y"}, {"sigma": [0, 1]}, {"sigma": [1, 9e307]}]
    }
    strange["rmt"]["metrics"] = {"families": {"ffn": 7, "attn": {"baseline": "x"}}, "worst": None}
    strange["weights"]["changes"] = [{}, {"name": None, "rel_change": "x"}, {"rel_change": 10**400}]
    strange["dataset"]["windows"]["stats"] = {}
    strange["resolved_policy"] = {}
    strange["divergence"]["histogram"] = [1, 2]
    strange["rmt"]["errors"] = [{"message": None}]
    assert "FAIL" in render(strange)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "ratio"), [(60.0, 1e20), (700.0, 1e300), (-3.0, 0.06)])
def test_extreme_ratios_are_drawn(cert: Cert, loss: float, ratio: float) -> None:
    extreme = cert("fail")
    extreme["primary_metric"].update(ratio_vs_baseline=ratio, display_ci=[ratio / 2, ratio * 3])
    rows = extreme["evaluation_windows"]["final"]
    rows["subject_loss"] = [loss] * len(rows["subject_loss"])
    page = render_html(extreme)
    assert 'aria-labelledby="interval-title' in page and 'aria-labelledby="windows-title' in page


@pytest.mark.slow
def test_numbers_have_one_form_in_every_format(cert: Cert) -> None:
    passed = cert("pass")
    value = f"{passed['primary_metric']['ratio_vs_baseline']:.4f}"
    texts = [_plain(render(passed)) for render in RENDERERS]
    assert all(value in text for text in texts)
    assert value in compare([passed])


@pytest.mark.slow
def test_starting_imports_neither_torch_nor_a_plotting_library() -> None:
    code = (
        "import sys, invarlock.reporting\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("value", [True, 3, "x", [1], {}, None])
@pytest.mark.parametrize("render", [render_markdown, render_junit, explain])
def test_a_policy_of_another_kind_is_shown_or_refused_by_name(render: Callable[..., str], value: object) -> None:
    """A reader who shows an altered certificate gets its page or one of our errors."""
    frozen = json.loads((Path(__file__).parents[1] / "assets/certificates/pass_8bit.json").read_text(encoding="utf-8"))
    policy = frozen["resolved_policy"]
    for key in policy:
        for changed in ({**policy, key: value}, {**policy, key: {name: value for name in policy[key]}}):
            with contextlib.suppress(CertificateError):
                assert render({**frozen, "resolved_policy": changed})

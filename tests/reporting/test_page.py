"""The page in a browser, where there is one: nothing to complain of, nothing asked of a network, nothing cut off."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from invarlock.reporting import render_html

Cert = Callable[[str], dict[str, Any]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "tools" / "screenshots.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.browser() is None:
        pytest.skip("no chromium on this machine")
    return module


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_fits_and_says_nothing_on_the_console(
    tool: ModuleType, cert: Cert, width: int, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(cert("fail")), encoding="utf-8")
    # a frame of the width shows whether the page within would scroll: the policy of the page forbids scripts of its own
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<body style='margin:0'><iframe id=f src='page.html' style='border:0;width:{width}px;height:900px'></iframe>"
        "<script>onload=()=>{const d=f.contentDocument.documentElement;document.title=d.scrollWidth+' of '+d.clientWidth}"
        "</script>",
        encoding="utf-8",
    )
    command = [tool.browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=4000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None, done.stdout[:500]
    assert int(found[1]) <= int(found[2]) <= width
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.slow
def test_it_is_drawn_and_printed(tool: ModuleType, cert: Cert, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_html(cert("pass")), encoding="utf-8")
    for name in ("page.png", "page.pdf"):
        tool.picture(page, tmp_path / name, width=375, height=900, dark=True)
        assert (tmp_path / name).stat().st_size > 5000


def test_the_page_asks_nothing_of_a_network(each: dict[str, Any]) -> None:
    page = render_html(each)
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page) and "@import" not in page and "<script" not in page
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", page)


def test_the_page_leads_with_verdict_reason_and_next_step(each: dict[str, Any]) -> None:
    head = re.sub(r"\s+", " ", render_html(each).partition("<header")[2].partition("</header>")[0])
    assert each["verdict"]["status"] in head and 'class="why"' in head and "<code>" in head


def test_the_page_says_what_was_not_looked_at(each: dict[str, Any]) -> None:
    section = render_html(each).partition("What was not looked at")[2].partition("</section>")[0]
    assert "Derived:" in section and "Unsigned:" in section


def test_the_limit_of_the_divergence_is_on_the_chart_of_a_pass(cert: Cert) -> None:
    chart = render_html(cert("pass")).partition('aria-labelledby="divergence-title')[2].partition("</svg>")[0]
    assert re.search(r">limit 0\.1", chart)
    places = [float(x) for x in re.findall(r'<path d="M ([\d.]+) [\d.]+ L? ?\n?L?', chart)]
    assert all(0 <= x <= 540 for x in places)


def test_every_point_of_the_layers_names_its_module(cert: Cert) -> None:
    page = render_html(cert("fail"))
    if "layers-title" not in page:
        pytest.skip("this certificate compares too few modules")
    assert re.search(r"<title>[^<]+: weights, relative change [+-]", page)

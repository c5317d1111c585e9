"""The page in a browser, where there is one: nothing to complain of, nothing asked of a network, nothing cut off."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from drawn import render_html

from certificates import make_cert

Cert = Callable[[str], dict[str, Any]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The tool that takes pictures; in CI a browser must be there."""
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "tools" / "screenshots.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.browser() is None or shutil.which("pdftotext") is None:
        assert not os.environ.get("CI"), "no chromium or pdftotext in CI; .ci/run installs both"
        pytest.skip("no chromium or pdftotext on this machine")
    return module


@pytest.fixture(scope="module")
def drawn_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages that differ in what they show, one of a small trained model, in one folder."""
    folder = tmp_path_factory.mktemp("pages")
    certificates = {kind: make_cert(kind) for kind in ("pass", "fail", "refused", "accuracy", "hostile")}
    for name in ["t5_8bit"]:
        certificates[name] = json.loads((ROOT / f"tests/assets/certificates/{name}.json").read_text(encoding="utf-8"))
    for name, certificate in certificates.items():
        (folder / f"{name}.html").write_text(render_html(certificate), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in certificates}


def asked(tool: ModuleType, pages: Iterable[Path], script: str, *flags: str) -> dict[str, list[str]]:
    """Open pages in frames of the widths of a phone and of a desk; return what the body of `find(document)` says of each.

    The policy of the page forbids scripts of its own, so that they stand in the page around it.
    """
    frames = [
        f"<iframe id='{page.stem} {width}' src='{page.name}' style='border:0;width:{width}px;height:900px'></iframe>"
        for page in pages
        for width in (375, 1280)
    ]
    around = next(iter(pages)).parent / "around.html"
    told = "for(const f of document.querySelectorAll('iframe'))o[f.id]=find(f.contentDocument,f.contentWindow);"
    around.write_text(
        f"<body>{''.join(frames)}<pre id=told></pre><script>function find(d,w){{{script}}}\n"
        f"onload=()=>{{const o={{}};{told}told.textContent=JSON.stringify(o)}}</script>",
        encoding="utf-8",
    )
    with tempfile.TemporaryDirectory() as profile:
        command = [tool.browser(), *tool.QUIET, *flags, "--allow-file-access-from-files", "--enable-logging=stderr",
                   "--virtual-time-budget=8000", f"--user-data-dir={profile}", "--dump-dom", around.as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None and found[1], done.stdout[-500:]
    answers: dict[str, list[str]] = json.loads(html.unescape(found[1]))
    assert len(answers) == len(frames)
    return answers


#: what does not fit, and words of a picture that touch one another or its edge
_FAULTS = """
const r=[],e=d.documentElement;
if(e.scrollWidth>e.clientWidth)r.push('scrolls: '+e.scrollWidth+' of '+e.clientWidth);
for(const s of d.querySelectorAll('svg[aria-labelledby]')){
  const b=s.getBoundingClientRect();
  const t=[...s.querySelectorAll('text:not(.told)')].map(x=>[x.textContent.trim(),x.getBoundingClientRect()]);
  t.forEach(([n,p],i)=>{
    if(p.left<b.left-1||p.right>b.right+1||p.top<b.top-1||p.bottom>b.bottom+1)r.push('cut: '+n);
    for(const [m,q] of t.slice(i+1)){
      const w=Math.min(p.right,q.right)-Math.max(p.left,q.left),h=Math.min(p.bottom,q.bottom)-Math.max(p.top,q.top);
      if(w>1&&h>3)r.push('touch: '+n+' | '+m)}})}
return r"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_and_says_nothing_on_the_console(
    tool: ModuleType, drawn_pages: dict[str, Path], scheme: str
) -> None:
    faults = asked(tool, drawn_pages.values(), _FAULTS, *(tool.DARK if scheme == "dark" else ()))
    assert {place: found for place, found in faults.items() if found} == {}


@pytest.mark.slow
def test_a_mark_of_the_layers_tells_its_figures_when_it_is_reached(
    tool: ModuleType, drawn_pages: dict[str, Path]
) -> None:
    script = """
    const m=d.querySelector('.mark-told'),t=m.querySelector('.told'),say=x=>w.getComputedStyle(x).visibility;
    const before=say(t);w.focus();m.focus();
    return [before,say(t),t.textContent]"""
    for before, after, said in asked(tool, [drawn_pages["fail"]], script).values():
        assert (before, after) == ("hidden", "visible") and re.search(r"weights, relative change [+-]", said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pass", "fail", "refused", "t5_8bit"])
def test_print_shows_all_and_parts_no_heading_from_its_section(
    tool: ModuleType, drawn_pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    tool.picture(drawn_pages[name], tmp_path / "page.pdf")
    command = ["pdftotext", "-layout", str(tmp_path / "page.pdf"), "-"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    source = drawn_pages[name].read_text(encoding="utf-8")
    headings = [
        re.sub(r"<[^>]+>", "", html.unescape(text)).strip() for text in re.findall(r"<h2[^>]*>(.*?)</h2>", source)
    ]
    assert len(headings) > 6 and all(heading in printed for heading in headings)
    folded = re.sub(r"<[^>]+>", " ", source.partition("<details>")[2].partition("</details>")[0])
    words = [word for word in html.unescape(folded).split() if len(word) < 20]
    assert len(words) > 20 and all(word in printed for word in words)
    lasts = [page.rstrip().rpartition("\n")[2].strip() for page in printed.split("\f")]
    assert not set(lasts) & set(headings)


@pytest.mark.slow
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

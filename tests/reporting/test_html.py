"""The page stands alone, shows hostile text as text, and can be read by everybody."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from drawn import render_html

from certificates import HOSTILE
from invarlock.reporting.wording import clean

Cert = Callable[[str], dict[str, Any]]
VOID = {"meta", "link", "br", "hr", "img", "input"}
pytestmark = pytest.mark.slow  # every page is drawn anew


class _Page(HTMLParser):
    """Collects elements; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, (tag, self._open[-3:])
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_page_is_well_formed_and_loads_nothing(each: dict[str, Any]) -> None:
    text = render_html(each)
    page = _Page(text)
    assert not page.named(
        "script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "foreignobject"
    )
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")]
        targets = [value or "" for name, value in attributes.items() if name.endswith("href")]
        assert all(target.startswith("#") for target in targets)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    policy = next(m for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_ids_are_unique_and_references_lead_somewhere(each: dict[str, Any]) -> None:
    text = render_html(each)
    page = _Page(text)
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert [name for name, times in ids.items() if times > 1] == []
    wanted = re.findall(r'(?:xlink:)?href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    for _, attributes in page.elements:
        wanted += (attributes.get("aria-labelledby") or "").split()
    assert set(wanted) <= set(ids)


def test_hostile_text_is_shown_and_nothing_more(cert: Cert) -> None:
    source = render_html(cert("hostile"))
    page = _Page(source)
    assert "<script" not in source.lower()
    assert "\u202e" not in source and "\x00" not in source and "{{" in source
    assert clean(HOSTILE) in "".join(page.text)


def test_tables_have_captions_and_headers_and_pictures_have_words(each: dict[str, Any]) -> None:
    page = _Page(render_html(each))
    assert len(page.named("table")) == len(page.named("caption")) >= 2
    assert all(header.get("scope") in ("col", "row") for header in page.named("th"))
    pictures = [svg for svg in page.named("svg") if svg.get("aria-hidden") != "true"]
    assert all(svg.get("role") in ("img", "group") and svg.get("aria-labelledby") for svg in pictures)
    titles, words = page.named("title"), page.named("desc")
    named = [
        title for title in titles if "id" in title
    ]  # the others: the page's own, and one for every point of a module
    points = [group for group in page.named("g") if (group.get("id") or "").startswith("layers-point-")]
    labels = [f"{title['id']} {said['id']}" for title, said in zip(named, words, strict=True)]
    assert labels == [svg["aria-labelledby"] for svg in pictures]
    assert len(titles) == 1 + len(pictures) + len(points)


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("pass", {"interval", "windows", "divergence", "growth", "layers"}),
        ("self", {"interval", "windows", "divergence", "growth"}),
        ("non_finite", {"windows", "divergence", "growth", "layers"}),
        ("accuracy", {"interval", "growth", "layers"}),
        ("refused", set()),
    ],
)
def test_only_what_was_measured_is_drawn(cert: Cert, kind: str, figures: set[str]) -> None:
    text = render_html(cert(kind))
    assert set(re.findall(r'aria-labelledby="(\w+)-title \w+-desc"', text)) == figures


def test_a_refused_checkpoint_says_what_was_not_measured(cert: Cert) -> None:
    words = "".join(_Page(render_html(cert("refused"))).text)
    assert "refused before evaluation" in words
    assert words.count("Not measured:") >= 5
    assert "h.2.mlp.c_fc.weight holds 7 NaN" in words


@pytest.mark.parametrize(("kind", "mark"), [("pass", "pass"), ("fail", "fail"), ("inconclusive", "inconclusive")])
def test_verdict_is_a_word_and_a_shape_beside_its_colour(cert: Cert, kind: str, mark: str) -> None:
    text = render_html(cert(kind))
    heading = text[text.index("<h1>") : text.index("</h1>")]
    assert f'href="#mark-{mark}"' in heading and kind.upper() in heading
    shapes = re.findall(r'<symbol id="mark-\w+"[^>]*>(.*?)</symbol>', text)
    assert len(set(shapes)) == len(shapes) == 6


def _schemes(text: str) -> list[dict[str, str]]:
    found = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    ]
    return [found[0], {**found[0], **found[1]}]


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_contrast_meets_wcag_aa(cert: Cert, dark: bool) -> None:
    colours = _schemes(render_html(cert("pass")))[dark]
    pairs = [(ink, paper) for ink in ("ink", "muted", "good", "bad", "open") for paper in ("card", "ground")]
    pairs += [(tone, f"{tone}-tint") for tone in ("good", "bad", "open")]
    pairs += [(ink, f"{tone}-tint") for tone in ("good", "bad", "open") for ink in ("ink", "muted")]
    for ink, paper in pairs:
        low, high = sorted((_luminance(colours[ink]), _luminance(colours[paper])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


def test_figures_take_the_colours_of_the_page(cert: Cert) -> None:
    text = render_html(cert("fail"))
    drawn = "".join(re.findall(r'<svg role="img".*?</svg>', text, re.DOTALL))
    assert "var(--series-1)" in drawn and "var(--bad)" in drawn
    assert not re.findall(r"#0[1-9]0[1-9]0[1-9]", drawn)
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) <= {"#ffffff"}

"""Plain words: explanations, the summary for a terminal, Markdown and comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from invarlock.certificate.third import GATE_NAMES
from invarlock.reporting import compare, explain, explanations, render_markdown, summary_lines
from invarlock.reporting.view import parse, values, view
from invarlock.reporting.wording import (
    FORMS,
    GATES,
    MISSING,
    WORDS,
    change,
    clean,
    count,
    fill,
    interval,
    middle_cut,
    nats,
    percent,
    plain,
    points,
    ratio,
)

Cert = Callable[[str], dict[str, Any]]


def _by_gate(certificate: dict[str, Any]) -> dict[str, Any]:
    return {item.gate: item for item in explanations(certificate)}


@pytest.mark.slow
def test_every_gate_has_words_and_every_bad_one_a_next_step(each: dict[str, Any]) -> None:
    found = explanations(each)
    assert len(found) == len(each["gates"])
    for item in found:
        assert item.title and item.meaning and item.why and item.basis
        assert bool(item.next_step) == (item.decision not in ("pass", "off"))


def test_inconclusive_names_the_detectable_effect_and_the_documents_needed(cert: Cert) -> None:
    undecided = cert("inconclusive")
    pm = undecided["primary_metric"]
    assert pm["decision"] == "inconclusive" and pm["documents_needed"] > 120
    step = _by_gate(undecided)["primary_metric"].next_step
    assert f"a factor of {pm['minimum_detectable_effect']:.4f}" in step
    assert f"{pm['documents_needed']:,}" in step and "dataset.preview_n" in step


def test_inconclusive_accuracy_speaks_in_points(cert: Cert) -> None:
    undecided = cert("accuracy")
    assert undecided["primary_metric"]["decision"] == "inconclusive"
    assert re.search(r"\d\.\d\d pp or more from the limit", _by_gate(undecided)["primary_metric"].next_step)


def test_answers_that_turned_are_counted_where_there_are_answers(cert: Cert) -> None:
    """A share of right tokens is no answer: that some of them cross a half says nothing, and McNemar's test is of answers."""
    found = cert("accuracy")
    for whole in (True, False):
        if not whole:
            for rows in found["evaluation_windows"].values():
                rows["subject_correct"] = [0.2 + 0.6 * score for score in rows["subject_correct"]]
        text = render_markdown(found)
        assert ("McNemar" in text) is whole and ("Right to wrong" in text) is whole


def test_inconclusive_without_a_number_that_decides_says_so(cert: Cert) -> None:
    undecided = cert("inconclusive")
    del undecided["primary_metric"]["documents_needed"]
    assert "no number of documents" in _by_gate(undecided)["primary_metric"].next_step


def test_failed_gates_name_the_weights_that_stand_out(cert: Cert) -> None:
    item = _by_gate(cert("fail"))["divergence_kl"]
    assert "h.2.mlp.c_fc.weight" in item.why
    assert "--intent finetune" in item.next_step


def test_explanation_fits_a_terminal_of_80_columns(each: dict[str, Any]) -> None:
    assert max(map(len, explain(each).splitlines())) <= 80


def test_summary_is_plain_short_lines_with_all_that_matters(each: dict[str, Any]) -> None:
    lines = summary_lines(each)
    assert lines[0].startswith(each["verdict"]["status"])
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)
    labels = {line.split()[0] for line in lines if not line.startswith(" ")}
    metric = "accuracy" if each["primary_metric"]["unit"] == "accuracy" else "ratio"
    assert {"subject", "baseline", metric, "windows", "confidence", "guards", "culprits"} <= labels


def test_summary_of_a_failure_names_reasons_and_culprits(cert: Cert) -> None:
    text = "\n".join(summary_lines(cert("fail")))
    assert "spectral FAIL" in text and "culprits      h.1.attn.c_proj.weight, h.2.mlp.c_fc.weight" in text
    assert "why           It predicts the text " in text
    assert not re.search(r"hysteresis|\bz = |\bq95\b", text)


def test_the_headline_says_on_how_much_text_it_rests_and_that_dev_is_a_look(each: dict[str, Any]) -> None:
    headline = " ".join(line.strip() for line in summary_lines(each, width=1000)[:1])
    stats = each["dataset"]["windows"]["stats"]
    measured = stats["tokens"] > 0
    assert (f"on {stats['documents']:,} documents ({stats['tokens']:,} tokens)" in headline) is measured
    assert ("A look, not a release certificate" in headline) is (measured and each["meta"]["profile"] == "dev")


def test_every_verdict_says_why_once_and_what_comes_next(each: dict[str, Any]) -> None:
    shown = view(parse(each))
    assert shown.why.endswith(".") and "\N{EM DASH}" not in shown.why
    clauses = shown.why.rstrip(".").split("; ")
    assert len(set(clauses)) == len(clauses)
    commands = [command for _, command in shown.next_steps]
    wanted = {
        "PASS": "invarlock verify",
        "FAIL": "invarlock report explain",
        "INCONCLUSIVE": "invarlock report explain",
    }
    assert any(command.startswith(wanted[each["verdict"]["status"]]) for command in commands)


def test_nothing_is_sure_that_was_not_measured_or_decided(each: dict[str, Any]) -> None:
    label = next(figure.value for figure in view(parse(each)).figures if figure.short == "confidence")
    if each["primary_metric"]["decision"] == "not_evaluated":
        assert label == "none"
    assert not (each["verdict"]["status"] == "INCONCLUSIVE" and label == "High")


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("worse", 1.66, "66% worse than the baseline"),
        ("worse", 0.98, "2% better than the baseline"),
        ("worse", 1.0001, "as well as the baseline"),
        ("excess", 1.1, "10%"),
        ("share", 0.00001, "under 0.01%"),
        ("two", 4e-6, "under 0.001"),
        ("two", None, MISSING),
    ],
)
def test_sentences_round_for_people(form: str, value: object, text: str) -> None:
    assert FORMS[form](value) == text


def test_markdown_holds_no_markup_from_the_certificate(cert: Cert) -> None:
    text = render_markdown(cert("hostile"))
    assert "<" not in text
    assert not re.search(r"(?<!\\)\[l", text) and not re.search(r"(?<![\\*])\*\*b", text)


def test_markdown_tables_have_as_many_cells_as_headers(each: dict[str, Any]) -> None:
    widths: list[int] = []
    for line in render_markdown(each).splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
            assert widths[-1] == widths[0], line
        else:
            widths = []


def test_comparison_has_a_row_each_and_names_what_differs(cert: Cert) -> None:
    text = compare([cert(kind) for kind in ("pass", "fail", "refused")])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert [row.split("|")[3].strip() for row in rows[2:]] == ["PASS", "FAIL", "FAIL"]
    assert "differ in" not in text
    assert "differ in evaluation text" in compare([cert("pass"), cert("inconclusive")])


def test_every_gate_has_words_of_its_own_and_every_form_is_known() -> None:
    words = set(GATES) - {"other"}
    assert words == {*GATE_NAMES, "primary_metric:accuracy"}
    assert {gate.form for gate in GATES.values()} | {row["form"] for row in WORDS["readings"].values()} <= set(FORMS)
    assert {figure["gate"] for figure in WORDS["figures"]} <= {*GATE_NAMES, ""}


def test_a_gate_without_words_gets_a_general_answer(cert: Cert) -> None:
    added = cert("pass")
    added["gates"].append({**added["gates"][0], "name": "new_figure", "decision": "fail"})
    item = _by_gate(added)["new_figure"]
    assert (item.title, item.decision) == ("new_figure", "fail") and item.meaning and item.next_step


def test_a_field_that_no_section_has_is_an_error_and_a_key_that_is_missing_a_dash(cert: Cert) -> None:
    known = values(parse(cert("pass")))
    assert fill("{stats.nothing:count} of {pm.display_ci:[ratio]}", known).startswith("— of [")
    with pytest.raises(AttributeError, match="knd"):
        fill("{pm.knd}", known)


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (ratio, 1.00324, "1.0032"),
        (ratio, 1e20, "1e+20"),
        (percent, 0.0225, "2.25%"),
        (change, -0.5, "-50.00%"),
        (nats, 0.0, "0"),
        (nats, 0.00012, "1.2e-04"),
        (nats, 0.12345, "0.1235"),
        (points, -0.25, "-0.25 pp"),
        (count, 51200, "51,200"),
        (plain, {"a": [1, None, True]}, "a: 1, —, yes"),
        (plain, float("nan"), "not finite"),
    ],
)
def test_numbers_have_one_form(form: Callable[[Any], str], value: Any, text: str) -> None:
    assert form(value) == text


@pytest.mark.parametrize("form", [ratio, percent, change, nats, points, count])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "7", True])
def test_what_is_no_finite_number_is_a_dash(form: Callable[[Any], str], value: Any) -> None:
    assert form(value) == "—"
    assert interval((1.0, value), form) == "—"


def test_clean_text_is_one_visible_line() -> None:
    assert clean("a\nb\x00\u202e\u200b\ud800") == "a b\\x00\\u202e\\u200b\\ud800"
    assert clean("x" * 700).endswith("… (100 more characters)")
    assert middle_cut("abcdefghij", 5) == "ab…ij"


@pytest.mark.parametrize("kind", ["fail", "inconclusive"])
def test_what_a_gate_found_and_a_guard_counted_is_said_in_words(cert: Cert, kind: str) -> None:
    shown = view(parse(cert(kind)))
    told = [row.why for row in shown.gates if row.decision not in ("pass", "off")]
    assert told and not re.search(r"hysteresis|\bz = |\bq95\b", " ".join(told))
    labels = {fact.label for section in shown.sections for fact in section.facts}
    assert "Largest change of a singular value" in labels and not any("max growth" in label for label in labels)


def test_a_check_that_passed_is_told_in_words_and_not_as_it_is_recorded(each: dict[str, Any]) -> None:
    rows = {row.gate: row.why for row in view(parse(each)).gates if row.badge.word == "pass"}
    recorded = {
        name: reason for name, reason in rows.items() if re.search(r"q\d\d|tail mass|\d\.0000 of|band ", reason)
    }
    assert not recorded

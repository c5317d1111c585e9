"""JUnit: one test case a gate, and never a green build for anything but PASS."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest

from invarlock.reporting import render_junit

Cert = Callable[[str], dict[str, Any]]
OUTCOMES = {
    "pass": "system-out",
    "warn": "system-out",
    "fail": "failure",
    "inconclusive": "error",
    "not_evaluated": "error",
    "off": "skipped",
}


def test_each_gate_is_one_case_with_its_outcome(each: dict[str, Any]) -> None:
    root = ET.fromstring(render_junit(each).encode())
    cases = root.findall("testsuite/testcase")
    assert [case[0].tag for case in cases] == [OUTCOMES[gate["decision"]] for gate in each["gates"]]
    suite = root.find("testsuite")
    assert suite is not None
    for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert suite.get(key) == root.get(key) == str(len(root.findall(f"testsuite/testcase/{tag}")))
    assert suite.get("tests") == str(len(cases))


def test_only_a_pass_is_green(each: dict[str, Any]) -> None:
    root = ET.fromstring(render_junit(each).encode())
    green = root.get("failures") == root.get("errors") == "0"
    assert green == (each["verdict"]["status"] == "PASS")


@pytest.mark.parametrize("decision", ["not_evaluated", "off"])
def test_gate_that_did_not_run_is_not_a_pass(cert: Cert, decision: str) -> None:
    changed = cert("pass")
    changed["gates"][2].update(decision=decision, measured=None)
    case = ET.fromstring(render_junit(changed).encode()).findall("testsuite/testcase")[2]
    assert case[0].tag == OUTCOMES[decision]


def test_certificate_without_gates_is_not_green(cert: Cert) -> None:
    empty = cert("pass")
    empty["gates"], empty["verdict"] = [], {"status": "INCONCLUSIVE", "reasons": []}
    root = ET.fromstring(render_junit(empty).encode())
    assert root.get("tests") == root.get("errors") == "1"


def test_declares_the_encoding_that_it_is_written_in(cert: Cert) -> None:
    assert render_junit(cert("pass")).lower().startswith("<?xml version='1.0' encoding='utf-8'?>")

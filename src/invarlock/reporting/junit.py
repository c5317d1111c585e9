"""A certificate as JUnit XML: one test case a gate, so that a build server shows them like tests."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from invarlock.reporting.view import GateRow, View, parse, view

__all__ = ["render_junit"]

#: the child element of a decision that is not a pass; what could not be decided is an error, so that no build is green
_OUTCOMES = {"fail": "failure", "inconclusive": "error", "not_evaluated": "error", "off": "skipped"}


def render_junit(certificate: Mapping[str, Any]) -> str:
    """Return the JUnit XML. A verdict other than PASS always holds a failure or an error.

    Raises CertificateError where the certificate does not follow the schema.
    """
    shown = view(parse(certificate))
    root = ET.Element("testsuites", name="invarlock")
    suite = ET.SubElement(root, "testsuite", name=f"certificate {shown.run_id}", timestamp=shown.created, time="0")
    properties = ET.SubElement(suite, "properties")
    facts = [("verdict", shown.status), ("subject", shown.subject), ("baseline", shown.baseline)]
    for name, value in [*facts, *((figure.label, f"{figure.value} ({figure.note})") for figure in shown.figures)]:
        ET.SubElement(properties, "property", name=name, value=value)
    for row in shown.gates:
        _case(suite, row, shown)
    if shown.status != "PASS" and not any(_OUTCOMES.get(row.decision) in ("failure", "error") for row in shown.gates):
        case = ET.SubElement(suite, "testcase", classname=_class_name(shown), name="verdict", time="0")
        ET.SubElement(case, "error", message=shown.headline, type=shown.status)
    for element in (root, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(key, str(len(suite.findall(f"testcase/{tag}"))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _class_name(shown: View) -> str:
    return f"invarlock.{shown.subject}"


def _case(suite: ET.Element, row: GateRow, shown: View) -> None:
    case = ET.SubElement(suite, "testcase", classname=_class_name(shown), name=row.gate, time="0")
    detail = f"{row.title}: {row.badge.word}; measured {row.measured}, limit {row.limit}, by {row.basis}; {row.why}"
    tag = _OUTCOMES.get(row.decision)
    if tag == "skipped":
        ET.SubElement(case, tag, message=row.why)
    elif tag:
        ET.SubElement(case, tag, message=row.why, type=row.decision).text = detail
    else:
        ET.SubElement(case, "system-out").text = detail

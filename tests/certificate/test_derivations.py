"""Certificates outlive the release that made them: own rules, own tiers, words of their time, tolerances with a reason."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from certificates import certify, make_cert, make_evidence
from certification import reread
from invarlock import __version__
from invarlock.assurance import render_certificate_markdown
from invarlock.certificate.derive import CURRENT, DERIVATIONS, derive
from invarlock.certificate.reports import certificate_json
from invarlock.certificate.schema import Recorded
from invarlock.certificate.verify import PROSE, TOLERANCES, _same_words, verify_certificate
from invarlock.core.exceptions import CertificateError
from invarlock.policy import resolve

from .tampering import replaced

Document = dict[str, Any]
FROZEN = Path(__file__).parents[1] / "assets" / "certificates"
VERSION = resolve.resolve_policy().tiers_version
NEXT = ".".join(str(int(part) + 1) for part in __version__.split(".")[:1]) + ".0.0"


@pytest.fixture(scope="module")
def made() -> Document:
    return reread(make_cert("fail"))


def _frozen(name: str) -> Document:
    document: Document = json.loads((FROZEN / f"{name}.json").read_text(encoding="utf-8"))
    return document


def _again(document: Document, change: Callable[[Document], None]) -> Document:
    """Return the certificate that follows where what was recorded is changed."""
    altered = copy.deepcopy(document)
    change(altered)
    return reread(certificate_json(Recorded.model_validate(altered)))


def _by_release(document: Document, version: str) -> Document:
    return _again(document, lambda altered: altered["meta"].update(tool_version=version))


# --- derivations


@pytest.mark.slow
def test_new_certificates_name_their_derivation_and_the_first_ones_none(made: Document) -> None:
    assert made["derivation"] == CURRENT == max(DERIVATIONS)
    assert made["policy_provenance"]["tiers_version"] == VERSION
    assert "derivation" not in _frozen("pass_8bit")


def test_a_derivation_of_a_later_release_is_no_forgery_and_no_success(made: Document) -> None:
    with pytest.raises(
        CertificateError, match=f"derivation {CURRENT + 1}; this release knows 1, 2, 3, 4, 5: use a newer one"
    ):
        verify_certificate({**made, "derivation": CURRENT + 1})


@pytest.mark.slow
@pytest.mark.parametrize("derivation", [1, None])
def test_a_certificate_cannot_be_passed_off_as_one_of_another_derivation(
    derivation: int | None, made: Document
) -> None:
    assert not verify_certificate({**made, "derivation": derivation}).intact
    assert not verify_certificate({**_frozen("pass_8bit"), "derivation": 2}).intact
    assert not verify_certificate({**_frozen("second_fail"), "derivation": CURRENT}).intact


def test_the_first_derivation_takes_a_number_with_and_without_its_fraction() -> None:
    document = _frozen("pass_8bit")
    gate = next(i for i, gate in enumerate(document["gates"]) if gate["name"] == "pairing")
    assert type(document["gates"][gate]["measured"]) is float
    assert verify_certificate(replaced(document, ("gates", gate, "measured"), 1)).intact


# --- tiers


def _own(root: Path, change: Callable[[str], str], profile: str | None = None) -> None:
    folder = root / "runtime" / "profiles"
    folder.mkdir(parents=True)
    text = resources.files("invarlock.data").joinpath("tiers.yaml").read_text(encoding="utf-8")
    (root / "runtime" / "tiers.yaml").write_text(change(text), encoding="utf-8")
    if profile is not None:
        (folder / "ci.yaml").write_text(profile, encoding="utf-8")


@pytest.mark.slow
def test_a_comment_in_the_tiers_alters_no_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Document
) -> None:
    _own(tmp_path, lambda tiers: f"# a comment\n{tiers}# and another\n")
    monkeypatch.setenv("INVARLOCK_CONFIG_ROOT", str(tmp_path))
    assert verify_certificate(made).intact
    for name in ("pass_8bit", "fail_2bit", "overrides", "refused_nan"):
        assert verify_certificate(_frozen(name)).intact, name
    again = reread(make_cert("fail"))
    assert again["policy_provenance"] == made["policy_provenance"]


@pytest.mark.slow
def test_every_variable_of_the_environment_leaves_verification_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG_ROOT", "CI_PREVIEW", "CI_FINAL", "TINY_RELAX", "BOOTSTRAP_BCA"):
        monkeypatch.setenv(f"INVARLOCK_{name}", "0")
    for name in ("MIN", "MAX"):
        monkeypatch.setenv(f"INVARLOCK_PM_ACCEPTANCE_{name}", "not a number")
    for name in ("pass_8bit", "overrides", "conservative"):
        assert verify_certificate(_frozen(name)).intact, name


@pytest.mark.slow
def test_tiers_of_ones_own_are_embedded_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = "sample: {preview: 150, final: 150, shortfall: warn}"
    _own(tmp_path, lambda tiers: tiers.replace("limit: 1.10", "limit: 1.50"), profile)
    with monkeypatch.context() as inside:
        inside.setenv("INVARLOCK_CONFIG_ROOT", str(tmp_path))
        document = reread(make_cert("fail"))
    custom = document["policy_provenance"]["custom"]
    assert custom["profile"] == yaml.safe_load(profile)
    assert document["primary_metric"]["limit"] == 1.5 == custom["tiers"]["balanced"]["metrics"]["pm_ratio"]["limit"]
    outcome = verify_certificate(document)
    assert outcome.intact and ["custom" in note for note in outcome.notes] == [True]

    def forge(altered: Document) -> None:
        del altered["policy_provenance"]["custom"]

    assert verify_certificate(_again(document, forge)).failed_step == "policy"


@pytest.mark.slow
def test_more_than_was_used_cannot_be_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own(tmp_path, lambda tiers: tiers.replace(f"version: {VERSION}", "version: 77"))
    with monkeypatch.context() as inside:
        inside.setenv("INVARLOCK_CONFIG_ROOT", str(tmp_path))
        document = reread(make_cert("pass"))
    assert verify_certificate(document).intact
    padded = _again(document, lambda altered: altered["policy_provenance"]["custom"]["tiers"].update(more={}))
    assert verify_certificate(padded).failed_step == "policy"


@pytest.mark.slow
def test_a_certificate_of_tiers_that_no_release_issued_does_not_verify(made: Document) -> None:
    outcome = verify_certificate(_again(made, lambda d: d["policy_provenance"].update(tiers_version=2)))
    assert "version 2, which this release does not have" in outcome.problems[0]
    old = _again(_frozen("pass_8bit"), lambda d: d["policy_provenance"].update(tiers_digest="0" * 16))
    assert "no release issued these" in verify_certificate(old).problems[0]


@pytest.mark.slow
def test_earlier_tiers_resolve_by_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Document
) -> None:
    """As in the next release that changes a limit: its own tiers, and those of this version as they were."""
    packaged = resources.files("invarlock.data")
    for folder in (tmp_path, tmp_path / "tiers" / str(VERSION)):
        (folder / "profiles").mkdir(parents=True)
        for name in ("tiers.yaml", *(f"profiles/{name}.yaml" for name in resolve.PROFILES)):
            with resources.as_file(packaged.joinpath(name)) as path:
                shutil.copyfile(path, folder / name)
    with resources.as_file(packaged.joinpath("tiers")) as path:
        shutil.copytree(path, tmp_path / "tiers", dirs_exist_ok=True)
    text = (tmp_path / "tiers.yaml").read_text(encoding="utf-8")
    changed = text.replace(f"version: {VERSION}", f"version: {VERSION + 1}").replace("limit: 1.10", "limit: 1.07")
    (tmp_path / "tiers.yaml").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(resolve, "_PACKAGE", tmp_path)
    resolve._packaged.cache_clear()
    try:
        assert verify_certificate(made).intact
        assert verify_certificate(_frozen("pass_8bit")).intact
        new = reread(certify(make_evidence(), make_evidence(kl=0.001)))
        assert (new["policy_provenance"]["tiers_version"], new["primary_metric"]["limit"]) == (VERSION + 1, 1.07)
    finally:
        resolve._packaged.cache_clear()


# --- words and numbers


@pytest.mark.slow
@pytest.mark.parametrize("place", PROSE)
def test_words_are_held_to_this_release_alone(place: str, made: Document) -> None:
    """A later release may word it better; whoever made the certificate by this one wrote these words."""
    paths = [path for path in _texts(made, ()) if _matches(place, path)]
    for path in paths[:3]:
        assert not verify_certificate(_reworded(made, path)).intact, path
        assert verify_certificate(_reworded(_by_release(made, "0.9"), path)).intact, path
    elsewhere = place.startswith("slices.")  # in test_slices
    assert paths or elsewhere or place in ("variance.metrics.reason", "*.warnings.*.message")


def _matches(place: str, path: tuple[str | int, ...]) -> bool:
    parts = place.split(".")
    return len(parts) == len(path) and all(a in ("*", str(b)) for a, b in zip(parts, path, strict=True))


def _texts(value: Any, path: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
    if isinstance(value, str):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _texts(item, (*path, key))]


def _reworded(document: Document, path: tuple[str | int, ...]) -> Document:
    return replaced(document, path, "in other words")


@pytest.mark.slow
def test_codes_and_names_are_held_to_every_release(made: Document) -> None:
    old = _by_release(made, "0.9")
    assert verify_certificate(old).intact
    for path in (("gates", 0, "name"), ("gates", 0, "decision"), ("verdict", "reasons", 0, "code"), ("rmt", "action")):
        assert not _holds(replaced(old, path, "pass")), path


def _holds(document: Document) -> bool:
    try:
        return verify_certificate(document).intact
    except CertificateError:
        return False


@pytest.mark.parametrize(
    ("path", "relative", "holds"),
    [
        (("primary_metric", "ci", 1), 1e-7, True),  # two versions of scipy differ by less
        (("primary_metric", "ci", 1), 1e-5, False),
        (("divergence", "kl_ci", 0), 1e-7, True),
        (("divergence", "kl_mean"), 1e-7, False),
        (("primary_metric", "ratio_vs_baseline"), 1e-8, False),
        (("primary_metric", "limit"), 1e-8, False),
        (("resolved_policy", "metrics", "pm_ratio", "limit"), 1e-12, False),
    ],
)
def test_a_figure_may_differ_by_what_its_arithmetic_may(
    path: tuple[str | int, ...], relative: float, holds: bool, made: Document
) -> None:
    value: Any = made
    for key in path:
        value = value[key]
    assert verify_certificate(replaced(made, path, value * (1 + relative))).intact is holds


@pytest.mark.parametrize(
    ("was", "now", "holds"),
    [
        ("1.10123,", "1.10124,", True),  # rounded from figures that differ by 1e-9
        ("1.10123,", "1.10125,", False),
        ("1.1,", "1.10001,", True),
        ("3 windows", "4 windows", False),
        ("limit 1.1", "limit 1.2", False),
        ("ratio", "Ratio", False),
    ],
)
def test_a_sentence_may_differ_in_the_last_digit_of_a_fraction(was: str, now: str, holds: bool) -> None:
    text = f"{was} limit 1.100 at h.12.mlp, 3 of 400"
    assert _same_words(text, text.replace(was, now)) is holds


def test_every_tolerance_has_its_reason() -> None:
    assert all(t.why and 0 < t.relative <= 1e-6 for t in TOLERANCES)


# --- sections of later releases


@pytest.mark.slow
def test_a_section_that_only_a_later_release_knows_is_reported(made: Document) -> None:
    later = {**_by_release(made, NEXT), "mosaics": {"code": {"ratio": 1.02}}}
    outcome = verify_certificate(later)
    assert outcome.intact
    assert any("'mosaics'" in note and NEXT in note for note in outcome.notes)
    assert "mosaics" not in render_certificate_markdown(later)
    with pytest.raises(CertificateError, match="mosaics"):
        verify_certificate({**made, "mosaics": {}})
    with pytest.raises(CertificateError, match="gates.0.mosaics"):
        verify_certificate(replaced(later, ("gates", 0), {**later["gates"][0], "mosaics": 1}))


@pytest.mark.slow
def test_what_is_recorded_is_read_back_from_the_certificate(made: Document) -> None:
    recorded = Recorded.model_validate(made)
    assert reread(certificate_json(recorded)) == made
    assert Recorded.model_validate(derive(recorded).model_dump(mode="json")) == recorded

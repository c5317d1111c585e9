"""Every exception has its exit code and its one line."""

from __future__ import annotations

import pytest
import typer

from invarlock.cli import app as app_module
from invarlock.cli.errors import VERDICT_CODES, exit_code, report_error
from invarlock.cli.options import ProfileOption
from invarlock.core import exceptions as e

MISSING = e.DependencyError("adapter 'hf_causal'", "adapters")


@pytest.mark.parametrize(
    ("error", "profile", "code", "line"),
    [
        (e.ConfigError("no"), None, 2, "ERROR [CONFIG] no"),
        (e.CertificateError("no"), None, 2, "ERROR [CERTIFICATE] no"),
        (e.PairingError("no", code="E006"), "ci", 3, "ERROR [INVARLOCK:E006] no"),
        (e.PairingError("no", code="E001"), "ci_cpu", 3, "ERROR [INVARLOCK:E001] no"),
        (e.PairingError("no", code="E003"), "release", 3, "ERROR [INVARLOCK:E003] no"),
        (e.PairingError("no", code="E002"), "dev", 5, "ERROR [INVARLOCK:E002] no"),
        (e.PairingError("no"), None, 3, "ERROR [PAIRING] no"),  # ci is the default profile
        (e.ModelLoadError("no"), "ci", 5, "ERROR [MODEL-LOAD] no"),
        (e.DataError("two\nlines"), None, 5, "ERROR [DATA] two lines"),
        (e.NetworkError("no"), None, 5, "ERROR [NETWORK] no"),
        (MISSING, "release", 5, f"DEPENDENCY-MISSING: {MISSING}"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            None,
            5,
            'DEPENDENCY-MISSING: torch needs the extra "hf", which is not installed: pip install "invarlock[hf]"',
        ),
        (
            ModuleNotFoundError("No module named 'my_own'", name="my_own"),
            None,
            5,
            "ERROR [ModuleNotFoundError] No module named 'my_own'; set INVARLOCK_DEBUG_TRACE=1 for the traceback",
        ),
        (e.RunInterruptedError("stopped"), None, 130, "stopped"),
        (KeyboardInterrupt(), None, 130, "interrupted; no certificate was written"),
        (
            ZeroDivisionError("division by zero"),
            None,
            5,
            "ERROR [ZeroDivisionError] division by zero; set INVARLOCK_DEBUG_TRACE=1 for the traceback",
        ),
    ],
)
def test_line_and_code(capsys, error: BaseException, profile: str | None, code: int, line: str) -> None:
    assert report_error(error, profile) == code == exit_code(error, profile)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


def test_missing_extra_names_the_exact_command() -> None:
    assert str(MISSING).endswith('pip install "invarlock[adapters]"')


def test_every_error_of_the_tree_has_a_line(capsys) -> None:
    for name in e.__all__:
        kind = getattr(e, name)
        if not (isinstance(kind, type) and issubclass(kind, e.InvarlockError)):
            continue
        error = kind("what", "hf") if name == "DependencyError" else kind.__new__(kind, "x")
        assert error.code in e.CODES
        assert report_error(error) in (2, 3, 5, 130)
        assert capsys.readouterr().err.count("\n") == 1


def test_every_code_and_every_exit_code_has_a_meaning() -> None:
    assert all(code in e.CODES for code in e.PairingCode)
    for code, (status, meaning) in e.CODES.items():
        assert meaning and e.EXIT_CODES[status] and status, code
    assert set(VERDICT_CODES.values()) <= set(e.EXIT_CODES)


def test_an_error_of_a_plugin_follows_the_class_that_it_extends(capsys) -> None:
    class _MineError(e.ConfigError):
        code = "MINE"

    assert report_error(_MineError("no")) == 2
    assert capsys.readouterr().err == "ERROR [MINE] no\n"


def test_a_verdict_that_fails_never_exits_0() -> None:
    assert VERDICT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False)])
def test_traceback_only_on_request(capsys, monkeypatch: pytest.MonkeyPatch, value: str, shown: bool) -> None:
    monkeypatch.setenv("INVARLOCK_DEBUG_TRACE", value)
    try:
        raise e.EditError("no")
    except e.EditError as error:
        report_error(error)
    captured = capsys.readouterr().err
    assert ("Traceback" in captured) is shown
    assert captured.endswith("ERROR [EDIT] no\n")


def _unpaired(profile: ProfileOption = "dev") -> None:
    """Raise a pairing error."""
    raise e.PairingError("windows differ", code="E006")


@pytest.mark.parametrize(("arguments", "code"), [([], 5), (["--profile", "ci"], 3), (["--profile", "release"], 3)])
def test_pairing_error_follows_the_profile_of_the_command(
    cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.setitem(app_module.COMMANDS, "unpaired", app_module.Command(f"{__name__}:_unpaired", "Fail."))
    result = cli("unpaired", *arguments)
    assert result.exit_code == code
    assert result.stderr == "ERROR [INVARLOCK:E006] windows differ\n"


def test_usage_error_is_a_typer_one(capsys) -> None:
    assert report_error(typer.BadParameter("not so")) == 2
    assert capsys.readouterr().err == "ERROR [USAGE] Invalid value: not so; see `invarlock --help`\n"

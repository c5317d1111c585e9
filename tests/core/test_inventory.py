"""A listing never fails: what is broken, missing, claimed twice or unsupported stands there with its reason."""

from __future__ import annotations

import pytest

from invarlock.core import inventory as status
from invarlock.core.inventory import PluginStatus
from invarlock.core.registry import Entry

GROUP = "[invarlock.guards]\n"


def test_a_plugin_without_its_module_is_broken(run, site, items) -> None:
    folder = site("gone", GROUP + "gone = gone_plugin.guard:Guard\nhalf = half_plugin.guard:Guard\n")
    (folder / "half_plugin").mkdir()
    (folder / "half_plugin" / "__init__.py").write_text("raise SystemExit(9)")
    done = run("plugins", "guards", "--json", site=folder)
    assert done.returncode == 0
    listed = items(done.stdout)
    assert (listed["gone"]["status"], listed["gone"]["reason"]) == ("broken", "module gone_plugin.guard is not there")
    assert (listed["half"]["status"], listed["half"]["hint"]) == ("broken", "reinstall gone")
    assert listed["spectral"]["status"] == "ready"


def test_explain_of_a_plugin_that_cannot_be_imported_shows_the_error_and_fails(run, site) -> None:
    folder = site("raises", GROUP + "raises = raises_plugin:Guard\n", raises_plugin="import no_such_library\n")
    assert "raises | Plugin | Guard | — | — | ✅ Ready" in run("plugins", "guards", site=folder).stdout
    done = run("plugins", "guards", "--explain", "raises", site=folder)
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_library'" in done.stdout
    assert "constructor:  not imported" in done.stdout


def test_a_name_claimed_twice_is_listed_as_such(run, site, items) -> None:
    site("first", GROUP + "spectral = first_plugin:Guard\n", first_plugin="class Guard: ...\n")
    folder = site("second", GROUP + "fine = second_plugin:Guard\n", second_plugin="class Guard: ...\n")
    done = run("plugins", "guards", "--only", "shadowed", site=folder)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    assert (
        "spectral | Plugin | Guard | — | — | ❌ Name claimed twice: first (first_plugin:Guard) and invarlock"
        in done.stdout
    )
    assert items(run("plugins", "guards", "--json", site=folder).stdout)["fine"]["status"] == "ready"


def test_without_torch_the_exact_command_is_shown(run) -> None:
    done = run("plugins", "list", "--only", "missing", INVARLOCK_LIGHT_IMPORT="1")
    assert done.returncode == 0
    lines = {line.split(" | ")[0]: line for line in done.stdout.splitlines()}
    assert lines["spectral"].endswith('⬜ Missing: pip install "invarlock[guards]"')
    assert lines["quant_rtn"].endswith('⬜ Missing: pip install "invarlock[edits]"')
    assert "hello_guard" not in lines


def test_unsupported_is_hidden_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status.sys, "platform", "darwin")
    entry = Entry("hf_bnb", "os:path", "invarlock.adapters", "invarlock", "1", (("os", "gpu"),), ("linux",))
    found = status._status(entry, ())
    assert (found.state, found.reason) == ("unsupported", "runs on linux, this is darwin")
    assert status.select([found], None, show_unsupported=False) == []
    assert status.select([found], None, show_unsupported=True) == [found]
    assert status.select([found], "unsupported", show_unsupported=False) == [found]


def test_discovery_switched_off_is_said_in_the_envelope(run, site) -> None:
    folder = site("extra", GROUP + "extra = extra_plugin:Guard\n")
    done = run("plugins", "guards", "--json", site=folder, INVARLOCK_DISABLE_PLUGIN_DISCOVERY="1")
    assert '"discovery": false' in done.stdout
    assert '"extra"' not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--explain", "spectrl"], "unknown plugin 'spectrl' (did you mean 'spectral'?)"),
        (["adapters", "--explain", "spectral"], "unknown adapter 'spectral'"),
        (["--only", "redy"], "unknown filter 'redy' (did you mean 'ready'?)"),
        (["install", "gptqq"], "unknown plugin or extra 'gptqq' (did you mean 'gptq'?)"),
        (["install", "hello_guard"], "'hello_guard' comes with invarlock and needs no extra"),
        (["uninstall", "edits"], "'edits' brings no package that nothing else of invarlock needs"),
    ],
)
def test_mistakes_are_configuration_errors(run, arguments: list[str], message: str) -> None:
    done = run("plugins", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR [CONFIG] " + message)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["install", "gptq"], 'pip install "invarlock[gptq]"'),
        (["install", "hf_causal"], 'pip install "invarlock[adapters]"'),
        (["uninstall", "gpu"], "pip uninstall -y bitsandbytes"),
    ],
)
def test_install_and_uninstall_only_print_unless_told_to_apply(run, arguments: list[str], command: str) -> None:
    assert run("plugins", *arguments).stdout == f"dry run: {command}\n"
    applied = run("plugins", *arguments, "--apply", INVARLOCK_PLUGINS_DRY_RUN="1")
    assert applied.stdout == f"dry run: {command}\n"


def test_installing_needs_the_network_to_be_allowed(run) -> None:
    done = run("plugins", "install", "gptq", "--apply", INVARLOCK_ALLOW_NETWORK="0")
    assert done.returncode == 5
    assert "set INVARLOCK_ALLOW_NETWORK=1 to run: pip install" in done.stderr


def test_explain_of_a_built_in_guard_lists_its_policy_keys() -> None:
    (found,) = status.explain("spectral")
    assert {text.partition("=")[0] for text in found.parameters} >= {"deadband", "kappa", "max_caps", "sigma_quantile"}


def test_explain_knows_auto() -> None:
    assert [found.entry.name for found in status.explain("auto", "adapters")] == ["hf_auto"]


def test_a_status_reads_as_a_line() -> None:
    entry = Entry("x", "m:C", "invarlock.adapters", "invarlock", "1")
    line = PluginStatus(entry, "ready", backend=("gptqmodel", "2.0")).line()
    assert line == "x | Core | Adapter | gptqmodel | 2.0 | ✅ Ready"

"""`invarlock bisect` and `invarlock sensitivity`: which tensors carry an edit's damage, after and before it is made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from typer import Option

from invarlock.checkpoints.side import Loading
from invarlock.cli.console import emit_json, note, progress, say
from invarlock.cli.errors import INTERRUPTED
from invarlock.cli.options import DeviceOption, JsonOption, TierOption
from invarlock.core.exceptions import ConfigError
from invarlock.core.files import write_json, write_whole
from invarlock.flow.bisect import Bisection, BisectRequest, open_search, seconds
from invarlock.flow.bisect import bisect as run_bisect
from invarlock.flow.damage import Changed
from invarlock.flow.diff import place_of
from invarlock.flow.repair import Repair
from invarlock.flow.repair import repair as run_repair
from invarlock.flow.run_folder import require_free, require_writable
from invarlock.flow.sampling import dataset_options
from invarlock.flow.sensitivity import sensitivity as run_sensitivity
from invarlock.guards.families import layer_index
from invarlock.policy.config import load_config
from invarlock.reporting.bundle import write_bundle
from invarlock.reporting.findings import Findings, render_findings

__all__ = ["bisect", "sensitivity"]

_SHOWN = 10

PresetOption = Annotated[Path | None, Option(help="YAML with the data to search on.")]
HtmlOption = Annotated[Path | None, Option(help="Write a page with the picture by layer to this file, too.")]
BudgetOption = Annotated[str | None, Option(help="Stop after this time and keep what was found, such as 90s or 3m.")]
AdapterOption = Annotated[str | None, Option(help="How to load the models; auto recognises them.")]


def bisect(
    baseline: Annotated[str, Option("--baseline", "--source", help="The checkpoint that the subject came from.")],
    subject: Annotated[str, Option("--subject", "--edited", help="The edited checkpoint: folder or hub id.")],
    repair: Annotated[
        Path | None, Option(help="Write the subject with the fewest tensors given back that make it pass.")
    ] = None,
    budget: BudgetOption = None,
    windows: Annotated[int, Option(help="Windows to search on; with --repair as many are held back.")] = 64,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    tier: TierOption = None,
    preset: PresetOption = None,
    out: Annotated[Path, Option(help="Folder of the findings, and of the repaired checkpoint's certificate.")] = Path(
        "reports/bisect"
    ),
    html: Annotated[
        Path | None, Option(help="The page with the picture by layer; default: bisect.html in --out.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Find the tensors that carry a subject's damage, and mend it.

    Tells the block where the two models part, ranks every changed tensor by its expected damage, gives the first of them
    back alone and together, and measures what each recovers. Both models are in memory.

    Exit codes: 0 searched (with --repair: the repaired checkpoint passes), 1 no repair was found or it does not pass,
    130 interrupted, after what was found is shown.
    """
    for place in (out, *((html.parent,) if html else ()), *((repair.parent,) if repair else ())):
        require_writable(place, "findings", "--out, --html or --repair")
    if repair is not None:
        require_free(repair)
    request = _request(baseline, subject, adapter, device, tier, preset, windows, budget, held=windows if repair else 0)
    with progress("bisect") as tick:
        search = open_search(request, tick)
        found = run_bisect(search, Bisection(baseline, subject))
        made: Repair | None = None
        if repair is not None and found.whole is not None and not found.whole.passes and found.stopped != "interrupted":
            made, outcome = run_repair(request, search, found, repair, out / "runs", tick)
            if outcome is not None:
                write_bundle(outcome.certificate, out / "cert")
    lines = [*found.lines, *(made.lines if made else [])]
    if repair is not None and found.whole is not None and found.whole.passes:
        lines.append("it passes on these windows: there is nothing to repair")
    code = INTERRUPTED if found.stopped == "interrupted" else int(made is not None and made.verdict != "PASS")
    fields = {**found.to_dict(), "repair": made and made.to_dict()}
    write_json(out / "bisect.json", fields)
    page = html or out / "bisect.html"
    title = f"{baseline} → {subject}"
    write_whole(page, render_findings(_page(title, lines, found.ranking, found)))
    _show("bisect-v1", fields, lines, found.ranking, found.notes, page, code, json=json)
    return code


def sensitivity(
    model: Annotated[str, Option("--model", help="The checkpoint: folder or hub id.")],
    edit: Annotated[str, Option(help="The edit that is planned, such as quant_rtn.")] = "quant_rtn",
    plan: Annotated[list[str] | None, Option(help="One setting of the edit, KEY=VALUE; may be given again.")] = None,
    keep: Annotated[float, Option(help="Share of the changed bytes that may stay as they are.")] = 0.1,
    budget: BudgetOption = None,
    windows: Annotated[int, Option(help="Windows to rank on.")] = 32,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    preset: PresetOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> int:
    """Rank the tensors that an edit would hurt most, before it is made, and say which to keep within a budget of bytes.

    Exit codes: 0 ranked.
    """
    if not 0.0 <= keep <= 1.0:
        raise ConfigError(f"--keep is {keep}; expected a share from 0 to 1")
    if html is not None:
        require_writable(html.parent, "the page", "--html")
    request = _request(model, model, adapter, device, None, preset, windows, budget)
    with progress("sensitivity") as tick:
        found = run_sensitivity(open_search(request, tick), edit, _plan(plan or []), keep)
    if html is not None:
        write_whole(html, render_findings(_page(f"{edit} of {model}", found.lines, found.ranking)))
    _show("sensitivity-v1", found.to_dict(), found.lines, found.ranking, found.notes, html, 0, json=json)
    return 0


def _request(
    baseline: str,
    subject: str,
    adapter: str | None,
    device: str | None,
    tier: str | None,
    preset: Path | None,
    windows: int,
    budget: str | None,
    held: int = 0,
) -> BisectRequest:
    flags = {"model.adapter": adapter, "model.device": device, "auto.tier": tier}
    config = load_config(preset, cli_overrides=flags, profile=None, require_model=False)
    try:
        limit = None if budget is None else seconds(budget)
    except ValueError:
        raise ConfigError(f"--budget is {budget!r}; expected a time such as 90s, 3m or 1h") from None
    if windows < 4:
        raise ConfigError(f"--windows is {windows}; expected 4 or more")
    return BisectRequest(
        baseline,
        subject,
        adapter=config.model.adapter,
        device=config.model.device,
        loading=Loading.of(config.model),
        tier=config.auto.tier,
        dataset=dataset_options(config.dataset),
        search=windows,
        held=held,
        budget=limit,
    )


def _plan(settings: list[str]) -> dict[str, Any]:
    pairs = [setting.partition("=") for setting in settings]
    odd = next((setting for setting, (_, equals, _) in zip(settings, pairs, strict=True) if not equals), None)
    if odd is not None:
        raise ConfigError(f"--plan got {odd!r}; expected KEY=VALUE such as bitwidth=4")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def _show(
    form: str,
    fields: dict[str, Any],
    lines: list[str],
    ranking: list[Changed],
    notes: Iterable[str],
    page: Path | None,
    code: int,
    *,
    json: bool,
) -> None:
    for text in notes:
        note(f"NOTE: {text}")
    if json:
        emit_json(format_version=form, **fields, exit_code=code)
        return
    for line in lines:
        say(line)
    say(f"{'expected':>10}  tensor, what was done")
    for change in ranking[:_SHOWN]:
        say(f"{change.expected:>10.5f}  {change.name}, {change.words}")
    if page is not None:
        say(f"{'Page':<13}{page}")


def _page(title: str, lines: list[str], ranking: list[Changed], found: Bisection | None = None) -> Findings:
    ordered = sorted(ranking, key=lambda change: -1 if (layer := layer_index(change.name)) is None else layer)
    picture = {place_of(change.name): max(change.expected, 0.0) for change in ordered}
    rows = []
    for change in ranking:
        recovered = found.recovered(change.name) if found is not None else None
        shown = "—" if recovered is None else f"{recovered:.4f}"
        rows.append((change.name, change.words, f"{change.expected:.5f}", f"{change.spread:.5f}", shown))
    return Findings(
        title=title,
        headline=lines[0] if lines else "",
        lines=lines[1:],
        columns=("tensor", "what was done", "expected nats", "standard error", "nats recovered alone"),
        rows=rows,
        picture={place: size for place, size in picture.items() if size == size},
        measure="expected damage in nats a token",
    )

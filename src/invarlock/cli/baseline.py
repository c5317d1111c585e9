"""`invarlock baseline make`: all that a comparison needs of a baseline, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from invarlock.assurance.certification import REFUSED, request_from
from invarlock.cli.console import emit_json, note, progress, say
from invarlock.cli.options import DeviceOption, JsonOption, NoCacheOption, ProfileOption, TierOption, plain_typer
from invarlock.flow.baseline import make_pack
from invarlock.policy.config import load_config

__all__ = ["app"]

app = plain_typer(no_args_is_help=True)


@app.callback()
def _baseline() -> None:
    """Measure a baseline once, into one file that stands for it."""


@app.command()
def make(
    model: Annotated[str, Argument(help="The baseline: folder or hub id.")],
    output: Annotated[Path, Option("--output", "-o", help="The pack to write; a new file.")],
    adapter: Annotated[str | None, Option(help="How to load the model; auto recognises it.")] = None,
    device: DeviceOption = None,
    profile: ProfileOption = None,
    tier: TierOption = None,
    preset: Annotated[Path | None, Option(help="YAML with data, metric and guards.")] = None,
    no_cache: NoCacheOption = False,
    json: JsonOption = False,
) -> int:
    """Measure a model on the text of a profile and write a pack: `certify --baseline PACK` needs no weights of it.

    A pack holds windows, losses, next-token distributions, spectra, sketches and digests, no weights. Guards of plugins
    that have to see the baseline are not evaluated with one.
    """
    flags = {"model.adapter": adapter, "model.device": device, "auto.tier": tier}
    config = load_config(preset, cli_overrides=flags, profile=profile, require_model=False, refused=REFUSED)
    request = request_from(config, profile=profile or "ci", subject="", baseline=model, cache=not no_cache)
    with progress("baseline make") as tick:
        made = make_pack(request, output, tick)
    for text in made.notes:
        note(f"NOTE: {text}")
    if json:
        emit_json(
            format_version="baseline-v1",
            pack=str(made.path),
            address=made.address,
            bytes=made.size,
            windows=made.windows,
            tokens=made.tokens,
            reference_bytes_per_token=made.reference_bytes_per_token,
            timings=made.timings,
            exit_code=0,
        )
        return 0
    share = (
        "no distributions"
        if made.reference_bytes_per_token is None
        else f"{made.reference_bytes_per_token:.0f} a token"
    )
    say(f"Pack         {made.path}")
    say(f"address      {made.address}")
    say(f"holds        {made.tokens:,} scored tokens in {made.windows} windows")
    say(f"size         {made.size:,} bytes; distributions before compression: {share}")
    return 0

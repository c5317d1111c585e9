"""`invarlock init`: a commented preset to start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from invarlock.cli.console import say
from invarlock.core.exceptions import ConfigError
from invarlock.core.files import write_whole
from invarlock.policy.presets import preset_text

__all__ = ["init"]


def init(
    kind: Annotated[Literal["causal", "masked", "seq2seq"], Argument(help="Which kind of model.")] = "causal",
    output: Annotated[Path, Option("--output", "-o", help="Where to write it.")] = Path("invarlock.yaml"),
    force: Annotated[bool, Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented preset: the data, the metric, the guards and the tier, each with its default."""
    if os.path.exists(output) and not (force and output.is_file()):
        raise ConfigError(f"{output} is there already; name another with -o, or replace a file with --force")
    text = preset_text(kind).replace(f"--preset {kind}", f"--preset {output}")
    write_whole(output, text)
    say(f"{output}: name your own text in it, then")
    say(f"  invarlock certify --preset {output} --baseline BASELINE --subject SUBJECT")

"""Options that several training scripts have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path | None, typer.Option(help="Where checkpoints, log, model and results go.")]
Resume = Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --output.")]
StopAfter = Annotated[int | None, typer.Option(min=1, help="End after this iteration, as if it were the last.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        "--dry_run",
        help="Train two steps on random data of the recipe's size, print what a step costs, save nothing; needs no data.",
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        "--push_to_hub",
        help="namespace/name on the Hub that gets what is saved in the end, and a card.",
    ),
]
Private = Annotated[bool, typer.Option(help="Create that repository as a private one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value")]
DATA_NEEDED = "--data and --output are needed, except with --dry-run"

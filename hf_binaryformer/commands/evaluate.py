"""python -m hf_binaryformer.commands.evaluate segmentation --model binaryformer-tiny-brain --data data/brain

In a clone: ``scripts/evaluate.py``. Scores a trained checkpoint: ``segmentation`` with Dice, NSD and HD95 on a split of a
prepared folder, as at the end of a training; ``inpainting`` as
:mod:`hf_binaryformer.commands.evaluate_inpainting` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_binaryformer.commands.choices import DType, Mirror
from hf_binaryformer.commands.evaluate_inpainting import inpainting
from hf_binaryformer.commands.outputs import check_outputs, write_json
from hf_binaryformer.data.prepared_folder import PreparedFolder
from hf_binaryformer.pipelines.whole_files import all_or_nothing
from hf_binaryformer.training.segmentation_scores import evaluate_split

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Scores of trained checkpoints.")
app.command()(inpainting)


@app.command()
def segmentation(
    data: Annotated[Path, typer.Option(help="Folder written by `binaryformer prepare`.")],
    model: Annotated[str, typer.Option(help="Short name, folder or Hub id.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    report: Annotated[Path | None, typer.Option(help="All figures to write: .json.")] = None,
    dtype: Annotated[DType, typer.Option(help="Number format of the network.")] = DType.float32,
    mirror: Mirror = None,
    compare_pieces: Annotated[
        bool,
        typer.Option("--compare-pieces", help="All pieces of each structure, and beside them the largest only."),
    ] = False,
) -> None:
    """Segment the volumes of a split and score them, beside the prior atlas; sides apart, and merged if there are any."""
    targets = check_outputs([(report, (".json",))], [])
    folder = PreparedFolder(data)
    if not folder.split(split):
        raise typer.BadParameter(f"{data} has no volumes in the split '{split}': give another --split")
    results = evaluate_split(
        model,
        folder,
        split,
        baseline=bool(folder.split("train")),
        dtype=dtype.value,
        mirror=mirror,
        compare_pieces=compare_pieces,
    )
    with all_or_nothing(targets) as temporary:
        if report:
            write_json(temporary[report], results)


if __name__ == "__main__":
    app()

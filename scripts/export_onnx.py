"""python scripts/export_onnx.py binaryformer-tiny-brain network.onnx

Writes a segmentation network as an ONNX file (:mod:`hf_binaryformer.modeling.exporting`). Needs the extra "onnx".
"""

from pathlib import Path
from typing import Annotated

import typer

from hf_binaryformer.modeling.exporting import OPSET, export_onnx
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation


def main(
    name: Annotated[str, typer.Argument(help="Short name, folder or Hub id of a segmentation network.")],
    out: Annotated[Path, typer.Argument(help="File to write, *.onnx.")],
    height: Annotated[int | None, typer.Option(help="Of the images, pixels; default: the configuration's.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the images, pixels.")] = None,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = OPSET,
) -> None:
    """Load and write."""
    model = BinaryFormerForSemanticSegmentation.from_pretrained(name)
    typer.echo(f"wrote {export_onnx(model, out, height=height, width=width, opset=opset)}")


if __name__ == "__main__":
    typer.run(main)

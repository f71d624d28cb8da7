"""A body drawn around organs whose label map has nothing between them; every draw gets another one.

All shapes are smooth and random, and none of them overwrites an organ: structures inside an organ keep its label. The
order is that of painting, from the outside inwards: outline, skeleton, pelvis and chest, vessels, bowel, and what is in organs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hf_binaryformer.data.boxes import shifted
from hf_binaryformer.data.synthesis.anatomy import Anatomy
from hf_binaryformer.data.synthesis.canvas import BodyRanges, Canvas
from hf_binaryformer.data.synthesis.description import check_keys
from hf_binaryformer.data.synthesis.organs import paint_organs
from hf_binaryformer.data.synthesis.outline import Shell, paint_shell
from hf_binaryformer.data.synthesis.pelvis import paint_pelvis
from hf_binaryformer.data.synthesis.skeleton import paint_chest, paint_skeleton
from hf_binaryformer.data.synthesis.tubes import paint_bowel, paint_vessels

# Air on each side of the body, mm.
AIR_MM = 12.0


def embodied(anatomy: Anatomy, rng: np.random.Generator) -> Anatomy:
    """The anatomy with a body around its organs, or itself if its description asks for none.

    Raises:
        ValueError: the description's ranges of the body are wrong.
    """
    told = anatomy.description
    if told.body is None:
        return anatomy
    check_keys(BodyRanges, told.body, "the ranges of the body lack", "and have unknown")
    ranges = BodyRanges(**told.body)
    organs, start = _in_height(anatomy, ranges, rng)
    shell = Shell.drawn(organs, anatomy, ranges, rng)
    # A rim of air, in which the plane of the body ends; along the body's axis it goes on.
    low, high = shell.extent()
    before = np.ceil(np.maximum(AIR_MM - low, 0) / anatomy.mm).astype(int)
    after = np.ceil(np.maximum(high + AIR_MM - np.array(organs.shape[:2]) * anatomy.mm, 0) / anatomy.mm).astype(int)
    organs = np.pad(organs, [(before[0], after[0]), (before[1], after[1]), (0, 0)])
    shell = shell.moved(before * anatomy.mm)
    canvas = Canvas(organs, anatomy.mm, told, ranges, rng)
    paint_shell(canvas, shell)
    paint_skeleton(canvas, shell)
    paint_pelvis(canvas, shell)
    paint_chest(canvas, shell)
    paint_vessels(canvas, shell)
    paint_bowel(canvas, shell)
    paint_organs(canvas)
    affine = shifted(anatomy.affine, anatomy.mm * (start - np.array([*before, 0])))
    return dataclasses.replace(anatomy, values=canvas.values, affine=affine, beyond="border")


def _in_height(anatomy: Anatomy, ranges: BodyRanges, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The organs in the height of the body, and its first voxel (3,) in the anatomy."""
    aorta = next(label for label, name in anatomy.description.label_names.items() if name == "aorta")
    height = np.flatnonzero(((anatomy.values > 0) & (anatomy.values != aorta)).any((0, 1)))
    above, below = (int(rng.uniform(*ends) / anatomy.mm) for ends in (ranges.above, ranges.below))
    # The great vessel goes on to the end of the scan, which is the end of what is known.
    top = min(anatomy.values.shape[2], height[-1] + 1 + above)
    return np.pad(anatomy.values[:, :, :top], [(0, 0), (0, 0), (below, 0)]), np.array([0, 0, -below])

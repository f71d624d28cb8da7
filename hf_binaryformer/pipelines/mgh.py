"""Reading FreeSurfer's volumes with nibabel: .mgh, and .mgz, which is the same in gzip."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hf_binaryformer.pipelines.nifti import check_voxels, parsing, unpacked

# Voxels start here; what follows them (scan parameters, then tags) is not needed.
HEADER_BYTES = 284
AFTER_VOXELS = 2**16
# goodRASFlag. nibabel replaces a geometry that is not stated, and sets the flag in its own header.
POSITION_FLAG = slice(28, 30)


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Array in the type that the file has, affine in mm (RAS+), and notes on the geometry.

    Raises:
        VolumeError: the file is not MGH, damaged, shorter than its header says, or too large.
    """
    from nibabel.freesurfer.mghformat import MGHHeader, MGHImage

    with parsing(path), unpacked(path) as (file, available):
        start = file.read(HEADER_BYTES)
        if len(start) < HEADER_BYTES:
            raise EOFError(f"a header has {HEADER_BYTES} bytes, the file has {len(start)}")
        header = MGHHeader(start, check=False)
        if header["version"] != 1:
            raise ValueError("it does not start with the header of an MGH volume")
        shape = tuple(int(size) for size in header.get_data_shape())
        check_voxels(path, shape)
        claimed = HEADER_BYTES + math.prod(shape) * header.get_data_dtype().itemsize
        if claimed > available:
            raise EOFError(f"its header asks for {claimed} bytes, the file has at most {available}")
        content = start + file.read(claimed - HEADER_BYTES + AFTER_VOXELS)
        if len(content) < claimed:
            raise EOFError(f"its header asks for {claimed} bytes, the file has {len(content)}")
        while file.read(2**20):
            pass
        image = MGHImage.from_bytes(content)
        notes = []
        if not any(start[POSITION_FLAG]):
            notes.append("it states no position: coronal slices are taken, as FreeSurfer does")
        return np.asarray(image.dataobj), np.asarray(image.affine, np.float64), notes

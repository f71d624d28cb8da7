"""Small valid files of each kind, from which inputs are made."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (4, 5, 6)
AFFINE = np.array([[-1.5, 0, 0, 10], [0, 1, 0.2, -20], [0, -0.2, 2, 30], [0, 0, 0, 1.0]])
LABELS = {"0": "background", "1": "cortex", "2": "white matter"}
MANIFEST = {
    "name": "toy",
    "licence": "CC0",
    "label_names": LABELS,
    "spacing": [1.0, 1.0, 1.0],
    "cases": [
        {"case": "a", "group": "p1", "split": "train", "image": "images/a.nii.gz", "label": "labels/a.nii.gz"},
        {"case": "b", "group": "p2", "split": "test", "image": "images/b.nii.gz"},
    ],
}
# What `segment` reports of labels, of which only numbers and names are read.
REPORT_LABELS = {
    "labels": [{"label": 1, "name": "cortex", "mm3": 2.0}, {"label": 2, "name": "white matter", "mm3": 1.0}]
}
RECIPES = {
    "network": "like: tiny-brain\ntrain:\n  learning_rate: 1e-4\n  batch_size: 2\n",
    "sampler": "data: {spacing: [2.0, 2.0, 2.0], mirror_axis: 0}\ntransformer: {num_layers: 2, grid_size: [2, 3, 4]}\n"
    "scheduler: {temperature: 0.8}\nsampler: &s {iterations: 10, seed: 1}\nnotes: {kept: *s}\n",
    "pixels": "model:\n  hidden_size: 64\n  num_heads: 2\n  token_type: pixel\ndata:\n  name: cifar10\ntrain:\n"
    "  betas: [0.9, 0.99]\n  validate_every: null\n  compile: no\n",
}


def voxels(dtype: str) -> np.ndarray:
    """Whole numbers from 0 to 119, so that they pass as an image and as labels."""
    return np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)


def nifti_files() -> dict[str, bytes]:
    """NIfTI-1 and NIfTI-2, of several types; one scaled, one of the other byte order, one with an extension."""
    import nibabel as nib
    from nibabel.nifti1 import Nifti1Extension

    files = {}
    for dtype in ("uint8", "int16", "float32"):
        image = nib.Nifti1Image(voxels(dtype), AFFINE)
        image.set_qform(AFFINE, code=1)
        files[dtype] = image.to_bytes()
    scaled = nib.Nifti1Image(voxels("int16"), AFFINE)
    scaled.header.set_slope_inter(2, -5)
    scaled.header.set_xyzt_units("mm")
    files["scaled"] = scaled.to_bytes()
    scaled.header.extensions.append(Nifti1Extension("comment", json.dumps(LABELS).encode()))
    files["extended"] = scaled.to_bytes()
    files["second"] = nib.Nifti2Image(voxels("float64"), AFFINE).to_bytes()
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    files["swapped"] = nib.Nifti1Image(voxels(">i2"), AFFINE, header).to_bytes()
    return files


def compressed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same, each as gzip without a time, so that it can be made again."""
    return {name: gzip.compress(content, mtime=0) for name, content in files.items()}


def itk_files(suffix: str, folder: Path) -> dict[str, bytes]:
    """Files with and without compression, of several types."""
    import SimpleITK as sitk

    files = {}
    for dtype in ("uint8", "int16", "float32"):
        for packed in (False, True):
            image = sitk.GetImageFromArray(np.ascontiguousarray(voxels(dtype).T))
            image.SetSpacing((1.5, 1.0, 2.0))
            image.SetOrigin((-3.0, 4.0, 5.0))
            path = folder / f"seed{suffix}"
            sitk.WriteImage(image, str(path), useCompression=packed)
            files[f"{dtype}-{packed}"] = path.read_bytes()
            path.unlink()
    return files


def _dicom(uid: str, sop_class: str) -> Any:
    import pydicom

    dataset: Any = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.UID(sop_class), pydicom.uid.UID(uid)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.Modality = "1.2.3.4", "1.2.3", "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = SHAPE[1], SHAPE[0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    return dataset


def _saved(dataset: Any, path: Path) -> bytes:
    dataset.save_as(path, enforce_file_format=True)
    content = path.read_bytes()
    path.unlink()
    return content


def dicom_series(folder: Path) -> list[bytes]:
    """A series of three slices."""
    slices = []
    for k in range(3):
        dataset = _dicom(f"1.2.3.4.{k}", "1.2.840.10008.5.1.4.1.1.4")
        dataset.PixelSpacing, dataset.ImageOrientationPatient = [1.0, 1.5], [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient, dataset.SliceThickness = [0, 0, 2.0 * k], 2.0
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.EchoTime = 2.0, -1.0, 3.5
        dataset.PixelPaddingValue = 7
        dataset.PixelData = voxels("uint16")[:, :, k].T.tobytes()
        slices.append(_saved(dataset, folder / "seed.dcm"))
    return slices


def dicom_multiframe(folder: Path, *, packed: bool) -> bytes:
    """An enhanced MR of three frames; run-length encoded if ``packed``."""
    import pydicom

    def item(**attributes: Any) -> Any:
        dataset = pydicom.Dataset()
        for name, value in attributes.items():
            setattr(dataset, name, value)
        return dataset

    dataset = _dicom("1.2.3.5", "1.2.840.10008.5.1.4.1.1.4.1")
    dataset.NumberOfFrames = 3
    dataset.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelMeasuresSequence=[item(PixelSpacing=[1.0, 1.5], SliceThickness=2.0)],
            PixelValueTransformationSequence=[item(RescaleSlope=2.0, RescaleIntercept=-1.0)],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2.0 * k])]) for k in range(3)
    ]
    dataset.PixelData = np.ascontiguousarray(voxels("uint16")[:, :, :3].T).tobytes()
    if packed:
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    return _saved(dataset, folder / "seed.dcm")

"""Multi-frame DICOM files: geometry and values of every frame by DICOM's own formulas, and files that are no volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_cases import (
    ENHANCED_CLASSES,
    ENHANCED_MR,
    SHARED,
    placed,
    ras_affine,
    write_dicom,
    write_multiframe,
)
from volume_cases import assert_same_content, noise

from hf_binaryformer.pipelines.volumes import VolumeError, read_volume

pytest.importorskip("SimpleITK")
pydicom = pytest.importorskip("pydicom")

# The slice that each frame of a file shows: out of order, as two interleaved passes over the body are.
INTERLEAVED = [4, 2, 0, 5, 3, 1]


def slices(count: int = 6) -> np.ndarray:
    """Pixels of (slices, rows, columns), all different from slice to slice."""
    return noise((count, 8, 9)).astype(np.uint16)


@pytest.mark.parametrize("name", ENHANCED_CLASSES)
def test_frames_lie_where_their_functional_groups_say(name: str, tmp_path: Path) -> None:
    pixels = slices()
    path = write_multiframe(
        tmp_path / "mr.dcm",
        pixels[INTERLEAVED],
        [placed(k) for k in INTERLEAVED],
        sop_class=ENHANCED_CLASSES[name],
    )
    volume = read_volume(path)
    assert_same_content(volume.array, volume.affine, pixels.transpose(2, 1, 0), ras_affine())
    np.testing.assert_allclose(volume.spacing, (0.75, 1.5, 2.0), rtol=1e-6)
    assert volume.source.kind == "dicom"
    np.testing.assert_array_equal(read_volume(tmp_path).array, volume.array)


def test_a_frame_overrules_what_all_share(tmp_path: Path) -> None:
    pixels = slices()
    frames = [placed(k, **SHARED, RescaleSlope=2.0, RescaleIntercept=-7.0) for k in range(6)]
    elsewhere = {
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [9, 9],
        "RescaleSlope": 5,
        "RescaleIntercept": 5,
    }
    volume = read_volume(write_multiframe(tmp_path / "mr.dcm", pixels, frames, shared=elsewhere))
    assert_same_content(volume.array, volume.affine, pixels.transpose(2, 1, 0) * 2.0 - 7, ras_affine())

    shared = {**SHARED, "RescaleSlope": 0.5, "RescaleIntercept": -1000.0}
    volume = read_volume(write_multiframe(tmp_path / "ct.dcm", pixels, [placed(k) for k in range(6)], shared=shared))
    assert_same_content(volume.array, volume.affine, pixels.transpose(2, 1, 0) * 0.5 - 1000, ras_affine())


def test_each_frame_is_rescaled_by_its_own_slope(tmp_path: Path) -> None:
    pixels = slices()
    rescale = [(1.0, 0.0), (0.25, -3.0), (2.0**-11, 0.0), (2.0**-11, 0.5), (7.0, 100.0), (1.0, 0.0)]
    frames = [placed(k, RescaleSlope=rescale[k][0], RescaleIntercept=rescale[k][1]) for k in INTERLEAVED]
    volume = read_volume(write_multiframe(tmp_path / "mr.dcm", pixels[INTERLEAVED], frames))
    real = np.stack([pixels[k] * slope + intercept for k, (slope, intercept) in enumerate(rescale)])
    assert_same_content(volume.array, volume.affine, real.transpose(2, 1, 0).astype(np.float32), ras_affine())


def test_stacks_that_continue_one_another_are_one_volume(tmp_path: Path) -> None:
    pixels = slices()
    order = [3, 4, 5, 0, 1, 2]
    frames = [placed(k, StackID=str(1 + k // 3)) for k in order]
    volume = read_volume(write_multiframe(tmp_path / "mr.dcm", pixels[order], frames))
    assert_same_content(volume.array, volume.affine, pixels.transpose(2, 1, 0), ras_affine())


def test_one_frame_takes_its_depth_from_the_slice_thickness(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "mr.dcm", slices(1), [placed(0)], shared={**SHARED, "SliceThickness": 4.0})
    volume = read_volume(path)
    np.testing.assert_allclose(volume.spacing, (0.75, 1.5, 4.0))
    assert_same_content(volume.array, volume.affine, slices(1).transpose(2, 1, 0), ras_affine((0.0, 0.0, 4.0)))


def test_missing_frames_are_named(tmp_path: Path) -> None:
    kept = [*range(20), *range(40, 60)]
    path = write_multiframe(tmp_path / "mr.dcm", slices(40), [placed(k) for k in kept])
    with pytest.raises(VolumeError, match=r"40 slices 2 mm apart.*gap of 42 mm.*frame 20.*frame 21.*missing"):
        read_volume(path)


def test_steps_may_differ_by_a_twentieth(tmp_path: Path) -> None:
    """Scanners round positions; a step that is longer by more is a gap."""
    for number, (longer, accepted) in enumerate(((0.04, True), (0.06, False), (-0.04, True), (-0.06, False))):
        places = [*range(10), *(k + longer for k in range(10, 20))]
        path = write_multiframe(tmp_path / f"{number}.dcm", slices(20), [placed(k) for k in places])
        if accepted:
            assert read_volume(path).spacing[2] == pytest.approx(2 * (19 + longer) / 19, rel=1e-4)
        else:
            with pytest.raises(VolumeError, match="slices are missing"):
                read_volume(path)


def at_each_position(name: str, values: tuple[object, ...]) -> list[dict[str, object]]:
    return [placed(k, **{name: value}) for value in values for k in range(30)]


PHASE, MAGNITUDE = ["ORIGINAL", "PRIMARY", "P", "NONE"], ["ORIGINAL", "PRIMARY", "M", "NONE"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (at_each_position("EffectiveEchoTime", (10.0, 80.0)), r"2 echo times \(10, 80 ms\) at each of 30 positions"),
        (at_each_position("DiffusionBValue", (0.0, 1000.0)), r"2 b-values \(0, 1000 s/mm²\) at each of 30 positions"),
        (at_each_position("TemporalPositionIndex", (1, 2, 3)), r"3 temporal positions \(1, 2, 3\) at each of 30"),
        (at_each_position("FrameType", (MAGNITUDE, PHASE)), r"2 image types \(.*M.*, .*P.*\) at each of 30 positions"),
        (
            at_each_position("StackID", ("1", "1")),
            r"2 images at each of 30 positions, which their headers do not tell apart",
        ),
        (at_each_position("EffectiveEchoTime", (10.0, 80.0))[:40], r"2 echo times \(10, 80 ms\) at 10 of 30 positions"),
    ],
)
def test_several_images_at_a_position_are_named(frames: list[dict], message: str, tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "mr.dcm", slices(len(frames)), frames)
    with pytest.raises(VolumeError, match=message + r".*expected one.*dcm2niix") as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_localiser_of_three_planes_is_refused(tmp_path: Path) -> None:
    planes = {"1": [1, 0, 0, 0, 1, 0], "2": [1, 0, 0, 0, 0, -1], "3": [0, 1, 0, 0, 0, -1]}
    frames = [
        {"ImagePositionPatient": [10.0 * k] * 3, "ImageOrientationPatient": plane, "StackID": stack}
        for stack, plane in planes.items()
        for k in range(3)
    ]
    path = write_multiframe(tmp_path / "scout.dcm", slices(9), frames)
    with pytest.raises(VolumeError, match=r"3 orientations \(3 axial, 3 coronal, 3 sagittal\).*one stack.*dcm2niix"):
        read_volume(path)


@pytest.mark.parametrize(
    ("sop_class", "name"),
    [
        ("1.2.840.10008.5.1.4.1.1.7.3", "Multi-frame Grayscale Word Secondary Capture Image Storage"),
        ("1.2.840.10008.5.1.4.1.1.3.1", "Ultrasound Multi-frame Image Storage"),
        ("1.2.840.10008.5.1.4.1.1.481.2", "RT Dose Storage"),
        ("1.2.840.10008.5.1.4.1.1.20", "Nuclear Medicine Image Storage"),
    ],
)
def test_frames_without_functional_groups_are_refused_by_name(sop_class: str, name: str, tmp_path: Path) -> None:
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    for tags in ({}, place):
        path = write_multiframe(tmp_path / "sc.dcm", slices(), None, sop_class=sop_class, **tags)
        with pytest.raises(VolumeError, match=rf"{name}.*6 frames.*functional groups.*export"):
            read_volume(path)


def test_a_segmentation_object_is_refused_by_name(tmp_path: Path) -> None:
    path = write_multiframe(
        tmp_path / "seg.dcm", slices(), [placed(k) for k in range(6)], sop_class="1.2.840.10008.5.1.4.1.1.66.4"
    )
    with pytest.raises(VolumeError, match=r"Segmentation Storage.*convert"):
        read_volume(path, labels=True)


def test_incomplete_functional_groups_are_refused(tmp_path: Path) -> None:
    complete = [placed(k) for k in range(6)]
    path = write_multiframe(tmp_path / "few.dcm", slices(), complete[:5])
    with pytest.raises(VolumeError, match=r"6 frames.*describes 5"):
        read_volume(path)
    path = write_multiframe(tmp_path / "lost.dcm", slices(), [*complete[:5], {"StackID": "1"}])
    with pytest.raises(VolumeError, match=r"frame 6 of .*lost\.dcm.*ImagePositionPatient"):
        read_volume(path)
    for missing in ("ImageOrientationPatient", "PixelSpacing"):
        shared = {name: value for name, value in SHARED.items() if name != missing}
        path = write_multiframe(tmp_path / "lost.dcm", slices(), complete, shared=shared)
        with pytest.raises(VolumeError, match=rf"lost\.dcm.*{missing}"):
            read_volume(path)
    shared = {**SHARED, "RescaleSlope": 0.0, "RescaleIntercept": 1.0}
    path = write_multiframe(tmp_path / "flat.dcm", slices(), complete, shared=shared)
    with pytest.raises(VolumeError, match=r"rescale slope of 0"):
        read_volume(path)


def test_each_of_two_files_of_a_series_can_be_chosen(tmp_path: Path) -> None:
    first, second = slices(), slices() + 300
    for pixels, echo in ((first, 10.0), (second, 80.0)):
        frames = [placed(k, EffectiveEchoTime=echo) for k in range(6)]
        write_multiframe(tmp_path / f"echo{echo:g}.dcm", pixels, frames)
    with pytest.raises(VolumeError, match=r"2 echo times \(10, 80 ms\) at each of 6 positions.*any one file"):
        read_volume(tmp_path)
    for name, pixels in (("echo10", first), ("echo80", second)):
        volume = read_volume(tmp_path / f"{name}.dcm")
        assert_same_content(volume.array, volume.affine, pixels.transpose(2, 1, 0), ras_affine())


def test_the_parts_of_a_concatenation_are_one_volume(tmp_path: Path) -> None:
    first, second = slices(), slices() + 300
    for echo, pixels in ((1, first), (2, second)):
        for part, ks in enumerate(([0, 1, 2], [3, 4, 5])):
            path = tmp_path / f"echo{echo}_part{part}.dcm"
            frames = [placed(k, EffectiveEchoTime=float(echo)) for k in ks]
            write_multiframe(path, pixels[ks], frames, ConcatenationUID=f"1.2.3.{echo}")
    for echo, pixels in ((1, first), (2, second)):
        volume = read_volume(tmp_path / f"echo{echo}_part1.dcm")
        assert_same_content(volume.array, volume.affine, pixels.transpose(2, 1, 0), ras_affine())


def test_private_and_empty_groups_are_ignored(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "mr.dcm", slices(), [placed(k) for k in range(6)])
    dataset = pydicom.dcmread(path)
    for group in dataset.PerFrameFunctionalGroupsSequence:
        group.ReferencedImageSequence = []
        private = pydicom.Dataset()
        private.RescaleSlope, private.PixelSpacing = 9, [9, 9]
        group.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(0x0F, "SQ", [private])
    dataset.save_as(path)
    volume = read_volume(path)
    assert_same_content(volume.array, volume.affine, slices().transpose(2, 1, 0), ras_affine())


@pytest.mark.parametrize("codec", ["RLE", "JPEG-LS"])
def test_compressed_frames_hold_their_stored_values(codec: str, tmp_path: Path) -> None:
    source = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
    stored = np.stack([source.pixel_array] * 3)
    frames = [placed(k, RescaleSlope=s, RescaleIntercept=-1.0) for k, s in enumerate((1.0, 0.5, 0.25))]
    path = write_multiframe(tmp_path / "mr.dcm", stored, frames)
    dataset = pydicom.dcmread(path)
    if codec == "RLE":
        dataset.compress(pydicom.uid.RLELossless)
    else:
        one = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small_jpeg_ls_lossless.dcm"))
        (encoded,) = pydicom.encaps.generate_frames(one.PixelData, number_of_frames=1)
        dataset.PixelData = pydicom.encaps.encapsulate([encoded] * 3)
        dataset.file_meta.TransferSyntaxUID = one.file_meta.TransferSyntaxUID
        for name in ("BitsStored", "HighBit", "PixelRepresentation"):
            setattr(dataset, name, getattr(one, name))
    dataset.save_as(path)
    volume = read_volume(path)
    real = np.stack([stored[k] * s - 1.0 for k, s in enumerate((1.0, 0.5, 0.25))])
    assert_same_content(volume.array, volume.affine, real.transpose(2, 1, 0).astype(np.float32), ras_affine())

    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(VolumeError, match=r"mr\.dcm is truncated, damaged"):
        read_volume(path)


def test_truncated_frames_are_noticed(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "mr.dcm", slices(), [placed(k) for k in range(6)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(VolumeError, match=r"mr\.dcm is truncated, damaged"):
        read_volume(path)


def test_enhanced_and_classic_files_of_the_same_content_agree(tmp_path: Path) -> None:
    pixels = slices().astype(np.int16)
    write_dicom(tmp_path / "classic", pixels.transpose(1, 2, 0), step=(0.0, 0.0, 2.0))
    enhanced = write_multiframe(tmp_path / "mr.dcm", pixels, [placed(k) for k in range(6)], sop_class=ENHANCED_MR)
    ours, theirs = read_volume(enhanced), read_volume(tmp_path / "classic")
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)

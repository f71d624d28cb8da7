"""From what a visitor gives to a scan in their workspace."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from hf_binaryformer.app.dicom_zip import unpack_dicom
from hf_binaryformer.app.limits import Limits, check_shape, check_upload, check_voxels, clean_name, suffix_of
from hf_binaryformer.app.workspace import Workspace
from hf_binaryformer.pipelines.volumes import Volume, check_same_grid, read_volume

ABANDONED_SECONDS = 3600.0


def take_upload(workspace: Workspace, upload: Path, limits: Limits) -> Volume:
    """Move an uploaded file into the workspace and read it; the upload itself is gone afterwards.

    Args:
        workspace: whose older scan and results are deleted.
        upload: .nii, .nii.gz, or a .zip of one DICOM series.
        limits: see :class:`~hf_binaryformer.app.limits.Limits`.

    Raises:
        VolumeError: the file cannot be used; nothing of it is left then.
        ImportError: DICOM needs the extra ``dicom``.
    """
    try:
        folder = workspace.new_scan_folder()
        path = _moved(upload, folder, limits)
        if suffix_of(path.name) == ".zip":
            # The volume is called as the zip was.
            series = folder / path.name[: -len(".zip")]
            unpack_dicom(path, series, limits)
            path.unlink()
            path = series
        return _read(workspace, path, limits)
    except BaseException:
        workspace.clear()
        raise
    finally:
        discard(upload)


def take_example(workspace: Workspace, limits: Limits) -> Volume:
    """Take the MNI152 template as the scan.

    Raises:
        ModuleNotFoundError: nilearn, which carries it, is missing; the extra ``demo`` has it.
    """
    from hf_binaryformer.commands.demo import load_mni152

    try:
        path, _ = load_mni152(workspace.new_scan_folder())
        return _read(workspace, path, limits)
    except BaseException:
        workspace.clear()
        raise


def take_mask(workspace: Workspace, upload: Path, limits: Limits) -> Path:
    """Move an uploaded mask, .nii or .nii.gz, into the workspace, beside the scan.

    Raises:
        ValueError: there is no scan, or the mask is 0 everywhere.
        VolumeError: the mask cannot be used, or lies on another grid. An older mask stays.
    """
    try:
        _, volume = workspace.scan()
        if suffix_of(upload.name) == ".zip":
            raise ValueError(f"the mask is '{upload.name}', expected .nii or .nii.gz on the scan's grid")
        folder = workspace.new_mask_folder()
        try:
            path = _moved(upload, folder, limits)
            check_voxels(path, limits)
            mask = read_volume(path, labels=True)
            check_same_grid(volume, mask)
            if not mask.array.any():
                raise ValueError(
                    f"the mask '{path.name}' is 0 everywhere, expected the hole as other numbers: draw it again"
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return workspace.set_mask(path)
    finally:
        discard(upload)


def discard(upload: Path) -> None:
    """Delete an uploaded file, and its folder if that is empty then."""
    upload.unlink(missing_ok=True)
    try:
        os.rmdir(upload.parent)
    except OSError:
        # Another upload lies there, or nothing ever did.
        return


def sweep(uploads: Path, seconds: float = ABANDONED_SECONDS) -> None:
    """Delete uploads that nobody took, such as those that were broken off, once they are older than ``seconds``."""
    # Other visitors' uploads come and go meanwhile, which os.walk puts up with.
    for path in [Path(folder, name) for folder, _, names in os.walk(uploads) for name in names]:
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > seconds:
                discard(path)


def _moved(upload: Path, folder: Path, limits: Limits) -> Path:
    try:
        check_upload(upload, upload.name, limits)
        return Path(shutil.move(upload, folder / clean_name(upload.name)))
    except FileNotFoundError as error:
        raise ValueError(f"'{upload.name}' did not arrive, expected a whole file: drop it again") from error


def _read(workspace: Workspace, path: Path, limits: Limits) -> Volume:
    if path.is_file():
        check_voxels(path, limits)
    volume = read_volume(path)
    check_shape(path.name, volume.array.shape, limits)
    workspace.source, workspace.volume = path, volume
    return volume

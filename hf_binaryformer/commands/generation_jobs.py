"""The work of `inpaint` and `synthesize`, without the command line: from files to files, with all results or none."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_binaryformer.commands.jobs import Progress, usable_device
from hf_binaryformer.commands.outputs import check_outputs, write_json
from hf_binaryformer.commands.start_up import without_collection
from hf_binaryformer.pipelines.provenance import GENERATED, NOTICE, versions
from hf_binaryformer.pipelines.whole_files import all_or_nothing

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from hf_binaryformer.pipelines.volumes import Volume
    from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintOutput
    from hf_binaryformer.pipelines.vq_sampling import VQSamplingPipeline

DEFAULT_MODEL = "binaryvq-tiny-brain"
DEFAULT_STEPS, DEFAULT_TEMPERATURE = 200, 0.8
# With more columns than this, the images would be too small.
MAX_COLUMNS = 4


def inpaint_file(
    source: Path,
    mask: Path,
    output: Path,
    *,
    std_map: Path | None = None,
    overlay: Path | None = None,
    report: Path | None = None,
    samples: int = 1,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    temperature: float = DEFAULT_TEMPERATURE,
    feather: int = 0,
    selection: str | None = None,
    model: str = DEFAULT_MODEL,
    backend: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    truth: Path | None = None,
    title: str = "",
    progress: Progress | bool = False,
) -> dict[str, Any]:
    """Fill the hole of a volume on its own grid.

    Args:
        source: NIfTI, .mha, .mhd, .nrrd or .mgz file, or a DICOM folder; its values inside the hole are not used.
        mask: volume on the same grid with whole numbers; voxels other than 0 are the hole.
        output: volume to write; several samples become a 4D NIfTI.
        std_map: volume to write with the sample standard deviation over samples; this needs at least two samples.
        overlay: PNG to write: hole and result, and truth and standard deviation if available.
        report: JSON to write, with the same content as the return value.
        samples: number of results.
        seed: random seed; the same seed gives the same bytes on one machine with the same number of threads, because
            sums are rounded in another order with another number.
        steps, temperature, feather, selection: see ``BinaryVQInpaintPipeline``.
        model: short name, folder or Hub id.
        backend: backend of Hamming attention; None leaves the choice to the operator.
        dtype: "float32", "bfloat16", "float16", or "auto", see :func:`~hf_binaryformer.pipelines.precision.fast_format`.
        device: torch device; None takes CUDA if it is available, otherwise the CPU.
        truth: volume on the same grid, shown in the overlay.
        title: first line of the overlay; the source's name if empty.
        progress: called with (done, total) after each step, or whether to show the pipeline's own bar.

    Raises:
        ValueError, OSError: bad input (see :mod:`hf_binaryformer.pipelines.volumes`) or unusable output.
        BackendUnavailableError: the backend cannot run here.
    """
    wanted = ((output, _suffixes(samples)), (std_map, _suffixes(1)), (overlay, (".png",)), (report, (".json",)))
    targets = check_outputs(wanted, [source, mask, *([truth] if truth else [])])
    if std_map is not None and samples < 2:
        raise ValueError(f"a std map needs at least 2 samples, asked for is {samples}: add --samples 8, for example")
    volume, hole, true_volume = _read_inpainting(source, mask, truth)

    with without_collection():
        import torch

        from hf_binaryformer.pipelines.volumes import check_output_path, write_image
        from hf_binaryformer.pipelines.vq_inpainting import EMPTY_MASK, BinaryVQInpaintPipeline

        check_output_path(output, volume)
        pipeline = _load(BinaryVQInpaintPipeline, model)
    callback = _set_up(pipeline, device, dtype, backend, progress)
    with warnings.catch_warnings():
        # The report contains the same note, so the warning is not needed.
        warnings.filterwarnings("ignore", message=EMPTY_MASK)
        result = pipeline(
            volume,
            hole,
            num_inference_steps=steps,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
            num_samples=samples,
            output_type="np",
            callback_on_step_end=callback,
            feather=feather,
            selection=selection,
        )
    settings = _settings(pipeline, model, dtype, seed, steps, temperature)
    chosen = selection or pipeline.scheduler.config.selection
    content = {**result.report, "feather": feather, "selection": chosen, **settings}
    picture = None
    if overlay is not None:
        picture = _inpainting_picture(volume, hole, result, true_volume, samples, title or source.name)
    with all_or_nothing(targets) as temporary:
        result.save(temporary[output])
        if std_map is not None:
            description = f"{GENERATED} Standard deviation. {NOTICE}"
            write_image(temporary[std_map], result.std[0, 0], volume, description=description)
        if overlay is not None and picture is not None:
            picture.save(temporary[overlay], format="PNG", optimize=True)
        if report is not None:
            write_json(temporary[report], content)
    return content


def _read_inpainting(source: Path, mask: Path, truth: Path | None) -> tuple[Volume, Volume, Volume | None]:
    """The image, the mask, and the true image on the same grid if it is given."""
    from hf_binaryformer.pipelines.volumes import check_same_grid, read_volume

    volume, hole = read_volume(source, exact=True), read_volume(mask, labels=True)
    true_volume = read_volume(truth) if truth else None
    if true_volume is not None:
        check_same_grid(volume, true_volume)
    return volume, hole, true_volume


def _inpainting_picture(
    volume: Volume, hole: Volume, result: BinaryVQInpaintOutput, truth: Volume | None, samples: int, title: str
) -> Image:
    """A picture of hole and first result, and of truth and standard deviation if available, side by side."""
    import numpy as np

    from hf_binaryformer.pipelines.panels import volume_panels

    columns = {"hole": np.nan_to_num(volume.array), "result": np.asarray(result.images)[0, 0]}
    if truth is not None:
        columns["truth"] = truth.array
    maps = {} if result.std is None else {f"std of {samples} samples": np.asarray(result.std)[0, 0]}
    mask = hole.array != 0
    return volume_panels(columns, volume.spacing, hole=mask, hide_hole_in=["hole"], maps=maps, title=title)


def synthesize_file(
    output: Path,
    *,
    overlay: Path | None = None,
    report: Path | None = None,
    samples: int = 1,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    temperature: float = DEFAULT_TEMPERATURE,
    model: str = DEFAULT_MODEL,
    backend: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    progress: Progress | bool = False,
) -> dict[str, Any]:
    """Synthesise new volumes on the checkpoint's grid, with intensities of 0 to about 1.

    Args:
        output, overlay, report, samples, seed, steps, temperature, model, backend, dtype, device, progress: as for
            :func:`inpaint_file`.

    Raises:
        ValueError, OSError, BackendUnavailableError: as for :func:`inpaint_file`.
    """
    targets = check_outputs(((output, _suffixes(samples)), (overlay, (".png",)), (report, (".json",))), [])

    with without_collection():
        import torch

        from hf_binaryformer.pipelines.panels import volume_panels
        from hf_binaryformer.pipelines.volumes import write_image
        from hf_binaryformer.pipelines.vq_inpainting import as_one
        from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline

        pipeline = _load(BinaryVQPipeline, model)
    start = time.perf_counter()
    result = pipeline(
        batch_size=samples,
        num_inference_steps=steps,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=_set_up(pipeline, device, dtype, backend, progress),
    )
    images = result.images[:, 0]
    like = _centred(images[0], pipeline.spacing)
    content = {
        "notice": NOTICE,
        "generated": GENERATED,
        "shape": list(images.shape[1:]),
        "spacing_mm": list(pipeline.spacing),
        "samples": samples,
        "token_grid": list(result.tokens.shape[2:]),
        "steps": pipeline.num_timesteps,
        "attention_type": pipeline.transformer.config.attention_type,
        "device": str(pipeline.device),
        "seconds": time.perf_counter() - start,
        "versions": versions(),
        **_settings(pipeline, model, dtype, seed, steps, temperature),
    }
    with all_or_nothing(targets) as temporary:
        write_image(temporary[output], as_one(images), like, description=f"{GENERATED} {NOTICE}")
        if overlay is not None:
            shown = {f"sample {number}": image for number, image in enumerate(images[:MAX_COLUMNS], 1)}
            volume_panels(shown, like.spacing, title=Path(model).name).save(
                temporary[overlay], format="PNG", optimize=True
            )
        if report is not None:
            write_json(temporary[report], content)
    return content


def _suffixes(samples: int) -> tuple[str, ...]:
    """Suffixes of volume files that can hold this number of samples.

    Raises:
        ValueError: the number is below one.
    """
    from hf_binaryformer.pipelines.volumes import NIFTI_SUFFIXES, OUTPUT_SUFFIXES

    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    return OUTPUT_SUFFIXES if samples == 1 else NIFTI_SUFFIXES


def _load(kind: type[VQSamplingPipeline], model: str) -> Any:
    from diffusers.utils import logging

    # Progress bars for loading small files would disturb the main one.
    logging.disable_progress_bar()
    return kind.from_pretrained(model)


def _set_up(
    pipeline: VQSamplingPipeline, device: str | None, dtype: str, backend: str | None, progress: Progress | bool
) -> Any:
    """Set the pipeline's device, backend and number format; return the callback that shows progress."""
    import torch

    pipeline.to(usable_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_attention_backend(backend)
    pipeline.set_autocast(dtype)
    pipeline.set_progress_bar_config(disable=progress is not True, desc="sampling")

    def tell(owner: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if callable(progress):
            progress(step + 1, owner.num_timesteps)
        return tensors

    return tell


def _settings(
    pipeline: VQSamplingPipeline, model: str, dtype: str, seed: int, steps: int, temperature: float
) -> dict[str, Any]:
    from hf_binaryformer.modeling.attention import attention_backend
    from hf_binaryformer.pipelines.precision import number_format

    return {
        "model": Path(model).name,
        "backend": attention_backend(pipeline.transformer, pipeline.device.type),
        "dtype": str(number_format(dtype, pipeline.device)).removeprefix("torch."),
        "seed": seed,
        "steps_asked_for": steps,
        "temperature": temperature,
    }


def _centred(array: np.ndarray, spacing: tuple[float, float, float]) -> Volume:
    """An array in RAS order as a volume whose middle lies at the origin."""
    import numpy as np
    from nibabel.orientations import io_orientation

    from hf_binaryformer.pipelines.volumes import Volume, VolumeSource

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(array.shape) - 1) / 2 * spacing
    return Volume(array, affine, VolumeSource(None, "nifti", array.shape, affine, io_orientation(affine)))

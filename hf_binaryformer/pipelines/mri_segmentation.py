"""The task "mri-segmentation" of ``transformers.pipeline``: whole volumes, as ``binaryformer segment`` labels them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers.pipelines.base import Pipeline

if TYPE_CHECKING:
    from hf_binaryformer.pipelines.segmentation_report import VolumeSegmentationOutput

CALL_OPTIONS = ("return_probabilities", "progress", "generator", "views", "mirror", "keep_largest", "head_only")


class MRISegmentationPipeline(Pipeline):
    """Labels whole volumes: ``pipeline("mri-segmentation", model=...)`` after ``import hf_binaryformer``.

    It runs :class:`~hf_binaryformer.pipelines.segmentation.VolumeSegmentationPipeline`, whose labels it returns.

    Args:
        model, image_processor: as ``transformers.pipeline`` loads them.
        kwargs: those of transformers' pipelines, ``device`` for example, and the options of a call.

    Raises:
        ValueError: processor and model do not belong together.

    Example:
        >>> import hf_binaryformer
        >>> from transformers import pipeline
        >>> from hf_binaryformer.modeling.pretrained import resolve_checkpoint
        >>> segment = pipeline("mri-segmentation", model=str(resolve_checkpoint("binaryformer-tiny-brain")))
        >>> segment("head.nii.gz").save("head_labels.nii.gz")
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __call__(self, inputs: Any, **kwargs: Any) -> VolumeSegmentationOutput | list[VolumeSegmentationOutput]:  # type: ignore[override]
        """Segment one volume, or each of a list.

        Args:
            inputs: a file (NIfTI, .mha, DICOM folder), a :class:`~hf_binaryformer.pipelines.volumes.Volume`, or a list.
            kwargs: ``views``, ``mirror``, ``keep_largest``, ``head_only``, ``return_probabilities``, ``progress`` and
                ``generator`` of :class:`~hf_binaryformer.pipelines.segmentation.VolumeSegmentationPipeline`, and
                ``window_batch_size``, windows of a slice that go through the network at once (4).

        Returns:
            ``labels`` (I, J, K) int32 on the volume's own grid in RAS order, ``label_names``, ``report``, ``save(path)``;
            a list of them for a list.

        Raises:
            VolumeError: a file cannot be used.
            TypeError: there is no such option.
            ValueError: as for :meth:`~hf_binaryformer.pipelines.segmentation.VolumeSegmentationPipeline.settings`.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown := sorted(options.keys() - {*CALL_OPTIONS, "window_batch_size"}):
            raise TypeError(f"there is no option '{unknown[0]}', expected one of {', '.join(CALL_OPTIONS)}")
        return {}, options, {}

    def preprocess(self, inputs: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Read the volume."""
        from hf_binaryformer.pipelines.volumes import read_volume

        return {"volume": read_volume(inputs) if isinstance(inputs, (str, os.PathLike)) else inputs}

    def _forward(self, model_inputs: dict[str, Any], window_batch_size: int = 4, **options: Any) -> Any:  # type: ignore[override]
        from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline

        run = VolumeSegmentationPipeline(self.model, self.image_processor, batch_size=window_batch_size)
        return run(model_inputs["volume"], **options)

    def postprocess(self, model_outputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """What was found, as it is."""
        return model_outputs

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Save network and image processor into one folder, without this class's code."""
        self.model.save_pretrained(save_directory, **kwargs)
        assert self.image_processor is not None
        self.image_processor.save_pretrained(save_directory)

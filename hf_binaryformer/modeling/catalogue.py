"""The names that the project knows, with or without weights at hand: what each does, and how to come by it."""

from __future__ import annotations

from dataclasses import dataclass

SEGMENTATION = "accelerate launch -m hf_binaryformer.training.segmentation --recipe {}"
GENERATION = (
    "accelerate launch -m hf_binaryformer.training.autoencoder --recipe {}, then hf_binaryformer.training.encode_tokens "
    "and hf_binaryformer.training.sampler in the same way"
)


@dataclass(frozen=True)
class KnownModel:
    """One name.

    Args:
        does: what it labels or makes, and on which images.
        trained_on: what its training data is.
        parameters: their number, in words.
        command: that trains it.
        data: where that data can be had, and how it is prepared.
    """

    does: str
    trained_on: str
    parameters: str
    command: str
    data: str


def _segmentation(recipe: str, does: str, trained_on: str, parameters: str, data: str) -> KnownModel:
    return KnownModel(does, trained_on, parameters, SEGMENTATION.format(recipe), data)


SYNTHSEG = "label maps of the SynthSeg project, https://github.com/BBillot/SynthSeg; `binaryformer prepare {}`"
ABDOMEN = (
    "label maps of the BTCV challenge, from Synapse (syn3193805, after registration), RAS, with AMOS's numbers; "
    "`binaryformer prepare synth-abdomen`"
)
KNOWN_MODELS = {
    "binaryformer-brain": _segmentation(
        "brain",
        "32 brain structures, left and right apart, in MRI of any contrast",
        "synthetic images of 16 heads",
        "2.2 M",
        SYNTHSEG.format("synth-brain-sides"),
    ),
    "binaryformer-tiny-abdomen": _segmentation(
        "tiny-abdomen",
        "8 abdominal organs in axial MRI of any contrast, and CT",
        "synthetic images of 24 people",
        "2.4 M",
        ABDOMEN,
    ),
    "binaryformer-tiny-brain": _segmentation(
        "tiny-brain",
        "16 brain structures in T1-weighted MRI",
        "synthetic images of 16 heads",
        "2.2 M",
        SYNTHSEG.format("synth-brain"),
    ),
    "binaryformer-tiny-hippocampus": _segmentation(
        "hippocampus",
        "two parts of the hippocampus in crops of T1-weighted MRI",
        "177 real volumes of Decathlon Task04",
        "2.2 M",
        "Task04_Hippocampus, http://medicaldecathlon.com; `binaryformer prepare hippocampus`",
    ),
    "binaryformer-vit-s8-amos": _segmentation(
        "vit-s8-amos-synthetic",
        "8 abdominal organs in axial MRI of any contrast, and CT",
        "synthetic images of 24 people, not on AMOS",
        "27 M",
        ABDOMEN + ". On AMOS itself, https://zenodo.org/records/7155725: `binaryformer prepare amos`, `--recipe amos`",
    ),
    "binaryformer-vit-s8-crossmoda": _segmentation(
        "crossmoda",
        "vestibular schwannoma in contrast-enhanced T1 MRI",
        "CrossMoDA 2021",
        "27 M",
        "https://zenodo.org/records/4662239; `binaryformer prepare crossmoda`",
    ),
    "binaryformer-vit-s8-spine": _segmentation(
        "spine",
        "vertebrae, discs and canal in MRI of the lumbar spine",
        "SPIDER",
        "27 M",
        "https://zenodo.org/records/10159290; `binaryformer prepare spider`",
    ),
    "binaryvq-oasis": KnownModel(
        "fills holes in T1-weighted MRI of the brain, and makes new volumes",
        "OASIS-1, prepared for Learn2Reg",
        "27 M",
        GENERATION.format("oasis"),
        "https://learn2reg.grand-challenge.org/Datasets/, under the OASIS data use agreement; `binaryformer prepare oasis`",
    ),
    "binaryvq-tiny-brain": KnownModel(
        "fills holes in T1-weighted MRI of the brain, and makes new volumes",
        "synthetic images of 16 heads",
        "3.2 M",
        GENERATION.format("brain-small"),
        SYNTHSEG.format("synth-brain"),
    ),
}


def how_to_get(name: str) -> str:
    """A sentence or two for an error: what the model is, which command trains it, and where its data is."""
    known = KNOWN_MODELS.get(name)
    if known is None:
        return f"Known names: {', '.join(KNOWN_MODELS)}"
    return (
        f"{name}: {known.does} ({known.parameters} parameters, to be trained on {known.trained_on}). "
        f"Train it with: {known.command}. Data: {known.data}"
    )

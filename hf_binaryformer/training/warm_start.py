"""Weights of a checkpoint as the start of another network: with other labels, or another image size."""

from __future__ import annotations

import torch
import typer
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.modeling.pretrained import resolve_checkpoint
from hf_binaryformer.pipelines.structure_names import without_side

POSITIONS = "binaryformer.encoder.pos_embed"
HEAD = ("decoder.head.weight", "decoder.head.bias")


def load_weights(name: str, config: BinaryFormerConfig) -> BinaryFormerForSemanticSegmentation:
    """A network with all weights of a checkpoint that fit it; transformers reports those that do not.

    Positions of another image size are resampled. The head keeps what it knows of each label by its name: a label of one side
    ("left hippocampus") begins as that of both ("hippocampus"), if the checkpoint has no such side. Rows of labels that it
    does not know are new.

    Args:
        name: short name, folder or Hub id.
        config: of the network.

    Raises:
        CheckpointNotFoundError, CheckpointError: as for ``from_pretrained``.
        typer.BadParameter: no weight fits.
    """
    model, report = BinaryFormerForSemanticSegmentation.from_pretrained(
        name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
    )
    other_size = {key for key, *_ in report["mismatched_keys"]}
    state = model.state_dict()
    if {*report["missing_keys"], *other_size} >= state.keys():
        raise typer.BadParameter(f"from_pretrained={name}: no tensor fits this recipe's network")
    folder = resolve_checkpoint(name)
    source = BinaryFormerConfig.from_pretrained(folder)
    wanted = {*HEAD} if source.id2label != config.id2label else set()
    if source.class_token == config.class_token:
        wanted |= other_size & {POSITIONS}
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {key: file.get_tensor(key).float() for key in wanted & {*file.keys()}}
    if POSITIONS in stored:
        grids = [[side // c.patch_size for side in c.image_shape] for c in (config, source)]
        state[POSITIONS].copy_(
            resample_abs_pos_embed(stored[POSITIONS], *grids, num_prefix_tokens=int(source.class_token))
        )
    old_labels, labels = ({int(row): str(label) for row, label in (c.id2label or {}).items()} for c in (source, config))
    row_of = {label.lower(): row for row, label in old_labels.items()}
    for row, label in labels.items():
        old = row_of.get(label.lower(), row_of.get(without_side(label).lower()))
        for key in HEAD:
            if old is not None and key in stored and stored[key].shape[1:] == state[key].shape[1:]:
                state[key][row].copy_(stored[key][old])
    return model

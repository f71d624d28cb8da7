"""python -m hf_binaryformer.training.encode_tokens --recipe brain-small --vqmodel runs/vqae/vqmodel --data D --output T

In a clone: ``scripts/encode_tokens.py``. Turns the volumes of a folder into tokens for :mod:`.sampler`:
``<output>/<split>.safetensors`` for each split that has volumes, with one tensor ``tokens`` uint8 (n, num_codebooks, d,
h, w). The training split holds ``data.token_copies`` copies of each volume. The first copy is placed on the grid as in
inference; the others are mirrored, shifted and scaled in brightness at random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_binaryformer.data.patches import image_paths, load_scaled
from hf_binaryformer.data.prepared_folder import SPLITS
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.pipelines.vq_sampling import place_on_grid
from hf_binaryformer.pipelines.whole_files import all_or_nothing, write_text
from hf_binaryformer.training.options import Overrides
from hf_binaryformer.training.recipes import VQ_RECIPES, load_recipe


def placed_copy(volume: np.ndarray, data: dict[str, Any], rng: np.random.Generator | None) -> np.ndarray:
    """A scaled volume on the recipe's grid, float32; augmented if a random generator is given."""
    placed, _ = place_on_grid(volume.astype(np.float32), data["volume_shape"])
    if rng is None:
        return placed
    if data["mirror_axis"] is not None and rng.random() < 0.5:
        placed = np.flip(placed, data["mirror_axis"])
    shift = rng.integers(-data["token_max_shift"], data["token_max_shift"] + 1, 3)
    pad = data["token_max_shift"]
    window = tuple(slice(pad + s, pad + s + n) for s, n in zip(shift, placed.shape, strict=True))
    return np.pad(placed, pad)[window] * np.float32(1 + rng.uniform(-1, 1) * data["max_gain"])


@torch.no_grad()
def encode(model: BinaryVQModel, path: Path, recipe: dict[str, Any], copies: int, seed: list[int]) -> Tensor:
    """Tokens uint8 (copies, K, d, h, w) of one file."""
    data, vqmodel = recipe["data"], recipe["vqmodel"]
    volume, rng, tokens = load_scaled(path, vqmodel), np.random.default_rng(seed), []
    for copy in range(copies):
        placed = placed_copy(volume, data, rng if copy else None).clip(0, vqmodel["intensity_ceiling"])
        x = torch.from_numpy(np.ascontiguousarray(placed))[None, None].to(model.device)
        tokens.append(model.encode(x).tokens.to("cpu", torch.uint8))
    return torch.cat(tokens)


def main(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or the path of a .yaml file.")],
    vqmodel: Annotated[Path, typer.Option(help="Autoencoder: folder, short name or Hub id.")],
    data: Annotated[Path, typer.Option(help="Folder of `binaryformer prepare`, or of NIfTI files.")],
    output: Annotated[Path, typer.Option(help="Folder for the token files.")],
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    overrides: Overrides = None,
) -> None:
    """Encode every split."""
    settings = load_recipe(recipe, overrides or [], VQ_RECIPES, "vqae")
    model = BinaryVQModel.from_pretrained(vqmodel).eval().to(device)
    if model.config.codebook_size > 2**8:
        raise typer.BadParameter(f"codebook_size is {model.config.codebook_size}; uint8 holds tokens of at most 256")
    # Volumes are scaled as in the autoencoder's training, even if the recipe now says otherwise.
    settings["vqmodel"] = {key: model.config[key] for key in ("spacing", "percentiles", "intensity_ceiling")}
    seed, fraction = settings["vqae"]["seed"], settings["data"]["validation_fraction"]
    output.mkdir(parents=True, exist_ok=True)
    targets = {split: output / f"{split}.safetensors" for split in SPLITS}
    found = {split: image_paths(data, split, fraction, seed) for split in SPLITS}
    with all_or_nothing([targets[split] for split in SPLITS if found[split]]) as temporary:
        for split in filter(found.get, SPLITS):
            copies = settings["data"]["token_copies"] if split == "train" else 1
            shown = tqdm(found[split], desc=split)
            tokens = [encode(model, path, settings, copies, [seed, number]) for number, path in enumerate(shown)]
            save_file({"tokens": torch.cat(tokens)}, temporary[targets[split]])
        # All files are replaced together at the end, so that splits of different autoencoders are never mixed.
        for target in targets.values():
            target.unlink(missing_ok=True)
    if (data / "manifest.json").is_file():
        # The cards of networks trained on these tokens have to name this source.
        stated = json.loads((data / "manifest.json").read_text())
        source = {key: stated[key] for key in ("name", "source", "licence") if key in stated}
        write_text(output / "manifest.json", json.dumps(source, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

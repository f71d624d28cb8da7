"""Files that leave a marker when code in them is run, and the names under which a loader might look for them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

# Weights and state, as transformers, diffusers, Accelerate, PEFT, timm, torch, numpy and people name them.
TRANSFORMERS = ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "tf_model.h5", "flax_model.msgpack")
TRANSFORMERS = (*TRANSFORMERS, "model.ckpt.index", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
DIFFUSERS = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model-00001-of-00001.bin", "diffusion_pytorch_model.pt")
DIFFUSERS = (*DIFFUSERS, "diffusion_pytorch_model.ckpt", "diffusion_flax_model.msgpack", "pytorch_lora_weights.bin")
ACCELERATE = ("optimizer.bin", "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "random_states_0.pkl")
ACCELERATE = (
    *ACCELERATE,
    "custom_checkpoint_0.pkl",
    "pytorch_model_fsdp.bin",
    ".metadata",
    "mp_rank_00_model_states.pt",
)
OTHERS = (
    "adapter_model.bin",
    "open_clip_pytorch_model.bin",
    "learned_embeds.bin",
    "model.pt",
    "model.pth",
    "model.bin",
)
OTHERS = (*OTHERS, "model.ckpt", "model.pkl", "model.joblib", "weights.pt", "best.pt", "last.ckpt", "checkpoint.pth")
OTHERS = (*OTHERS, "config.pkl", "processor.pkl", "data.pkl", "tokens.pt", "tokens.npy", "weights.npz", "arrays.npy")
# Code of a checkpoint, as `trust_remote_code` and the modules named in a pipeline's index would find it. diffusers looks
# for a file "None.py" where no pipeline of one's own was asked for.
CODE = ("None.py", "__init__.py", "pipeline.py", "modeling.py", "modeling_binaryformer.py", "image_processing.py")
CODE = (*CODE, "configuration_binaryformer.py", "hf_binaryformer.modeling.vq_autoencoder.py", "planted.py", "setup.py")
CODE = (*CODE, "hf_binaryformer.modeling.vq_transformer.py", "hf_binaryformer.pipelines.absorbing_scheduler.py")
DATA = (*TRANSFORMERS, *DIFFUSERS, *ACCELERATE, *OTHERS)
PLANTED = (*DATA, *CODE)
INDICES = {"pytorch_model.bin.index.json": "pytorch_model-00001-of-00001.bin"}
INDICES |= {"diffusion_pytorch_model.bin.index.json": "diffusion_pytorch_model-00001-of-00001.bin"}


class Charge:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Markers:
    """A folder for the files that planted code leaves, and what writes that code."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def plant(self, path: Path) -> Path:
        """A file that leaves a marker of its own name when it is unpickled, imported or loaded by numpy."""
        marker = self.folder / f"{path.parent.name} {path.name}"
        if path.suffix == ".py":
            path.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass X: pass\n")
        elif path.suffix in (".npy", ".npz"):
            with path.open("wb") as file:
                (np.save if path.suffix == ".npy" else np.savez)(file, np.array([Charge(marker)], dtype=object))
        else:
            # torch.load takes a bare pickle too, as the oldest of its formats.
            path.write_bytes(pickle.dumps(Charge(marker), protocol=2))
        return path

    def plant_all(self, folder: Path, names: tuple[str, ...]) -> None:
        """Plant under all names in a folder and its subfolders, and write indices of weights that name some of them."""
        for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            for name in names:
                self.plant(place / name)
            for index, file in INDICES.items():
                (place / index).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))

    @property
    def left(self) -> list[str]:
        """What was run."""
        return sorted(path.name for path in self.folder.iterdir())


# Headers of volumes of 5 x 6 x 7 bytes, with a place for the name of the file that holds them.
META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 1\nDimSize = 5 6 7\nElementType = MET_UCHAR\nElementDataFile = {}\n"
)
NRRD = (
    "NRRD0004\ntype: unsigned char\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 6 7\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nencoding: raw\nspace origin: (0,0,0)\n"
    "data file: {}\n\n"
)

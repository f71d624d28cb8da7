"""`scripts/evaluate.py inpainting`: how well a pipeline fills holes.

Fills a hole in known volumes with several random seeds. The result is compared
with simpler fills: the paper's random tokens, zero, the mean, the mirrored other side, and an atlas. It is also
compared with the true tokens, which no transformer can beat. The scores are PSNR, SSIM and MAE, in the hole and in the
whole object, against the volume itself and against its reconstruction by the autoencoder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

from hf_binaryformer.commands.outputs import check_outputs, write_json
from hf_binaryformer.data.patches import image_paths
from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.grids import foreground_box, resample, same_spacing
from hf_binaryformer.pipelines.inpainting_scores import SIMPLE_FILLS, make_hole, score_fill, token_fills
from hf_binaryformer.pipelines.metrics import sample_deviation
from hf_binaryformer.pipelines.provenance import NOTICE, versions
from hf_binaryformer.pipelines.volumes import Volume, check_same_grid, read_volume, volume_from_image
from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
from hf_binaryformer.pipelines.vq_sampling import place_on_grid
from hf_binaryformer.pipelines.whole_files import all_or_nothing
from hf_binaryformer.training.cards import INPAINTING_METRICS, inpainting_table

REFERENCES = ("original", "reconstruction")
# Scores of each fill, one for each volume and seed.
Rows = dict[str, list[dict[str, float]]]


def inpainting(
    data: Annotated[str, typer.Option(help="'mni152' (needs nilearn), a volume, or a folder of volumes.")] = "mni152",
    model: Annotated[str, typer.Option(help="Short name, folder or Hub id.")] = "binaryvq-tiny-brain",
    split: Annotated[str, typer.Option(help="Of a folder with a manifest.")] = "test",
    mask: Annotated[Path | None, typer.Option(help="The hole, on the volumes' grid; else it is made.")] = None,
    hole_size: Annotated[float, typer.Option(min=1, help="Diameter or edge in mm.")] = 45.0,
    hole_kind: Annotated[str, typer.Option(help="ball or box, in the middle of the foreground.")] = "ball",
    seeds: Annotated[int, typer.Option(min=1, help="Runs for each volume.")] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0)] = 0.8,
    feather: Annotated[int, typer.Option(min=0)] = 0,
    selection: Annotated[str | None, typer.Option(help="Order of the tokens; else the checkpoint's.")] = None,
    atlas: Annotated[Path | None, typer.Option(help="Folder whose training volumes are averaged for a fill.")] = None,
    report: Annotated[Path | None, typer.Option(help="All figures to write: .json.")] = None,
    table: Annotated[Path | None, typer.Option(help="The tables to write: .md.")] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Fill holes and score them."""
    targets = check_outputs([(report, (".json",)), (table, (".md",))], [])
    pipeline = BinaryVQInpaintPipeline.from_pretrained(model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    mean_volume = atlas_volume(pipeline, atlas) if atlas else None
    rows: dict[str, Rows] = {reference: {} for reference in REFERENCES}
    cases, seconds = [], []
    for name, volume in volumes(data, split):
        hole = hole_of(volume, mask, hole_size, hole_kind)
        start = time.perf_counter()
        samples = fill(pipeline, volume, hole, seeds, steps, temperature, feather, selection)
        seconds.append((time.perf_counter() - start) / seeds)
        scores = score_case(pipeline, volume, hole, samples, mean_volume)
        for reference, found in scores.items():
            for row, per_seed in found.items():
                rows[reference].setdefault(row, []).extend(per_seed)
        cases.append({"case": name, "hole_voxels": int(hole.sum()), "scores": scores})
    summary = {
        reference: {row: summarise(scores) for row, scores in found.items()} for reference, found in rows.items()
    }
    settings = {
        "data": data,
        "split": split,
        "hole": str(mask) if mask else f"{hole_kind} of {hole_size:g} mm",
        "seeds": seeds,
        "steps": steps,
        "temperature": temperature,
        "feather": feather,
        "selection": selection or pipeline.scheduler.config.selection,
    }
    content = {
        "notice": NOTICE,
        "model": Path(model).name,
        "attention_type": pipeline.transformer.config.attention_type,
        **settings,
        "volumes": len(cases),
        "seconds_per_sample": float(np.mean(seconds)),
        "against": summary,
        "cases": cases,
        "versions": versions(),
    }
    write(content, report, table, targets)


def write(content: dict[str, Any], report: Path | None, table: Path | None, targets: list[Path]) -> None:
    """Print the tables, and write the requested files."""
    summary = content["against"]
    text = "\n\n".join(f"Against the {reference}:\n\n{inpainting_table(found)}" for reference, found in summary.items())
    with all_or_nothing(targets) as temporary:
        if report:
            write_json(temporary[report], content)
        if table:
            temporary[table].write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


def volumes(data: str, split: str) -> Iterator[tuple[str, Volume]]:
    """Names and volumes: the MNI152 template, one file, or a split of a folder."""
    if data == "mni152":
        from nilearn import datasets

        yield data, volume_from_image(datasets.load_mni152_template(resolution=1))
        return
    path = Path(data)
    paths = image_paths(path, split, validation_fraction=1.0, seed=0) if path.is_dir() else [path]
    if not paths:
        raise typer.BadParameter(f"'{data}' has no volumes in the split '{split}': give another --split")
    for one in tqdm(paths, desc="volumes"):
        yield one.name, read_volume(one)


def hole_of(volume: Volume, mask: Path | None, size: float, kind: str) -> np.ndarray:
    """The given mask, or a hole in the middle of the foreground."""
    if mask is not None:
        given = read_volume(mask, labels=True)
        check_same_grid(volume, given)
        for note in given.notes:
            typer.echo(f"note: {note}", err=True)
        return given.array != 0
    scaled = volume.array / max(float(np.percentile(volume.array, 99.5)), 1e-12)
    centre = [(part.start + part.stop - 1) / 2 for part in foreground_box(scaled, volume.spacing)]
    return make_hole(volume.array.shape, volume.spacing, size, centre=centre, kind=kind)


def fill(
    pipeline: Any,
    volume: Volume,
    hole: np.ndarray,
    seeds: int,
    steps: int,
    temperature: float,
    feather: int,
    selection: str | None,
) -> np.ndarray:
    """The pipeline's results (seeds, I, J, K); each seed has its own generator."""
    results = [
        pipeline(
            volume,
            hole,
            num_inference_steps=steps,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            feather=feather,
            selection=selection,
        ).images[0, 0]
        for seed in range(seeds)
    ]
    return np.stack(results)


def score_case(
    pipeline: Any, volume: Volume, hole: np.ndarray, samples: np.ndarray, atlas: np.ndarray | None
) -> dict[str, Rows]:
    """Scores of all fills of one volume against each reference, a list over seeds for each row."""
    config, image = pipeline.vqmodel.config, volume.array
    scale = IntensityScale.of(image, config.percentiles, config.intensity_ceiling)
    case = pipeline.prepare(image, hole, volume.affine)
    by_seed = [token_fills(pipeline, case, torch.Generator().manual_seed(seed)) for seed in range(len(samples))]
    oracle = by_seed[0]["oracle tokens"]
    fills = {
        "model": list(samples),
        "model, mean of the seeds": [samples.mean(0, dtype=np.float32)],
        "random tokens": [found["random tokens"] for found in by_seed],
        **{f"{name} fill": [simple(image, hole, scale)] for name, simple in SIMPLE_FILLS.items()},
    }
    # The mean of equal numbers may differ from them in the last bit.
    fills["model, mean of the seeds"][0][~hole] = image[~hole]
    if atlas is not None:
        fills["atlas fill"] = [case.composite(case.to_input(atlas))]
    fills["oracle tokens"] = [oracle]
    references = dict(zip(REFERENCES, (image, oracle), strict=True))
    return {
        name: {
            row: [score_fill(one, reference, hole, scale).as_dict() for one in found]
            for row, found in fills.items()
            if (name, row) != ("reconstruction", "oracle tokens")
        }
        for name, reference in references.items()
    }


def atlas_volume(pipeline: Any, folder: Path) -> np.ndarray:
    """Mean of the training volumes of a folder on the model's grid, scaled."""
    config, total, count = pipeline.vqmodel.config, np.zeros(pipeline.volume_shape, dtype=np.float64), 0
    for path in tqdm(image_paths(folder, "train", validation_fraction=0.0, seed=0), desc="atlas"):
        volume = read_volume(path)
        array = volume.array
        if not same_spacing(volume.spacing, pipeline.spacing):
            array, _ = resample(array, volume.affine, pipeline.spacing, order=1)
        scaled = IntensityScale.of(array, config.percentiles, config.intensity_ceiling).apply(array)
        total += place_on_grid(scaled, pipeline.volume_shape)[0]
        count += 1
    return (total / max(count, 1)).astype(np.float32)


def summarise(scores: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation (None of a single number) of each metric over volumes and seeds."""
    values = {metric: [score[metric] for score in scores] for metric in INPAINTING_METRICS}
    return {
        metric: {
            "mean": float(np.mean(numbers)),
            "sd": sample_deviation(numbers) if len(numbers) > 1 else None,
            "n": len(numbers),
        }
        for metric, numbers in values.items()
    }

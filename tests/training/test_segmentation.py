"""The training script on volumes of a few voxels: recipes, resume, two processes, evaluation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import toys
import typer
import yaml
from launching import command_line, interrupt_in_training, kill_in_training, run_on_two_processes
from safetensors.torch import load_file

import hf_binaryformer as bf
from hf_binaryformer.data.label_schemes import common_scheme
from hf_binaryformer.data.prepared_folder import Case, PreparedFolder, read_labels
from hf_binaryformer.data.slices import SliceSamples
from hf_binaryformer.modeling.at_rest import ChangedError
from hf_binaryformer.training import segmentation, segmentation_scores
from hf_binaryformer.training.optimization import build_optimizer, rate_factor
from hf_binaryformer.training.recipes import RECIPES as RECIPE_FOLDER
from hf_binaryformer.training.recipes import load_recipe
from hf_binaryformer.training.run_log import read_log
from hf_binaryformer.training.segmentation_scores import PriorAtlas, evaluate_split, figures_of, resize_nearest, scores

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(RECIPE_FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return toys.write_segmentation_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return toys.write_segmentation_recipe(tmp_path_factory.mktemp("recipe") / "toy.yaml")


def run(recipe: Path, prepared: Path, output: Path, **options) -> dict[str, torch.Tensor]:
    overrides = options.pop("overrides", [])
    options = {"resume": False, "evaluate": "none", "stop_after": None, **options}
    segmentation.main(str(recipe), prepared, output, overrides=overrides, **options)
    return load_file(output / "model" / "model.safetensors")


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_log(output / "log.jsonl")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_builds_and_trains_a_step(path):
    settings = load_recipe(path.stem, [])
    settings["model"]["timm_checkpoint"] = False  # no download
    settings["processor"]["image_size"] = [64, 64]  # the true size is that of the dry runs
    settings["model"]["grow_from"] = None  # has the true size
    model, processor = segmentation.build_model(settings, {0: "background", 1: "a"})
    x = torch.randn(1, processor.num_channels, *processor.image_size)
    loss = model(x, labels=torch.zeros(1, *processor.image_size, dtype=torch.long)).loss
    loss.backward()
    optimizer = build_optimizer(model, settings["train"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert 0 < settings["train"]["theta_lr_scale"] <= 1
    assert rate_factor(0, settings["train"]) == settings["train"]["warmup_start"]
    assert rate_factor(settings["train"]["warmup"], settings["train"]) == 1


def test_weight_networks_and_scales_learn_at_their_own_rates():
    settings = load_recipe("hippocampus", [])
    settings["model"] |= {"attention_type": "hamming", "bit_gradient": None}
    model, _ = segmentation.build_model(settings, {0: "background", 1: "a"})
    rates = {id(p): g["lr"] for g in build_optimizer(model, settings["train"]).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        factor = settings["train"]["theta_lr_scale"] if "theta" in name else 10.0 if "log_scale" in name else 1.0
        assert rates[id(parameter)] == pytest.approx(settings["train"]["learning_rate"] * factor), name


def test_paper_schedule():
    train = {"warmup": 300, "warmup_start": 0.01, "schedule": "step", "decay_factor": 0.98, "decay_every": 12}
    assert rate_factor(150, train) == pytest.approx(0.505)
    assert [rate_factor(s, train) for s in (300, 311, 312, 324)] == pytest.approx([1, 1, 0.98, 0.98**2])


def test_resumed_equals_uninterrupted(recipe, prepared, tmp_path):
    whole = run(recipe, prepared, tmp_path / "whole")
    run(recipe, prepared, tmp_path / "cut", stop_after=3)
    resumed = run(recipe, prepared, tmp_path / "cut", resume=True)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(recipe, prepared, tmp_path):
    overrides = ["train.iterations=12", "train.mixed_precision=bf16", "train.workers=1"]
    whole = run(recipe, prepared, tmp_path / "whole", overrides=overrides)
    arguments = command_line(overrides, recipe=recipe, data=prepared, evaluate="none")
    resume = kill_in_training("finetune.py", arguments, tmp_path / "cut", 12)
    resumed = run(recipe, prepared, tmp_path / "cut", overrides=overrides, resume=resume)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_training_starts_from_a_checkpoint(recipe, prepared, tmp_path):
    first = run(recipe, prepared, tmp_path / "first", overrides=["model.learned_logit_scale=false"])
    overrides = [
        f"model.from_pretrained={tmp_path / 'first' / 'model'}",
        "train.learning_rate=1e-9",
        "train.weight_decay=0",
        "augment.mirror=0.5",
    ]
    second = run(recipe, prepared, tmp_path / "second", overrides=overrides)
    new = {key for key in second if key not in first}
    assert new and all("log_scale" in key and second[key].abs().max() < 1e-6 for key in new)
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=1e-6, msg=key)
    # Who saw mirror images may be asked to average with them.
    assert '"mirror": false' in (tmp_path / "second" / "model" / "preprocessor_config.json").read_text()


def test_the_best_of_the_validations_is_saved(recipe, prepared, tmp_path):
    overrides = ["train.validate_every=2", "train.best_by=validation_dice", "train.learning_rate=0.003"]
    run(recipe, prepared, tmp_path, overrides=overrides)
    records = read_log(tmp_path / "log.jsonl")
    dice = [record["validation_dice"] for record in records if "validation_dice" in record]
    assert len(dice) == 3 and sum({"validation_nsd", "validation_hd95"} <= {*record} for record in records) == 3
    results = evaluate_split(tmp_path / "model", PreparedFolder(prepared), "validation", baseline=False)
    assert np.nanmean(list(results["cases"].values())) == pytest.approx(max(dice), abs=1e-3)
    half = evaluate_split(tmp_path / "model", PreparedFolder(prepared), "validation", baseline=False, dtype="bfloat16")
    assert (results["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert np.nanmean(list(half["cases"].values())) == pytest.approx(max(dice), abs=0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["terminal", "scheduler"])
def test_interrupted_while_workers_load_it_is_saved(recipe, prepared, tmp_path, number):
    overrides = ["train.iterations=2000", "train.workers=1", "train.checkpoint_every=2000", "train.validate_every=null"]
    arguments = command_line(overrides, recipe=recipe, data=prepared, evaluate="none")
    status, said = interrupt_in_training("finetune.py", arguments, tmp_path, 3, number=number)
    assert status == 130 and "which is saved: go on with --resume" in said, said
    step = int(next((tmp_path / "checkpoints").glob("step_????????")).name[5:])
    assert 3 <= step < 2000
    run(recipe, prepared, tmp_path, overrides=overrides, resume=True, stop_after=step + 2)
    assert len(losses(tmp_path)) == step + 2


@pytest.mark.slow
def test_two_processes_interrupted_and_resumed_equal_uninterrupted(recipe, prepared, tmp_path):
    arguments = command_line(["train.iterations=40"], recipe=recipe, data=prepared, evaluate="none")
    run_on_two_processes("finetune.py", arguments, tmp_path / "whole")
    status, said = interrupt_in_training("finetune.py", arguments, tmp_path / "cut", 3, processes=2)
    assert status != 0 and said.count("which is saved: go on with --resume") == 1, said
    assert 3 <= len(losses(tmp_path / "cut")) < 40
    run_on_two_processes("finetune.py", [*arguments, "--resume"], tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


def test_what_cannot_be_evaluated_is_said_before_the_training(recipe, prepared, tmp_path):
    for split, message in (
        ("tets", "--evaluate tets: .* has no volume in that split"),
        ("test", "--evaluate test: .* has no volume in that split"),
        ("train", "has no volume in the split 'train'"),
    ):
        folder = tmp_path / split
        folder.mkdir()
        manifest = json.loads((prepared / "manifest.json").read_text())
        manifest["cases"] = [case for case in manifest["cases"] if case["split"] != split]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(typer.BadParameter, match=message):
            run(recipe, folder, tmp_path / "run", evaluate=split)
    assert not (tmp_path / "run").exists()


def test_two_processes_see_one_process_batches_and_stay_in_sync(recipe, prepared, tmp_path):
    # A form that draws nothing; Dice is that of the whole batch.
    overrides = ["model.attention_type=hamming", "model.bit_gradient=null", "model.learned_logit_scale=false"]
    one = run(recipe, prepared, tmp_path / "one", overrides=overrides)
    arguments = command_line(overrides, recipe=recipe, data=prepared, evaluate="none")
    run_on_two_processes("finetune.py", arguments, tmp_path / "two")
    assert read_log(tmp_path / "two" / "log.jsonl")[0]["processes"] == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    two = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-2, atol=2e-4, msg=key)


def test_it_learns_and_is_evaluated_beside_the_prior_atlas(recipe, prepared, tmp_path):
    overrides = ["train.iterations=60", "train.learning_rate=0.003", "train.checkpoint_every=60"]
    run(recipe, prepared, tmp_path, evaluate="test", overrides=overrides)
    assert np.mean(losses(tmp_path)[-5:]) < 0.6 * losses(tmp_path)[0]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["volumes"] == 1 and set(results["rows"]) == {"network", "prior atlas"}
    assert results["rows"]["network"]["labels"]["shell"]["mean"] > 0.5
    again = evaluate_split(tmp_path / "model", PreparedFolder(prepared), "test", baseline=False)
    assert again["cases"] == results["cases"]


def test_labels_with_numbers_of_their_own_train_and_are_scored_as_those(recipe, tmp_path):
    """Labels 17 and 53 in the files in place of 1 and 2 change numbers alone."""
    outcomes = {}
    for name, values in (("plain", [0, 1, 2]), ("numbered", [0, 17, 53])):
        (tmp_path / name).mkdir()
        data = toys.write_segmentation_data(tmp_path / name)
        manifest = json.loads((data / "manifest.json").read_text())
        for case in manifest["cases"]:
            label = nib.load(data / case["label"])
            array = np.array(values, np.uint8)[np.asarray(label.dataobj).astype(int)]
            nib.save(nib.Nifti1Image(array, label.affine), data / case["label"])
        names = manifest["label_names"].values()
        manifest["label_names"] = {str(value): text for value, text in zip(values, names, strict=True)}
        (data / "manifest.json").write_text(json.dumps(manifest))
        out = tmp_path / f"{name}-run"
        run(recipe, data, out, evaluate="test")
        results = json.loads((out / "results.json").read_text())
        config = json.loads((out / "model" / "config.json").read_text())
        outcomes[name] = losses(out), results["rows"], config.get("label_values")
    assert outcomes["plain"][:2] == outcomes["numbered"][:2]
    assert outcomes["plain"][2] is None and outcomes["numbered"][2] == [0, 17, 53]


def test_figures_of_a_volume_that_is_two_millimetres_off(tmp_path):
    truth = np.zeros((20, 20, 20), np.uint8)
    truth[5:12, 5:12, 5:12] = 1
    nib.save(nib.Nifti1Image(truth, np.diag([2.0, 1, 1, 1])), tmp_path / "label.nii.gz")
    case = Case("one", "one", "test", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")
    scheme = common_scheme({0: "background", 1: "cube", 2: "nothing"}, None, None)
    found = figures_of([scores(guess, read_labels(case), scheme) for guess in (truth, np.roll(truth, 1, axis=0))])
    cube, nothing = found["labels"]["cube"], found["labels"]["nothing"]
    assert cube["mean"] == pytest.approx((1 + 6 / 7) / 2, abs=1e-4) and cube["hd95"] == (0 + 2) / 2
    # Of two values, the sample standard deviation is their difference over the root of 2.
    assert cube["sd"] == pytest.approx((1 - 6 / 7) / 2**0.5, abs=1e-4)
    assert 0.5 < cube["nsd"] < 1 and cube["nan"] == 0
    assert nothing == {"mean": None, "sd": None, "nsd": None, "hd95": None, "nan": 2}
    assert {key: found[key] for key in ("mean", "nsd", "hd95")} == {k: cube[k] for k in ("mean", "nsd", "hd95")}
    single = figures_of([scores(truth, read_labels(case), scheme)])
    assert single["labels"]["cube"] | {"nsd": 0} == {"mean": 1.0, "sd": None, "nsd": 0, "hd95": 0.0, "nan": 0}


@pytest.mark.parametrize("moment", ["training", "validation", "evaluation"])
def test_data_that_changes_during_the_run_gives_no_figures(recipe, tmp_path, monkeypatch, moment):
    """They would be of two data sets: of one that was trained on, and of another."""
    (tmp_path / "data").mkdir()
    data = toys.write_segmentation_data(tmp_path / "data")
    name = {"training": "SliceSamples", "validation": "validation_figures", "evaluation": "evaluate_split"}[moment]
    whole = getattr(segmentation, name)

    def change_then(*arguments, **options):
        path = data / "labels" / "c5.nii.gz"
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))
        return whole(*arguments, **options)

    monkeypatch.setattr(segmentation, name, change_then)
    with pytest.raises(ChangedError, match=r"c5.nii.gz changed while it was read, expected a file at rest"):
        run(recipe, data, tmp_path / "out", evaluate="test", overrides=["train.validate_every=3"])
    assert not (tmp_path / "out" / "results.json").exists()
    assert (tmp_path / "out" / "model").exists() == (moment == "evaluation")
    assert (tmp_path / "out" / "log.jsonl").exists() == (moment != "training")


def test_prior_atlas_is_the_majority_vote(prepared):
    folder = PreparedFolder(prepared)
    truth = [np.asarray(nib.load(c.label).dataobj) for c in folder.split("train")]
    votes = np.stack([sum((t == label).astype(int) for t in truth) for label in range(3)])
    np.testing.assert_array_equal(PriorAtlas(folder.split("train"), [1, 2]).predict(truth[0].shape), votes.argmax(0))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_atlas_knows_the_training_masks_alone(split, tmp_path, monkeypatch):
    """Label 1 is on one side in training and on the other in the split that is scored."""
    cases = []
    for name, of, side in (("a", "train", 0), ("b", "train", 0), ("c", "validation", 1), ("d", "test", 1)):
        label = np.zeros((6, 6, 6), np.uint8)
        label[3 * side : 3 * side + 3] = 1
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"{name}.nii.gz")
        cases.append({"case": name, "group": name, "split": of, "image": f"{name}.nii.gz", "label": f"{name}.nii.gz"})
    names = {"0": "background", "1": "side"}
    (tmp_path / "manifest.json").write_text(json.dumps({"label_names": names, "cases": cases}))
    config = SimpleNamespace(attention_type="sign", resolved_bit_gradient="none")
    network = SimpleNamespace(model=SimpleNamespace(config=config), dtype=torch.float32, settings=dict)
    monkeypatch.setattr(bf.VolumeSegmentationPipeline, "from_pretrained", lambda folder, dtype: network)
    monkeypatch.setattr(segmentation_scores, "labels_of", lambda pipeline, case, **_: read_labels(case).array)
    found = evaluate_split(tmp_path, PreparedFolder(tmp_path), split, baseline=True)
    assert found["rows"]["network"]["mean"] == 1.0 and found["rows"]["prior atlas"]["mean"] == 0.0
    assert found["volumes"] == 1 and list(found["cases"]) == ["c" if split == "validation" else "d"]


def test_sets_are_scored_apart_and_sides_together(tmp_path, monkeypatch):
    """The network takes left for right in the volumes of one set, and sees nothing in those of the other."""
    cases = []
    for number, of in enumerate(("crossed", "blind", "crossed", None)):
        label = np.zeros((6, 6, 6), np.uint8)
        label[:2], label[4:] = 17, 53
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"{number}.nii.gz")
        files = {"image": f"{number}.nii.gz", "label": f"{number}.nii.gz"}
        cases.append({"case": str(number), "group": str(number), "split": "test", "set": of} | files)
    names = {"0": "background", "17": "left hippocampus", "53": "right hippocampus"}
    (tmp_path / "manifest.json").write_text(json.dumps({"label_names": names, "cases": cases}))

    def network(path, mirror, keep_largest):
        assert mirror is None and keep_largest is None  # as the checkpoint says
        truth = np.asarray(nib.load(path).dataobj)
        crossed = {"0": truth[::-1], "1": truth * 0, "2": truth[::-1], "3": truth}[path.name.split(".")[0]]
        return SimpleNamespace(labels=crossed)

    network.model = SimpleNamespace(config=SimpleNamespace(attention_type="sign", resolved_bit_gradient="none"))
    network.dtype, network.settings = torch.float32, dict
    monkeypatch.setattr(bf.VolumeSegmentationPipeline, "from_pretrained", lambda folder, dtype: network)
    apart = evaluate_split(tmp_path, PreparedFolder(tmp_path), "test", baseline=False)
    together = apart["merged"]
    assert {name: (of["volumes"], of["mean"]) for name, of in apart["sets"].items()} == {
        "crossed": (2, 0),
        "blind": (1, 0),
    }
    assert {name: of["mean"] for name, of in together["sets"].items()} == {"crossed": 1, "blind": 0}
    assert list(together["rows"]["network"]["labels"]) == ["hippocampus"]
    assert (apart["rows"]["network"]["mean"], together["rows"]["network"]["mean"]) == (0.25, 0.75)
    assert (apart["cases"]["0"], together["cases"]["0"]) == ([0, 0], [1])


def test_all_pieces_and_the_largest_are_scored(tmp_path, monkeypatch):
    """The network finds a structure and a speck elsewhere, whatever the checkpoint's own setting is."""
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[:2, :2, :2] = 17
    nib.save(nib.Nifti1Image(truth, np.eye(4)), tmp_path / "a.nii.gz")
    case = {"case": "a", "group": "a", "split": "validation", "image": "a.nii.gz", "label": "a.nii.gz"}
    names = {0: "background", 17: "left hippocampus"}
    (tmp_path / "manifest.json").write_text(json.dumps({"label_names": names, "cases": [case]}))

    def network(path, mirror, keep_largest):
        found = truth.astype(np.int32)
        found[7, 7, 4:8] = 0 if keep_largest in (None, True) else 17
        found[:2, :2, 0] = 0 if mirror else 17
        return SimpleNamespace(labels=found)

    network.model = SimpleNamespace(config=SimpleNamespace(attention_type="sign", resolved_bit_gradient="none"))
    network.dtype, network.label_names, network.settings = torch.float32, names, dict
    monkeypatch.setattr(bf.VolumeSegmentationPipeline, "from_pretrained", lambda folder, dtype: network)
    folder = PreparedFolder(tmp_path)
    rows = evaluate_split(tmp_path, folder, "validation", baseline=False, compare_pieces=True)["rows"]
    assert {name: row["mean"] for name, row in rows.items()} == {"network": 0.8, "largest pieces": 1}
    plain, mirrored = (evaluate_split(tmp_path, folder, "validation", baseline=False, mirror=m) for m in (None, True))
    assert (plain["rows"]["network"]["mean"], plain["mirror"]) == (1, None)
    assert (mirrored["rows"]["network"]["mean"], mirrored["mirror"]) == (pytest.approx(2 / 3, abs=1e-4), True)


@pytest.mark.parametrize(("size", "wanted"), [(12, 4), (9, 6), (7, 16), (10, 10), (33, 11), (5, 13)])
def test_the_atlas_is_resized_about_the_centres_of_voxels(size, wanted):
    found = resize_nearest(np.broadcast_to(np.arange(size)[:, None, None], (size, 3, 3)), np.array([wanted, 3, 3]))
    centre = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    assert found.shape == (wanted, 3, 3) and np.abs(found - centre[:, None, None]).max() <= 0.5 + 1e-9


def test_samples_depend_on_their_number_alone(recipe, prepared):
    settings = yaml.safe_load(recipe.read_text())
    processor = bf.BinaryFormerImageProcessor(**settings["processor"])
    cases = PreparedFolder(prepared).split("train")
    first, again = (SliceSamples(cases, processor, settings["augment"], 5, 100) for _ in range(2))
    expected = [first[n] for n in (3, 7)]
    again[50]
    for sample, number in zip(expected, (3, 7), strict=True):
        assert all(torch.equal(again[number][key], tensor) for key, tensor in sample.items())
    assert not torch.equal(first[3]["pixel_values"], first[7]["pixel_values"])
    assert expected[0]["pixel_values"].shape == (processor.num_channels, 24, 24)
    assert set(torch.cat([first[n]["labels"].flatten() for n in range(8)]).tolist()) == {0, 1, 2}


def test_image_and_labels_move_together(recipe, prepared):
    settings = yaml.safe_load(recipe.read_text())
    settings["augment"]["intensity_probability"] = 0.0
    processor = bf.BinaryFormerImageProcessor(**settings["processor"])
    samples = SliceSamples(PreparedFolder(prepared).split("train"), processor, settings["augment"], 0, 100)
    for number in range(10):
        sample = samples[number]
        middle = sample["pixel_values"][processor.num_slices // 2]
        if (sample["labels"] == 2).sum() > 20:
            assert middle[sample["labels"] == 2].mean() > 1.3 * middle[sample["labels"] == 1].mean()


def test_a_group_on_both_sides_of_a_split_is_refused(prepared, tmp_path):
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["cases"][-1]["group"] = "g0"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="groups g0 of split 'test' stand in other splits too"):
        PreparedFolder(tmp_path).split("test")


def test_wrong_options_say_what_is_known(tmp_path):
    with pytest.raises(typer.BadParameter, match="known are .*hippocampus"):
        load_recipe("nothing", [])
    with pytest.raises(typer.BadParameter, match=r"expected section\.key=value"):
        load_recipe("hippocampus", ["iterations=3"])
    with pytest.raises(FileNotFoundError, match="binaryformer prepare"):
        PreparedFolder(tmp_path)

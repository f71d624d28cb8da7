"""Recipes: settings that there are, the form of attention by --set, and runs that go on as they began."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import toys
import typer
import yaml

from hf_binaryformer.data.public_data import DATA_SETS
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.training.recipes import PIXEL_RECIPES, RECIPES, VQ_RECIPES, keep_recipe, load_recipe, parse
from hf_binaryformer.training.segmentation import build_model

ALL = [(folder, path.stem) for folder in (RECIPES, PIXEL_RECIPES, VQ_RECIPES) for path in sorted(folder.glob("*.yaml"))]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.5", 1.5), ("no", False), ("elbo", "elbo"), ("[1, 2]", [1, 2])]
)
def test_numbers_on_the_command_line(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


@pytest.mark.parametrize(("folder", "name"), ALL)
def test_every_recipe_has_only_what_there_is(folder, name):
    assert load_recipe(name, [], folder)


@pytest.mark.parametrize(("recipe", "data_set"), [("amos", "amos"), ("crossmoda", "crossmoda"), ("spine", "spider")])
def test_a_network_wants_the_spacing_that_its_data_was_brought_to(recipe, data_set):
    prepared = yaml.safe_load((DATA_SETS / f"{data_set}.yaml").read_text())["spacing"]
    assert load_recipe(recipe, [])["processor"]["spacing"] == prepared


def test_padding_to_the_prepared_size_does_not_change_how_a_scan_is_scaled():
    processor = BinaryFormerImageProcessor(**load_recipe("amos", [])["processor"])
    raw = np.random.default_rng(0).gamma(2.0, 100.0, (21, 26, 5)).astype(np.float32)
    padded = np.pad(raw, ((5, 6), (3, 3), (0, 0)), constant_values=raw.min())
    # Without padding, a thousandth of the voxels may be stray, and the darkest of the others are 0.
    np.testing.assert_allclose(processor.scale_volume(padded)[5:26, 3:29], processor.scale_volume(raw), atol=5e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rte=1", "train has no setting 'learning_rte'; it has .*learning_rate"),
        ("augment.max_rotatoin=1", "augment has no setting 'max_rotatoin'"),
        ("model.num_layers=2", "model has no setting 'num_layers'; it has .*num_hidden_layers"),
        ("processor.size=2", "processor has no setting 'size'"),
        ("train.trackers", "expected section.key=value"),
        ("nothing.at=1", "sections are data, model"),
        ("train.nested_dropout=1", "train has no setting"),
    ],
)
def test_settings_that_there_are_not(override, message):
    with pytest.raises(typer.BadParameter, match=message):
        load_recipe("hippocampus", [override])


def test_what_recipes_need_not_say_can_be_set():
    given = load_recipe("hippocampus", ["train.schedule=step", "train.decay_factor=0.9", "train.ema_decay=0.5"])
    assert given["train"]["decay_factor"] == 0.9
    given = load_recipe("hippocampus", ["augment.redraw_probability=0.5"])
    assert given["augment"]["redraw_probability"] == 0.5 and given["augment"]["mirror"] is None
    with pytest.raises(typer.BadParameter, match="vqae has no setting 'freeze_query_key'"):
        load_recipe("brain-small", ["vqae.freeze_query_key=true"], VQ_RECIPES)


@pytest.mark.parametrize("content", ["note: text\n", "augment:\n"])
def test_a_section_without_settings_is_named(content, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(typer.BadParameter, match="is no section: expected names and values below it"):
        load_recipe(str(tmp_path / "own.yaml"), [])


@pytest.mark.parametrize(
    "content",
    [
        b"train: [",
        b"train: {batch_size: 2\n",
        b"\xff\xfe\x00",
        b"train: \x00",
        b"train: {a: !!timestamp x}",
        b"train: {a: !!int ''}",
        b"train: {a: !!bool x}",
        b"train: {a: 2020-99-99}",
        b"train: {a: " + b"1" * 5000 + b"}",
        b"train: !!python/object:os.system {}",
        b"train: *unknown",
        b"? [a]\n: b",
        b"[" * 100_000,
        b"a: " + b"{a: " * 101 + b"0" + b"}" * 101,
        b"",
        b"3",
        b"[train]",
        b"1: {a: 2}",
        b"train: {1: 2}",
        b"train: 3",
        b"like: 3",
        b"like: [tiny-brain]",
        b"like: {a: 1}",
        b"like: nothing",
        b"like: '" + b"9" * 400 + b"'",
        b'like: "\\0"',
        b"like: own",
        b"like: other",
    ],
)
def test_damaged_files_are_refused_with_their_name(content, tmp_path):
    (tmp_path / "own.yaml").write_bytes(content)
    (tmp_path / "other.yaml").write_text("like: own\n")
    with pytest.raises(typer.BadParameter, match=r"own\.yaml|known are other, own"):
        load_recipe(str(tmp_path / "own.yaml"), [])


def test_a_recipe_takes_the_settings_of_all_that_it_is_like(tmp_path):
    (tmp_path / "a.yaml").write_text("like: b\ntrain: {x: 1}\n")
    (tmp_path / "b.yaml").write_text("like: c\ntrain: {x: 2, y: 2}\nnotes: {n: 2}\n")
    (tmp_path / "c.yaml").write_text("train: {x: 3, y: 3, z: 3}\ndata: {d: 3}\nnotes: {n: 3, m: 3}\n")
    recipe = load_recipe("a", [], tmp_path)
    assert {name: recipe["train"][name] for name in "xyz"} == {"x": 1, "y": 2, "z": 3}
    assert recipe["notes"] == {"n": 2, "m": 3} and recipe["data"] == {"d": 3}
    assert "like" not in recipe and recipe["train"]["ema_decay"] == 0


@pytest.mark.parametrize("section", ["transformer", "vqmodel", "scheduler"])
def test_a_file_with_a_wrong_setting_names_it(section, tmp_path):
    recipe = yaml.safe_load((VQ_RECIPES / "brain-small.yaml").read_text())
    recipe[section]["gird_size"] = 3
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(typer.BadParameter, match=rf"own\.yaml: {section} has no setting gird_size"):
        load_recipe(str(tmp_path / "own.yaml"), [])


def test_the_papers_form_by_the_commands_of_the_documentation():
    text = (RECIPES.parent / "segmentation.py").read_text().split('"""')[1].replace("``.", "").replace("``", "").split()
    given = [word for flag, word in itertools.pairwise(text) if flag == "--set"]
    assert len(given) == 6
    settings = load_recipe("hippocampus", given)
    model, _ = build_model(settings, {0: "background", 1: "a"})
    assert model.config.attention_type == "hamming" and model.config.resolved_bit_gradient == "none"
    assert (model.config.query_key_centering, model.config.query_key_norm) == ("none", "none")
    assert not model.config.learned_logit_scale and settings["train"]["iterations"] == 100


def test_a_resumed_run_goes_on_as_it_began(tmp_path):
    began = load_recipe("hippocampus", [])
    keep_recipe(began, tmp_path / "run", resume=False, writes=False)
    assert not (tmp_path / "run").exists()
    keep_recipe(began, tmp_path / "run", resume=False, writes=True)
    keep_recipe(load_recipe("hippocampus", ["train.workers=3", "train.log_every=1"]), tmp_path / "run", True, True)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == began
    said = load_recipe("hippocampus", ["train.decay_every=12", "train.ema_decay=0"])  # as the defaults are
    keep_recipe(said, tmp_path / "run", resume=True, writes=True)
    other = load_recipe("hippocampus", ["train.learning_rate=0.5", "model.attention_type=softmax"])
    with pytest.raises(typer.BadParameter) as error:
        keep_recipe(other, tmp_path / "run", resume=True, writes=True)
    assert "model.attention_type (was sign, is now softmax)" in str(error.value)
    assert "train.learning_rate (was 0.0007, is now 0.5)" in str(error.value)
    # A new run in its folder, if it has come to nothing; the recipe of one with checkpoints stays.
    keep_recipe(other, tmp_path / "run", resume=False, writes=True)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == other
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(typer.BadParameter, match="holds checkpoints of another run: --resume it"):
        keep_recipe(began, tmp_path / "run", resume=False, writes=True)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == other
    # A run from before recipes were kept gets the one that it goes on with.
    (tmp_path / "run" / "recipe.yaml").unlink()
    keep_recipe(began, tmp_path / "run", resume=True, writes=True)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == began


def test_a_setting_that_had_another_name_still_loads(tmp_path):
    words = yaml.safe_load((VQ_RECIPES / "brain-small.yaml").read_text())
    words["data"]["flip_axis"] = words["data"].pop("mirror_axis") + 1
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(words))
    recipe = load_recipe(str(path), [])
    assert recipe["data"]["mirror_axis"] == 1 and "flip_axis" not in recipe["data"]
    assert load_recipe("brain-small", ["data.flip_axis=2"], VQ_RECIPES)["data"]["mirror_axis"] == 2
    # A run that was interrupted before the change of the name goes on.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(path.read_text())
    began = load_recipe(str(tmp_path / "run" / "recipe.yaml"), [])
    (tmp_path / "run" / "recipe.yaml").write_text(
        yaml.safe_dump(
            began | {"data": {"flip_axis": 1} | {k: v for k, v in began["data"].items() if k != "mirror_axis"}}
        )
    )
    keep_recipe(recipe, tmp_path / "run", resume=True, writes=True)
    with pytest.raises(typer.BadParameter, match=r"data\.mirror_axis \(was 1, is now 0\)"):
        keep_recipe(load_recipe("brain-small", [], VQ_RECIPES), tmp_path / "run", resume=True, writes=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("processor.image_size=[100, 100]", "image_size .100, 100. must be a multiple of patch_size 8"),
        ("processor.num_slices=2", "num_slices is 2, expected an odd number"),
        ("processor.spacing=1", "section processor: spacing is 1, expected three numbers"),
        ("processor.image_size=96.5", "image_size is 96.5, expected .height, width."),
        ("processor.image_size=-8", "image_size is -8"),
        ("model.hidden_size=many", "hidden_size"),
    ],
)
def test_a_setting_that_a_class_refuses_is_a_wrong_option(tmp_path, override, message):
    settings = load_recipe(str(toys.write_segmentation_recipe(tmp_path / "toy.yaml")), [override])
    with pytest.raises(typer.BadParameter, match=message) as error:
        build_model(settings, {0: "background", 1: "a"})
    assert "\n" not in str(error.value)


def test_one_number_is_a_square_window(tmp_path):
    settings = load_recipe(str(toys.write_segmentation_recipe(tmp_path / "toy.yaml")), ["processor.image_size=32"])
    model, processor = build_model(settings, {0: "background", 1: "a"})
    assert processor.image_size == [32, 32] and list(model.config.image_size) == [32, 32]

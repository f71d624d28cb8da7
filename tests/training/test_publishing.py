"""Pushing checkpoints and cards, to a double of the Hub (hub_double.py says what it does not check)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import toys
import typer
import yaml
from hub_double import READ_TOKEN, TOKEN, Hub, Repository, call, running_hub
from huggingface_hub import HfApi, ModelCard, constants
from loading import fingerprint
from safetensors.torch import load_file, save_file

import hf_binaryformer as bf
from hf_binaryformer.training import autoencoder, cards, classification, publishing, sampler, segmentation
from hf_binaryformer.training.run_log import read_log

# Of huggingface_hub itself, about how it hands a file to its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ROOT = Path(__file__).parent.parent.parent
OWN = {".gitattributes", "README.md"}
MODEL_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_binaryformer.py"}
PIPELINE_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/{name}" for part in ("transformer", "vqmodel") for name in toys.DIFFUSERS_FILES),
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def connect(hub, monkeypatch):
    """Makes pushes of this process go to the double, with a token."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def with_token(token: str = TOKEN) -> None:
        monkeypatch.setattr(publishing, "HfApi", partial(HfApi, endpoint=hub.endpoint, token=token))

    with_token()
    return with_token


def check_fresh_load(hub: Hub, repo_id: str, folder: Path, tmp_path: Path) -> None:
    """A process that knows nothing but the name gets the very network of the folder."""
    out = tmp_path / "loaded.safetensors"
    done = call(hub, tmp_path / "another home", [str(ROOT / "tests" / "loading.py"), repo_id, str(out)])
    assert done.returncode == 0, done.stderr
    assert any(f"/{repo_id}/resolve/" in request for request in hub.requests), "nothing was downloaded"
    loaded, local = load_file(out), fingerprint(bf.from_pretrained(folder))
    assert loaded.keys() == local.keys() and any(key.endswith("output") for key in local)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in local.items())


def check_repository(repository: Repository, folder: Path, names: set[str], tmp_path: Path) -> ModelCard:
    """The files of the folder, no others, and no path of this machine in them; returns the card."""
    assert set(repository.files) == names | OWN
    assert len(repository.commits) == 2, "expected the creation and one commit"
    for name in names | {"README.md"}:
        assert repository.files[name] == (folder / name).read_bytes(), name
        assert str(tmp_path).encode() not in repository.files[name], f"a path of this machine in {name}"
        assert (name in repository.large) == name.endswith(".safetensors")
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.library_name == "hf-binaryformer"
    assert "Research only, not for clinical use." in card.text
    return card


@pytest.mark.slow
def test_a_segmentation_network_is_pushed_once_by_two_processes_and_loads_elsewhere(hub, tmp_path):
    data, output, repo_id = tmp_path / "data", tmp_path / "run", "tester/toy-balls"
    data.mkdir()
    toys.write_segmentation_data(data)
    recipe = toys.write_segmentation_recipe(tmp_path / "toy.yaml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "finetune.py"), "--recipe", str(recipe), "--data", str(data)]
    command += ["--output", str(output), "--evaluate", "test", "--push-to-hub", repo_id, "--private"]
    done = call(hub, tmp_path / "home", command)
    assert done.returncode == 0, done.stderr
    assert hub.requests.count("POST /api/repos/create") == 1
    assert read_log(output / "log.jsonl")[0]["processes"] == 2
    repository = hub.repositories[repo_id]
    assert repository.private
    names = MODEL_FILES
    card = check_repository(repository, output / "model", names, tmp_path)
    results = json.loads((output / "results.json").read_text())
    assert card.data.pipeline_tag == "image-segmentation" and card.data.model_name == "toy-balls"
    assert card.data.eval_results[0].metric_value == results["rows"]["network"]["mean"]
    assert card.data.eval_results[0].dataset_name == "toy-balls, test split"
    assert cards.dice_table(results) in card.text and "CC0-1.0" in card.text
    assert "Labels shell, core" in card.text and f'from_pretrained("{repo_id}")' in card.text
    assert "Recipe `toy`: 6 iterations" in card.text and "hidden_size: 24" in card.text
    check_fresh_load(hub, repo_id, output / "model", tmp_path)


def test_a_pipeline_is_pushed_and_loads_elsewhere(hub, tmp_path):
    tokens, output, repo_id = tmp_path / "tokens", tmp_path / "run", "tester/toy-pipeline"
    tokens.mkdir()
    toys.write_tokens(tokens)
    toys.write_autoencoder(tmp_path / "vqmodel")
    recipe = toys.write_sampler_recipe(tmp_path / "toy.yaml")
    command = [str(ROOT / "scripts" / "train_sampler.py"), "--recipe", str(recipe), "--tokens", str(tokens)]
    command += ["--vqmodel", str(tmp_path / "vqmodel"), "--output", str(output), "--push-to-hub", repo_id]
    done = call(hub, tmp_path / "home", command)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[repo_id]
    assert not repository.private
    card = check_repository(repository, output / "pipeline", PIPELINE_FILES, tmp_path)
    assert "bits for each position" in card.text and "licence of the data: not stated" in card.text
    check_fresh_load(hub, repo_id, output / "pipeline", tmp_path)


def test_without_a_token_nothing_is_trained(hub, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    toys.write_segmentation_data(data)
    recipe = toys.write_segmentation_recipe(tmp_path / "toy.yaml")
    command = [str(ROOT / "scripts" / "finetune.py"), "--recipe", str(recipe), "--data", str(data)]
    command += ["--output", str(tmp_path / "run"), "--push-to-hub", "tester/toy"]
    done = call(hub, tmp_path / "home", command, token=None)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "LocalTokenNotFoundError" in done.stderr and "hf auth login" in done.stderr
    assert not (tmp_path / "run").exists() and not hub.repositories


@pytest.mark.parametrize("recipe_of", ["transformer", "autoencoder"])
def test_a_transformer_or_an_autoencoder_is_pushed(recipe_of, hub, connect, tmp_path):
    data, output, repo_id = tmp_path / "data", tmp_path / "run", "tester/toy"
    data.mkdir()
    if recipe_of == "transformer":
        recipe = toys.write_sampler_recipe(tmp_path / "toy.yaml")
        sampler.main(str(recipe), toys.write_tokens(data), output, push_to_hub=repo_id)
        folder = output / "transformer"
    else:
        recipe = toys.write_autoencoder_recipe(tmp_path / "toy.yaml")
        autoencoder.main(str(recipe), [toys.write_balls(data)], output, push_to_hub=repo_id)
        folder = output / "vqmodel"
    card = check_repository(hub.repositories[repo_id], folder, set(toys.DIFFUSERS_FILES), tmp_path)
    if recipe_of == "autoencoder":
        psnr = json.loads((output / "results.json").read_text())["psnr"]
        assert card.data.eval_results[0].metric_value == psnr and f"{psnr} dB" in card.text


def test_a_classifier_of_pixels_is_pushed_and_loads_elsewhere(hub, connect, tmp_path):
    data, output, repo_id = tmp_path / "data", tmp_path / "run", "tester/toy"
    data.mkdir()
    recipe = toys.write_pixel_recipe(tmp_path / "toy.yaml")
    classification.main(str(recipe), toys.write_pixels(data), output, evaluate="test", push_to_hub=repo_id)
    names = MODEL_FILES
    card = check_repository(hub.repositories[repo_id], output / "model", names, tmp_path)
    accuracy = json.loads((output / "results.json").read_text())["accuracy"]
    assert card.data.pipeline_tag == "image-classification" and card.data.eval_results[0].metric_value == accuracy
    shown = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load((output / "recipe.yaml").read_text())
    assert "Tells 4 classes" in card.text and "of the 20 images of the test split" in card.text
    check_fresh_load(hub, repo_id, output / "model", tmp_path)


def test_when_the_upload_fails_the_checkpoint_is_safe_and_can_be_pushed_later(
    hub, connect, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data, folder = tmp_path / "data", Path("run") / "model"
    data.mkdir()
    toys.write_segmentation_data(data)
    recipe = toys.write_segmentation_recipe(tmp_path / "toy.yaml")
    hub.refuse_commits = True
    with pytest.raises(typer.Exit) as stop:
        segmentation.main(str(recipe), data, Path("run"), evaluate="none", push_to_hub="tester/toy")
    assert stop.value.exit_code == 1
    said = capsys.readouterr().err
    assert "publishing to 'tester/toy' failed (HfHubHTTPError" in said and "500" in said
    assert "the checkpoint is safe in run/model; push it later with: " in said
    assert "python -m hf_binaryformer.training.publishing run/model tester/toy" in said
    assert set(hub.repositories["tester/toy"].files) == {".gitattributes"}
    hub.refuse_commits = False
    publishing.main(folder, "tester/toy")
    names = MODEL_FILES
    card = check_repository(hub.repositories["tester/toy"], folder, names, tmp_path)
    assert "has not been evaluated" in card.text and not card.data.eval_results


def test_when_the_card_cannot_be_written_the_checkpoint_is_safe(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        publishing.publish("segmentation", tmp_path, "tester/toy", tmp_path / "run", "toy", [])
    said = capsys.readouterr().err
    assert "publishing to 'tester/toy' failed (FileNotFoundError" in said and f"is safe in {tmp_path};" in said


@pytest.mark.parametrize("name", ["toy", "a/b/c", "tester/a name", "tester/-toy", "tester/", "/toy", ""])
def test_a_name_that_no_repository_can_have_is_refused_before_any_request(name, hub, connect):
    with pytest.raises(typer.BadParameter, match="expected namespace/name"):
        publishing.check_target(name, private=False)
    assert not hub.requests


def test_a_repository_that_cannot_be_written_to_is_refused_before_the_training(hub, connect):
    with pytest.raises(typer.BadParameter, match=r"cannot push to 'other/new' .*403"):
        publishing.check_target("other/new", private=False)
    # It exists and everybody may read it, with which create_repo is content.
    hub.repositories["other/theirs"] = Repository(writable=False)
    with pytest.raises(typer.BadParameter, match=r"cannot push to 'other/theirs' .*403"):
        publishing.check_target("other/theirs", private=False)
    for token in (READ_TOKEN, "hf_expired"):
        connect(token)
        with pytest.raises(typer.BadParameter, match=r"HF_TOKEN"):
            publishing.check_target("tester/toy", private=False)
    assert set(hub.repositories) == {"other/theirs"}


def test_private_means_private(hub, connect):
    publishing.check_target("tester/secret", private=True)
    publishing.check_target("tester/secret", private=True)
    assert hub.repositories["tester/secret"].private
    publishing.check_target("tester/open", private=False)
    with pytest.raises(typer.BadParameter, match="'tester/open' is there and public"):
        publishing.check_target("tester/open", private=True)
    with pytest.raises(typer.BadParameter, match="give that too, or neither"):
        publishing.check_target(None, private=True)
    with pytest.raises(typer.BadParameter, match="half a training is not pushed"):
        publishing.check_target("tester/toy", private=False, stop_after=3)


def test_without_the_network_it_says_so(hub):
    with pytest.raises(typer.BadParameter, match="OfflineModeIsEnabled|LocalTokenNotFoundError"):
        publishing.check_target("tester/toy", private=False)
    publishing.check_target(None, private=False)
    assert not hub.requests


def test_a_repository_holds_the_last_checkpoint_and_nothing_else(hub, connect, tmp_path):
    contents = {"pipeline": PIPELINE_FILES, "model": {"config.json", "model.safetensors"}}
    contents["model"] |= {"optimizer.bin", "log.jsonl", "run.log", "notes.md", "checkpoints/scheduler.pt"}
    for folder, names in contents.items():
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                save_file({"x": torch.ones(len(folder))}, path)
            else:
                path.write_text(f'{{"of": "{folder}"}}')
    publishing.check_target("tester/toy", private=False)
    repository = hub.repositories["tester/toy"]
    repository.files["figure.png"] = b"put there by hand"
    publishing.push(tmp_path / "pipeline", "tester/toy")
    assert set(repository.files) == PIPELINE_FILES | {".gitattributes", "figure.png"}
    publishing.push(tmp_path / "model", "tester/toy")
    assert set(repository.files) == {"config.json", "model.safetensors", ".gitattributes", "figure.png"}
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(typer.BadParameter, match=r"has no \.safetensors file"):
        publishing.push(tmp_path / "model", "tester/toy")


def test_paths_do_not_get_into_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "w").touch()
    settings = {
        "a": ["/home/me/w.safetensors", "~/w", "../w", "mine/w", "a/b/w"],
        "b": {"c": "timm/vit", "d": 3, "e": None},
    }
    expected = {"a": ["w.safetensors", "w", "w", "w", "w"], "b": {"c": "timm/vit", "d": 3, "e": None}}
    assert publishing.without_paths(settings) == expected


def test_a_label_that_no_volume_has_does_not_break_the_table():
    labels = {"a": {"mean": None, "sd": None, "nan": 1}, "b": {"mean": 0.5, "sd": 0.1, "nan": 0}}
    labels["c"] = {"mean": 0.25, "sd": None, "nan": 0}
    table = cards.dice_table({"rows": {"network": {"mean": None, "labels": labels}}})
    assert (
        "| a | n/a |" in table
        and "| b | 0.500 ± 0.100 |" in table
        and "| c | 0.250 |" in table
        and "| **mean** | n/a |" in table
    )


def test_every_kind_has_its_words():
    words = yaml.safe_load((cards.TEMPLATES / "trained.yaml").read_text())
    template = (cards.TEMPLATES / "template.md").read_text()
    for kind, chosen in words["kinds"].items():
        for section in ("summary", "usage", "network", "data", "results", "commands", "training", "limits"):
            assert f"{{{{ {section} }}}}" in template
            assert (words["sections"] | chosen["sections"])[section], f"{kind} has no {section}"

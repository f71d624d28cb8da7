"""Names that the project knows: where their weights are looked for, and what is said where there are none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import hf_binaryformer as bf
from hf_binaryformer import cli
from hf_binaryformer.commands.prepare import app as prepare
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.catalogue import KNOWN_MODELS
from hf_binaryformer.modeling.pretrained import CheckpointNotFoundError, local_checkpoint, resolve_checkpoint
from hf_binaryformer.training.recipes import known_recipes, trainings_of

ROOT = Path(__file__).parents[2]
CARDS = sorted(path.stem for path in (ROOT / "model_cards").glob("*.yaml"))
PROMISED = {"binaryformer-vit-s8-amos", "binaryformer-vit-s8-spine", "binaryformer-vit-s8-crossmoda", "binaryvq-oasis"}


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> Path:
    """No weights in the package or the checkout, no network, and an empty current folder."""
    for name in ("PACKAGED", "PUBLISHED"):
        monkeypatch.setattr(pretrained, name, tmp_path / name.lower())

    def snapshot_download(repository, **options):
        raise OSError(f"{repository} cannot be reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def save(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_every_name_with_a_card_is_known():
    assert PROMISED <= set(CARDS) <= set(KNOWN_MODELS)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_commands_of_the_catalogue_exist(name):
    known = KNOWN_MODELS[name]
    module, recipe = re.search(r"hf_binaryformer\.training\.(\w+) --recipe ([\w-]+)", known.command).groups()
    assert recipe in known_recipes() and module in trainings_of(recipe)
    registered = {command.name or command.callback.__name__ for command in prepare.registered_commands}
    wanted = re.findall(r"`binaryformer prepare ([\w-]+)`", known.data)
    assert wanted and set(wanted) <= registered
    assert "http" in known.data or "Synapse" in known.data, "from whom"


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_where_weights_are_absent_it_is_said_how_to_come_by_them(name, elsewhere):
    with pytest.raises(CheckpointNotFoundError) as error:
        bf.from_pretrained(name)
    known, message = KNOWN_MODELS[name], str(error.value)
    for words in (name, known.does, known.trained_on, known.command, known.data, str(elsewhere / "here" / name)):
        assert words in message


def test_an_unknown_name_gets_the_known_ones(elsewhere):
    with pytest.raises(CheckpointNotFoundError, match="Known names") as error:
        bf.from_pretrained("binaryformer-heart")
    assert all(name in str(error.value) for name in KNOWN_MODELS)


def test_names_are_looked_for_in_order(elsewhere, monkeypatch):
    name, asked = "binaryformer-vit-s8-amos", []

    def snapshot_download(repository, **options):
        asked.append(repository)
        return str(elsewhere / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_checkpoint(name) == elsewhere / "hub" and asked == [f"hf-binaryformer/{name}"]
    places = [elsewhere / "published" / name, elsewhere / "packaged" / name, Path(name)]
    for place in places:
        save(place)
        assert resolve_checkpoint(name) == place, "what stands before is preferred"
    assert local_checkpoint(name) == elsewhere / "packaged" / name and len(asked) == 1


def test_models_lists_every_name_and_where_its_weights_are(elsewhere):
    save(elsewhere / "published" / "binaryformer-vit-s8-spine")
    (elsewhere / "published" / "binaryformer-vit-s8-spine" / "model.safetensors").write_bytes(b"0" * 1_500_000)
    save(elsewhere / "packaged" / "binaryformer-own")
    result = CliRunner(env={"COLUMNS": "60"}).invoke(cli.app, ["models"])
    assert result.exit_code == 0, result.output
    blocks = {block[0]: "\n".join(block[1:]) for block in blocks_of(result.stdout)}
    assert set(blocks) == {*KNOWN_MODELS, "binaryformer-own"}
    assert (
        f"1.5 MB, weights in {elsewhere / 'published' / 'binaryformer-vit-s8-spine'}"
        in blocks["binaryformer-vit-s8-spine"]
    )
    assert "train:" not in blocks["binaryformer-vit-s8-spine"]
    assert "not described" in blocks["binaryformer-own"] and "in the package" in blocks["binaryformer-own"]
    for name in set(KNOWN_MODELS) - {"binaryformer-vit-s8-spine"}:
        known = KNOWN_MODELS[name]
        for words in (known.does, known.trained_on, known.parameters, "weights not here", known.command, known.data):
            assert words in blocks[name]


def blocks_of(text: str) -> list[list[str]]:
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith(" "):
            found[-1].append(line.strip())
        elif line:
            found.append([line])
    return found


@pytest.mark.parametrize("name", CARDS)
def test_cards_say_whether_there_are_weights(name):
    text = (ROOT / "model_cards" / f"{name}.md").read_text()
    words = yaml.safe_load((ROOT / "model_cards" / f"{name}.yaml").read_text())
    if local_checkpoint(name) is None:
        assert text.partition("## ")[0].count("**Recipe only: there are no weights of this name") == 1
        assert words["metrics"] == [] and words["licence"] is None, "no figures, and no licence of weights"
    else:
        assert "Recipe only" not in text


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_promised_cards_are_rendered(name):
    from hf_binaryformer.training.cards import checkpoint_card

    card = str(checkpoint_card(name, ROOT / "model_cards"))
    assert (ROOT / "model_cards" / f"{name}.md").read_text() == card, f"run: python scripts/write_card.py {name}"

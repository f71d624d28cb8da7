"""Revisions, private and gated repositories, the cache, broken uploads and collections, with the Hub's real clients.

The server is a double (hub_double.py says what it does not check).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from hub_double import READ_TOKEN, TOKEN, Hub, call, running_hub
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from vq_cases import save_checkpoint

import hf_binaryformer as bf
from hf_binaryformer.training import hub_collection, publishing

# Of huggingface_hub itself, about how it hands a file to its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "tester/toy"
TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_heads": 2, "num_hidden_layers": 2, "num_labels": 3}
TINY |= {"value_head_dim": 4, "decoder_hidden_size": 32, "initializer_range": 0.2}
# Finds checkpoints; prints a number that only their weights have, or the error's class and message. It needs no torch.
LOAD = """
import json, sys
from safetensors import safe_open
from hf_binaryformer.modeling.pretrained import resolve_checkpoint

def mark(folder):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            if "decoder.head.bias" in file.keys():
                return round(float(file.get_tensor("decoder.head.bias")[0]), 3)

said = []
for options in json.loads(sys.argv[2]):
    try:
        said.append(mark(resolve_checkpoint(sys.argv[1], **options)))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
assert "torch" not in sys.modules
print(json.dumps(said))
"""
ROUND_TRIPS = """
import sys
import torch
import hf_binaryformer as bf
from safetensors.torch import save_file
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForSemanticSegmentation, pipeline
)
image = torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)
segmentation = AutoModelForSemanticSegmentation.from_pretrained("tester/labels")
processor = AutoImageProcessor.from_pretrained("tester/labels")
found = {"pixels": processor(image[0, 0].numpy())["pixel_values"], "logits": segmentation(image).logits}
found["classes"] = AutoModelForImageClassification.from_pretrained("tester/classes")(image).logits
found["maps"] = AutoBackbone.from_pretrained("tester/labels", out_indices=[1]).eval()(image).feature_maps[0]
found["tokens"] = AutoModel.from_pretrained("tester/classes")(image)[0]
assert AutoConfig.from_pretrained("tester/labels").num_labels == 3
assert pipeline("mri-segmentation", model="tester/labels").image_processor.image_mean == 0.3
quiet = bf.from_pretrained("tester/vq")
quiet.set_progress_bar_config(disable=True)
found["volume"] = quiet(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
save_file({key: one.detach().contiguous() for key, one in found.items()}, sys.argv[1])
"""


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """The double; pushes of this process go to it, with a token."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = partial(HfApi, endpoint=server.endpoint, token=TOKEN)
        monkeypatch.setattr(publishing, "HfApi", api)
        monkeypatch.setattr(hub_collection, "HfApi", api)
        yield server


def checkpoint(folder: Path, mark: float) -> Path:
    """A network that is known by one of its numbers."""
    torch.manual_seed(0)
    model = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**TINY))
    torch.nn.init.constant_(model.decoder.head.bias, mark)
    model.save_pretrained(folder)
    bf.BinaryFormerImageProcessor(image_size=(16, 16), image_mean=0.3).save_pretrained(folder)
    return folder


def load(hub: Hub, home: Path, *options: dict, token: str | None = TOKEN, **more: str) -> list:
    """What a process of its own says to one load after another."""
    done = call(hub, home, ["-c", LOAD, NAME, json.dumps(options)], token, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_revisions_and_the_cache(hub, tmp_path):
    publishing.main(checkpoint(tmp_path / "a", 1.0), NAME)
    first = hub.repositories[NAME].sha
    publishing.main(checkpoint(tmp_path / "b", 2.0), NAME)
    publishing.main(checkpoint(tmp_path / "c", 3.0), NAME, revision="trial")
    publishing.main(checkpoint(tmp_path / "d", 4.0), NAME, revision="trial")
    assert set(hub.repositories[NAME].branches) == {"trial"}
    home = tmp_path / "home"
    none, main, trial = {}, {"revision": "main"}, {"revision": "trial"}
    said = load(hub, home, none, main, trial, {"revision": first}, {"revision": "nowhere"})
    assert said[:4] == [2.0, 2.0, 4.0, 1.0]
    assert said[4].startswith("CheckpointNotFoundError") and "it has no revision 'nowhere'" in said[4]

    # The same files without the Hub: what is in the cache loads, what is not says so.
    asked = len(hub.requests)
    offline = load(hub, home, none, trial, {"revision": first}, {"revision": "other"}, HF_HUB_OFFLINE="1")
    assert offline[:3] == [2.0, 4.0, 1.0] and len(hub.requests) == asked
    assert "LocalEntryNotFoundError: not in the cache" in offline[3]
    (empty,) = load(hub, tmp_path / "new home", {"local_files_only": True})
    assert "load it once with a network" in empty and len(hub.requests) == asked


def test_private_and_gated_repositories(hub, tmp_path):
    publishing.main(checkpoint(tmp_path / "a", 1.0), NAME, private=True)
    home = tmp_path / "home"
    said, granted = load(hub, home, {}, {"token": TOKEN}, token=None)
    assert "RepositoryNotFoundError: there is none, or it is private: if you may read it, log in" in said
    assert granted == 1.0

    publishing.main(checkpoint(tmp_path / "b", 2.0), "tester/gate", gated="manual")
    gate = hub.repositories["tester/gate"]
    assert gate.gated == "manual"
    settings, commit = "PUT /api/models/tester/gate/settings", "POST /api/models/tester/gate/commit/main"
    assert hub.requests.index(settings) < hub.requests.index(commit), "it was open for a moment"
    done = call(hub, home, ["-c", LOAD, "tester/gate", json.dumps([{}, {"token": TOKEN}])], READ_TOKEN)
    denied, granted = json.loads(done.stdout.splitlines()[-1])
    assert "GatedRepoError: it is gated: ask for access on its page, then log in" in denied and granted == 2.0

    with pytest.raises(typer.BadParameter, match="--gated is 'closed', expected one of auto, manual"):
        publishing.gate("tester/gate", "closed")
    gate.writable = False
    with pytest.raises(typer.BadParameter, match="cannot gate 'tester/gate' .*403"):
        publishing.gate("tester/gate", "auto")


def test_a_broken_upload_goes_on_where_it_stopped(hub, tmp_path):
    folder = checkpoint(tmp_path / "a", 1.0)
    model = bf.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    publishing.check_target(NAME, private=False)
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
    hub.refused_objects = {digests[shards[-1]]}
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        publishing.push(folder, NAME)
    assert set(hub.repositories[NAME].files) == {".gitattributes"}, "half a checkpoint was published"
    there = set(hub.objects)
    hub.refused_objects, before = set(), len(hub.requests)
    publishing.push(folder, NAME)
    sent = {one.rpartition("/")[2] for one in hub.requests[before:] if one.startswith("PUT /objects/")}
    assert there and sent == set(digests.values()) - there
    assert load(hub, tmp_path / "home", {}) == [1.0]


@pytest.mark.slow
def test_round_trips(hub, tmp_path):
    image = torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)
    labels = checkpoint(tmp_path / "labels", 1.0)
    classes = bf.BinaryFormerForImageClassification(bf.BinaryFormerConfig(**TINY)).eval()
    classes.save_pretrained(tmp_path / "classes")
    save_checkpoint(tmp_path / "vq")
    for name in ("labels", "classes", "vq"):
        publishing.main(tmp_path / name, f"tester/{name}")
    assert {"modeling_binaryformer.py"} < set(hub.repositories["tester/labels"].files)
    assert not [name for name in hub.repositories["tester/vq"].files if name.endswith(".py")]
    out = tmp_path / "found.safetensors"
    done = call(hub, tmp_path / "home", ["-c", ROUND_TRIPS, str(out)])
    assert done.returncode == 0, done.stderr[-3000:]
    found, model = load_file(out), bf.from_pretrained(labels)
    pipeline = bf.from_pretrained(tmp_path / "vq")
    pipeline.set_progress_bar_config(disable=True)
    processor = bf.BinaryFormerImageProcessor.from_pretrained(labels)
    expected = {
        "pixels": processor(image[0, 0].numpy())["pixel_values"],
        "logits": model(image).logits,
        "classes": classes(image).logits,
        "maps": bf.BinaryFormerBackbone.from_pretrained(labels, config=config_with([1], labels))(image).feature_maps[0],
        "tokens": classes.binaryformer(image).last_hidden_state,
        "volume": pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images,
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def config_with(out_indices: list[int], folder: Path) -> bf.BinaryFormerConfig:
    return bf.BinaryFormerConfig.from_pretrained(folder, out_indices=out_indices)


def test_code_of_others_is_not_published(hub, tmp_path):
    folder = checkpoint(tmp_path / "a", 1.0)
    (folder / "modeling_binaryformer.py").write_text("print('mine')")
    (folder / "other.py").write_text("print('mine')")
    publishing.check_target(NAME, private=False)
    publishing.push(folder, NAME, remote_code=False)
    files = hub.repositories[NAME].files
    assert not [name for name in files if name.endswith(".py")] and b"auto_map" not in files["config.json"]
    publishing.push(folder, NAME)
    assert b"print" not in files["modeling_binaryformer.py"][:1000] and "other.py" not in files
    publishing.push(save_checkpoint(tmp_path / "vq"), NAME)
    assert "modeling_binaryformer.py" not in files, "a pipeline beside code is refused when it is loaded"


def card(folder: Path, sentence: str) -> None:
    data = {"license": "apache-2.0"}
    text = f"---\nlicense: {data['license']}\n---\n\n# Toy\n\n{sentence} And more.\n\n**Research only.**\n"
    (folder / "README.md").write_text(text)


def test_a_collection(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("one", "two"):
        card(checkpoint(tmp_path / name, 1.0), f"Labels {name}.")
        publishing.main(tmp_path / name, f"tester/{name}")
    url = hub_collection.collect("Brains of toys", ["tester/two"], description="All of them")
    (made,) = hub.collections.values()
    assert url == f"{hub.endpoint}/collections/{made['slug']}" and made["description"] == "All of them"
    card(tmp_path / "two", "Labels two things.")
    publishing.main(tmp_path / "two", "tester/two")
    assert hub_collection.collect("Brains of toys", ["tester/two", "tester/one"]) == url
    assert [(one["id"], one["note"]["text"]) for one in made["items"]] == [
        ("tester/two", "Labels two things."),
        ("tester/one", "Labels one."),
    ]
    with pytest.raises(typer.BadParameter, match="push the models first"):
        hub_collection.main("Brains of toys", ["tester/absent"])
    with pytest.raises(ValueError, match="0 repositories"):
        hub_collection.collect("Brains of toys", [])


def test_a_card_has_results_from_records_alone():
    """The Hub's list of results (``model-index``) is what an evaluation recorded, and nothing if there was none."""
    words = {
        "task": "image-segmentation",
        "sections": dict.fromkeys(SECTIONS, "text"),
        "model-index": [{"name": "made up"}],
    }
    metric = {"dataset": "d", "name": "mean Dice", "type": "dice", "value": "{{ results.mean if results else '' }}"}
    for results, expected in ((None, None), ({"mean": 0.25}, [0.25])):
        made = publishing.render_card("toy", words | {"metrics": [metric]}, {"results": results}, None)
        again = ModelCard(str(made)).data
        found = again.eval_results and [one.metric_value for one in again.eval_results]
        assert found == expected
        assert ("model-index" in str(made)) == bool(expected) and "made up" not in str(made)


SECTIONS = ("summary", "usage", "network", "data", "results", "commands", "training", "limits")

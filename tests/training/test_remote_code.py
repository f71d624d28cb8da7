"""The networks in one file: made from the source, and the same network where the package cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alone import WITHOUT_PACKAGE
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import hf_binaryformer as bf
from hf_binaryformer.training import remote_code
from hf_binaryformer.training.remote_code import FILE, flat_source, save_remote_code

SMALL = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_heads": 2, "num_hidden_layers": 2, "num_labels": 3}
SMALL |= {"value_head_dim": 4, "decoder_hidden_size": 32, "initializer_range": 0.2, "num_channels": 3}
FORMS = {
    "hamming": {"attention_type": "hamming", "bit_gradient": "ste"},
    "balanced": {
        "attention_type": "sign",
        "bit_gradient": "ternary",
        "query_key_centering": "tokens",
        "query_key_norm": "rms",
    },
}
ALLOWED = {"torch", "timm", "transformers", "huggingface_hub", "numpy"}
# What a process runs that has no hf_binaryformer.
ALONE = (
    WITHOUT_PACKAGE
    + """
import json
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForSemanticSegmentation

given, found = load_file("given.safetensors"), {}
for name in ("hamming", "balanced"):
    model = AutoModelForSemanticSegmentation.from_pretrained(name, trust_remote_code=True)
    output = model(given["image"], labels=given["labels"])
    output.loss.backward()
    found |= {f"{name} logits": output.logits.detach(), f"{name} tokens": model.binaryformer(given["image"])[0].detach()}
    found[f"{name} gradient"] = model.binaryformer.encoder.blocks[1].attn.proj.weight.grad
    # The encoder comes from another load of the same code.
    encoder = AutoModel.from_pretrained(name, trust_remote_code=True)
    assert torch.equal(encoder(given["image"])[0], model.binaryformer(given["image"])[0])
processor = AutoImageProcessor.from_pretrained("hamming", trust_remote_code=True)
found["pixels"] = processor(given["grey"].numpy())["pixel_values"]
classifier = AutoModelForImageClassification.from_pretrained("classes", trust_remote_code=True)
found["classes"] = classifier(given["image"]).logits.detach()
try:
    AutoConfig.from_pretrained("hamming", trust_remote_code=True, pooling="nonsense")
except Exception as error:
    assert "Field 'pooling' expected one of" in str(error)
else:
    raise AssertionError("a wrong field is accepted")
save_file({key: one.contiguous() for key, one in found.items()}, "found.safetensors")
print(json.dumps([type(model).__module__.split(".")[0], "hf_binaryformer" in sys.modules]))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints as they are before a push."""
    root = tmp_path_factory.mktemp("remote")
    torch.manual_seed(5)
    for name, form in FORMS.items():
        bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**SMALL, **form)).save_pretrained(root / name)
    bf.BinaryFormerImageProcessor(image_size=(16, 16), image_mean=0.3).save_pretrained(root / "hamming")
    config = bf.BinaryFormerConfig(**SMALL, attention_type="hamming_grouped", pooling="max")
    bf.BinaryFormerForImageClassification(config).save_pretrained(root / "classes")
    assert all(save_remote_code(root / name) for name in (*FORMS, "classes"))
    return root


def test_without_the_package_it_is_the_same_network(folder):
    given = {"image": torch.randn(2, 3, 16, 24), "labels": torch.randint(3, (2, 16, 24)), "grey": torch.rand(20, 30)}
    save_file(given, folder / "given.safetensors")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-P", "-c", ALONE]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["transformers_modules", False]
    found = load_file(folder / "found.safetensors")
    expected = {}
    for name in FORMS:
        model = bf.from_pretrained(folder / name)
        model.set_attention_backend("reference")
        output = model(given["image"], labels=given["labels"])
        output.loss.backward()
        expected |= {f"{name} logits": output.logits, f"{name} tokens": model.binaryformer(given["image"])[0]}
        expected[f"{name} gradient"] = model.binaryformer.encoder.blocks[1].attn.proj.weight.grad
    expected["pixels"] = bf.BinaryFormerImageProcessor.from_pretrained(folder / "hamming")(given["grey"].numpy())[
        "pixel_values"
    ]
    expected["classes"] = bf.from_pretrained(folder / "classes")(given["image"]).logits
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(
            found[name], one.detach(), rtol=1e-5, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}"
        )


def test_beside_the_package_the_file_is_not_run(folder, tmp_path):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / "hamming" / name).read_bytes())
    (tmp_path / FILE).write_text("raise SystemExit('it runs')")
    for trust in (None, True):
        model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, trust_remote_code=trust)
        processor = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(model) is bf.BinaryFormerForSemanticSegmentation
        assert type(processor) is bf.BinaryFormerImageProcessor


def test_the_file_needs_nothing_of_this_package():
    text = flat_source()
    assert "hf_binaryformer" not in text
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.partition(".")[0])
    assert roots - set(sys.stdlib_module_names) <= ALLOWED


def test_what_is_no_network_is_left_alone(tmp_path):
    assert not save_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "BinaryVQModel"}')
    assert not save_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Have the file made from other modules."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(remote_code, "PACKAGE", folder)
    monkeypatch.setattr(remote_code, "ENTRIES", ("second",))
    monkeypatch.setattr(remote_code, "STAND_INS", {})
    monkeypatch.setattr(remote_code, "flat_source", remote_code.flat_source.__wrapped__)


FIRST = '"""First é."""\n\ndef _help(x):\n    return x + 1\n\n\ndef first(x): return "é", _help(x)\n'
SECOND = """from __future__ import annotations

from hf_binaryformer.first import first as other

def _help(x: Unknown) -> Unknown:
    return 2 * x

def second(x):
    return other(x)[1], _help(x)
"""


def test_names_of_two_modules_are_told_apart(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, first=FIRST, second=SECOND)
    space = {"__name__": "flat"}
    exec(remote_code.flat_source(), space)
    assert space["second"](5) == (6, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": "import numpy as x\nfirst = 1", "second": SECOND + "\nimport torch as x"}, "use one name"),
        ({"first": FIRST, "second": SECOND.replace("(x: Unknown)", "(_help)")}, "argument '_help'"),
        ({"first": FIRST, "second": SECOND + "    from hf_binaryformer.first import first\n"}, "inside a function"),
        ({"first": FIRST, "second": SECOND + "PLACE = 'hf_binaryformer'\n"}, "still names hf_binaryformer"),
    ],
)
def test_what_cannot_be_put_into_one_file_is_refused(change, message, tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, **change)
    with pytest.raises(ValueError, match=message):
        remote_code.flat_source()

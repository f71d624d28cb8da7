"""The networks: sizes, saving, starting from timm, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

from hf_binaryformer.modeling.attention import BinaryAttention, attention_modules
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.decoder import ShuffleBlock, UnshuffleBlock
from hf_binaryformer.modeling.networks import (
    BinaryFormerForImageClassification,
    BinaryFormerForSemanticSegmentation,
    BinaryFormerModel,
)
from hf_binaryformer.modeling.pretrained import CheckpointError, CheckpointNotFoundError
from hf_binaryformer.pipelines.loading import from_pretrained

ATTENTION_TYPES = ["softmax", "sign", "sign_stopgrad", "hamming", "hamming_grouped", "hamming_bernoulli", "uniform"]
CLASSES = [BinaryFormerModel, BinaryFormerForSemanticSegmentation, BinaryFormerForImageClassification]


def tiny(**fields: Any) -> BinaryFormerConfig:
    sizes = {
        "image_size": 32,
        "num_channels": 1,
        "hidden_size": 48,
        "num_heads": 3,
        "value_head_dim": 4,
        "num_hidden_layers": 2,
        "decoder_hidden_size": 64,
        "num_labels": 4,
    }
    return BinaryFormerConfig(**{**sizes, **fields})


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)[0]


def test_vit_s8_has_the_papers_size():
    model = BinaryFormerForSemanticSegmentation(BinaryFormerConfig(image_size=320, num_labels=14))
    theta = sum(count(a.query_theta) + count(a.key_theta) for a in attention_modules(model))
    # Paper Sec. 3.1: 19 M in the encoder (its weight networks theta counted apart), 8 M in the decoder.
    assert count(model.binaryformer) - theta == 19_325_952
    assert theta == 3_571_344
    assert count(model.decoder) == 7_667_310


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_saved_and_loaded_is_the_same_to_the_bit(cls, attention_type, tmp_path):
    model = cls(tiny(attention_type=attention_type)).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = cls.from_pretrained(tmp_path)
    assert again.config.attention_type == attention_type
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    x = torch.randn(2, 1, 32, 32)
    for m in (model, again):
        m.set_attention_generator(torch.Generator().manual_seed(3))
    assert torch.equal(outputs(again, x), outputs(model, x)) if attention_type != "hamming_bernoulli" else True
    for m in (model, again):
        m.set_attention_generator(torch.Generator().manual_seed(3))
    first = outputs(model, x)
    assert torch.equal(first, outputs(again, x))


def test_short_name_folder_and_auto_classes_agree(tmp_path):
    model = BinaryFormerForSemanticSegmentation(tiny(attention_type="sign", bit_gradient="ternary")).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 1, 32, 32)
    expected = outputs(model, x)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BinaryFormerConfig)
    assert torch.equal(outputs(from_pretrained(tmp_path), x), expected)
    assert torch.equal(outputs(AutoModelForSemanticSegmentation.from_pretrained(tmp_path), x), expected)
    config = tiny()
    assert isinstance(AutoModel.from_config(config), BinaryFormerModel)
    assert isinstance(AutoModelForImageClassification.from_config(config), BinaryFormerForImageClassification)


def test_half_precision_file_computes_in_float32(tmp_path):
    model = BinaryFormerForSemanticSegmentation(tiny())
    model.save_pretrained(tmp_path, state_dict={k: t.half() for k, t in model.state_dict().items()})
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert from_pretrained(tmp_path).dtype == torch.float32


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory) -> Path:
    """A file in timm's own layout, every tensor random (norms and biases too)."""
    vit = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(t.shape, generator=generator) * 0.02 for k, t in vit.state_dict().items()}
    path = tmp_path_factory.mktemp("timm") / "dino.safetensors"
    save_file(state, path)
    return path


def test_from_timm_keeps_what_the_paper_keeps_tensor_by_tensor(dino_file):
    torch.manual_seed(1)
    model = BinaryFormerForSemanticSegmentation.from_timm(
        "vit_small_patch8_224.dino", checkpoint=dino_file, image_size=64, num_labels=3
    )
    source, mine = load_file(dino_file), model.binaryformer.encoder.state_dict()
    assert model.config.layer_norm_eps == 1e-6 and model.config.patch_size == 8
    kept = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    kept |= {f"blocks.{b}.{n}.{p}" for b in range(12) for n in ("norm1", "norm2") for p in ("weight", "bias")}
    kept |= {f"blocks.{b}.mlp.{n}.{p}" for b in range(4) for n in ("fc1", "fc2") for p in ("weight", "bias")}
    for key, tensor in mine.items():
        if key == "pos_embed":
            table = resample_abs_pos_embed(source[key], [8, 8], [28, 28], num_prefix_tokens=1)
            torch.testing.assert_close(tensor, table, rtol=0, atol=1e-6)
        elif key in kept:
            assert torch.equal(tensor, source[key]), key
        else:
            assert key.split(".")[2] in ("attn", "mlp"), key
            assert key not in source or tensor.shape != source[key].shape or not torch.equal(tensor, source[key]), key
    attention = model.binaryformer.encoder.blocks[0].attn
    assert attention.qkv.weight.shape == (2 * 384 + 6 * 16, 384)
    # New weights are at their start, not copies: standard deviation .02, zero bias.
    assert attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not attention.qkv.bias.any()


def test_from_timm_takes_one_channel_and_random_weights(dino_file):
    model = BinaryFormerForSemanticSegmentation.from_timm(
        "vit_small_patch8_224.dino", checkpoint=dino_file, image_size=64, num_channels=1, num_labels=3
    )
    weight = load_file(dino_file)["patch_embed.proj.weight"]
    torch.testing.assert_close(model.binaryformer.encoder.patch_embed.proj.weight, weight.sum(1, keepdim=True))
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        BinaryFormerForSemanticSegmentation.from_timm("vit_small_patch8_224.dino", checkpoint="dino.pth")


@pytest.mark.parametrize("bit_gradient", [None, "ternary"])
def test_gradient_checkpointing_gives_the_same_gradients(bit_gradient):
    torch.manual_seed(0)
    model = BinaryFormerForSemanticSegmentation(tiny(attention_type="sign", bit_gradient=bit_gradient)).train()
    x, labels = torch.randn(2, 1, 32, 32), torch.randint(0, 4, (2, 32, 32))
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model.zero_grad()
        model(x, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_shared_attention_is_one_module_and_is_saved_once(tmp_path):
    shared, apart = (BinaryFormerModel(tiny(share_attention=flag)) for flag in (True, False))
    assert len({id(a) for a in attention_modules(shared)}) == 1
    one = attention_modules(apart)[0]
    assert count(apart) - count(shared) == count(one)
    shared.save_pretrained(tmp_path)
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(outputs(BinaryFormerModel.from_pretrained(tmp_path), x), outputs(shared, x))


def test_pixel_tokens_are_values_and_coordinates():
    config = tiny(token_type="pixel", image_size=[4, 6], num_channels=3, class_token=False, pooling="max")
    model = BinaryFormerForImageClassification(config).eval()
    x = torch.randn(1, 3, 4, 6)
    weight, bias = (p.detach() for p in model.binaryformer.encoder.patch_embed.proj.parameters())
    row, column = 2, 5
    token = torch.cat([x[0, :, row, column], torch.tensor([-1 + 2 * row / 3, 1.0])])
    embedded = model.binaryformer.encoder.patch_embed(x)
    torch.testing.assert_close(embedded[0, row * 6 + column], weight @ token + bias)
    tokens = outputs(model.binaryformer, x)
    assert tokens.shape == (1, 24, 48)
    torch.testing.assert_close(outputs(model, x), model.classifier(tokens.amax(1)))


def test_other_image_sizes_are_taken():
    model = BinaryFormerForSemanticSegmentation(tiny())
    assert outputs(model, torch.randn(1, 1, 48, 24)).shape == (1, 4, 48, 24)


def test_loss_ignores_255():
    model = BinaryFormerForSemanticSegmentation(tiny(attention_type="softmax")).eval()
    x, labels = torch.randn(1, 1, 32, 32), torch.randint(0, 4, (1, 32, 32))
    labels[:, :16] = 255
    out = model(x, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, :, 16:], labels[:, 16:])
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 50}, "hidden_size 50 must be divisible by num_heads 3"),
        ({"image_size": 30}, "image_size 30 must be a multiple of patch_size 8"),
        ({"attention_type": "softmax", "bit_gradient": "ternary"}, "does not fit attention_type 'softmax'"),
        ({"weight_activation": "bounded", "weight_bias_init": 3.0}, "must lie between 0 and weight_max"),
        ({"pooling": "cls", "class_token": False}, "needs class_token=True"),
        ({"attention_type": "cosine"}, "attention_type"),
    ],
)
def test_configuration_names_what_does_not_fit(fields, message):
    with pytest.raises(Exception, match=message):
        tiny(**fields)


def test_input_errors_say_what_was_expected():
    model = BinaryFormerForSemanticSegmentation(tiny())
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\)"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model(torch.zeros(1, 1, 30, 32))
    with pytest.raises(ValueError, match="masks are not supported"):
        BinaryAttention(48, 3, config=tiny())(torch.zeros(1, 4, 48), is_causal=True)


class TestBadCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        BinaryFormerForSemanticSegmentation(tiny()).save_pretrained(tmp_path)
        return tmp_path

    def test_unknown_name_says_what_was_tried(self, monkeypatch):
        monkeypatch.setenv("HF_BINARYFORMER_NAMESPACE", "somebody")
        with pytest.raises(CheckpointNotFoundError, match=r"somebody/nothing-here.*Known names") as error:
            from_pretrained("nothing-here")
        assert "folder" in str(error.value)

    def test_an_unfinished_training_is_told(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(CheckpointNotFoundError, match="is not finished. Go on with --resume"):
            from_pretrained(tmp_path / "model")

    def test_known_name_says_how_to_train_it(self, monkeypatch):
        monkeypatch.setattr("hf_binaryformer.modeling.pretrained.PACKAGED", Path("/nonexistent"))
        with pytest.raises(CheckpointNotFoundError, match="Train it with: accelerate launch"):
            from_pretrained("binaryformer-tiny-brain")

    def test_pickle_is_refused(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"no \.safetensors file \(only pytorch_model.bin\)"):
            from_pretrained(folder)

    def test_truncated_file(self, folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match="cannot be used"):
            from_pretrained(folder)

    def test_missing_tensor(self, folder):
        state = load_file(folder / "model.safetensors")
        state.pop("decoder.head.bias")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"missing keys: decoder\.head\.bias"):
            from_pretrained(folder)

    def test_other_size_than_configured(self, folder):
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"decoder_hidden_size": 64', '"decoder_hidden_size": 128'))
        with pytest.raises(CheckpointError):
            from_pretrained(folder)

    def test_foreign_model(self, folder):
        config = folder / "config.json"
        config.write_text(config.read_text().replace("BinaryFormerForSemanticSegmentation", "BertModel"))
        with pytest.raises(CheckpointError, match="holds a 'BertModel'"):
            from_pretrained(folder)


def test_learned_scales_are_saved(tmp_path):
    model = BinaryFormerModel(tiny(attention_type="sign", learned_logit_scale=True))
    with torch.no_grad():
        for attention in attention_modules(model):
            attention.log_scale.normal_()
    x = torch.randn(1, 1, 32, 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(BinaryFormerModel.from_pretrained(tmp_path), x), outputs(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [UnshuffleBlock(8, 1.5), ShuffleBlock(8)], ids=["unshuffle", "shuffle"])
def test_shuffle_blocks_are_their_formula(block, dtype):
    """The blocks as the paper draws them: shuffle, two 1x1 convolutions, and back; gradients too."""
    block = copy.deepcopy(block).to(dtype)
    there, back = (
        (F.pixel_unshuffle, F.pixel_shuffle)
        if isinstance(block, UnshuffleBlock)
        else (F.pixel_shuffle, F.pixel_unshuffle)
    )
    x, dy = torch.randn(2, 2, 8, 6, 4, dtype=dtype)
    inner = block.norm(x) if isinstance(block, UnshuffleBlock) else x
    wanted = x + back(block.fc2(F.gelu(block.fc1(there(inner, 2)))), 2)
    gradients = torch.autograd.grad(wanted, block.parameters(), dy)
    for given in (x, x.to(memory_format=torch.channels_last)):
        found = block(given)
        torch.testing.assert_close(found, wanted)
        for mine, gradient in zip(torch.autograd.grad(found, block.parameters(), dy), gradients, strict=True):
            torch.testing.assert_close(mine, gradient)

"""`binarize_attention` for all kinds of attention in timm and transformers: what is kept, computed and learned."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import transformers
from binarize_cases import (
    HUGGING_MODELS,
    MODELS,
    TIMM,
    binary_modules,
    config,
    eva,
    hugging,
    named,
    observed,
    plain_attention,
    random_model,
    run,
)
from timm.models.beit import Beit
from torch import nn

from hf_binaryformer.modeling.attention import attention_modules
from hf_binaryformer.modeling.binarize import binarize_attention

each_model = pytest.mark.parametrize("name", MODELS)
each_of_transformers = pytest.mark.parametrize("name", [f"transformers {name}" for name in HUGGING_MODELS])


@each_model
def test_all_parameters_are_kept(name):
    model = random_model(name)
    before, values = dict(model.named_parameters()), {k: t.clone() for k, t in model.state_dict().items()}
    assert binarize_attention(model, config()) is model
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert all(torch.equal(t, values[key]) for key, t in model.state_dict().items())
    assert len(attention_modules(model)) == 2


@each_model
def test_the_softmax_form_changes_nothing(name):
    model = random_model(name)
    expected = run(model)
    binarize_attention(model, config(attention_type="softmax", bit_gradient=None))
    torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)


@each_model
def test_each_layer_is_softmax_of_products_of_signs(name):
    model = random_model(name)
    before = run(model)
    binarize_attention(model, config())
    seen = observed(model)
    assert len(seen) == 2
    for place, (args, options, out) in seen.items():
        found = out[0] if isinstance(out, tuple) else out
        expected = plain_attention(binary_modules(model)[place], args, options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run(model), before, rtol=1e-2)


@each_model
@pytest.mark.parametrize("form", ["sign", "hamming"])
def test_gradients_reach_queries_and_keys(name, form):
    model = random_model(name)
    binarize_attention(model, config(attention_type=form, bit_gradient="ste" if form == "sign" else None))
    run(model).square().sum().backward()
    for place, module in binary_modules(model).items():
        if getattr(module, "qkv", None) is not None:
            width = module.qkv.weight.shape[0] // 3
            gradients = module.qkv.weight.grad.split(width)
        else:
            names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
            gradients = [getattr(module, one).weight.grad for one in names]
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients), place


@each_model
def test_state_dict_round_trip(name):
    learned = config(attention_type="hamming", bit_gradient=None, learned_logit_scale=True)
    model, other = (binarize_attention(random_model(name), learned) for _ in range(2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert not torch.equal(run(model), run(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(model), run(other))


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_mode_type_and_frozen_parameters(name, training):
    learned = config(attention_type="hamming", bit_gradient=None)
    model = binarize_attention(random_model(name).train(training).requires_grad_(False), learned)
    assert {module.training for module in model.modules()} == {training}
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@each_model
def test_two_copies_do_not_share(name):
    """A copy made before or after the conversion goes on by itself."""
    model = random_model(name)
    softmax, expected = copy.deepcopy(model), run(model)
    binarize_attention(model, config())
    twin, found = copy.deepcopy(model), run(model)
    assert torch.equal(run(softmax), expected) and torch.equal(run(twin), found)
    for module in attention_modules(twin):
        module.config.attention_type = "softmax"
    assert torch.equal(run(model), found)


@each_model
def test_hooks_and_shared_attention_stay(name):
    model, calls = random_model(name), []
    first, second = (dict(model.named_modules())[place] for place in places(name))
    parent, _, child = places(name)[1].rpartition(".")
    setattr(model.get_submodule(parent), child, first)
    handle = first.register_forward_hook(lambda *_: calls.append(1))
    binarize_attention(model, config())
    run(model)
    handle.remove()
    run(model)
    assert len(calls) == 2 and second is not first
    assert len(binary_modules(model)) == 1 and len(attention_modules(model)) == 1


def places(name: str) -> list[str]:
    """Names of a model's two attentions."""
    return list(binary_modules(binarize_attention(random_model(name), config())))


@each_of_transformers
def test_the_setting_of_the_whole_model_does_not_undo_it(name):
    model = binarize_attention(random_model(name), config())
    expected = run(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert torch.equal(run(model), expected)
        assert model.config._attn_implementation == implementation


@each_of_transformers
def test_probabilities_are_refused(name):
    model = binarize_attention(random_model(name), config())
    with pytest.raises(ValueError, match="keeps no probabilities"):
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64), output_attentions=True)


@each_of_transformers
def test_saved_weights_load_into_the_original_class(name, tmp_path):
    """The form is not saved: converting what was loaded restores it."""
    model = binarize_attention(random_model(name), config())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).double()
    assert not attention_modules(loaded)
    torch.testing.assert_close(run(binarize_attention(loaded, config())), run(model), rtol=1e-9, atol=1e-9)


def test_it_compiles():
    for name in ("transformers dinov3", "timm eva02"):
        model = binarize_attention(random_model(name), config())
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(compiled), run(model))


REFUSED = {
    "relpos": (named("vit_relpos_small_patch16_224", img_size=32), r"blocks\.0\.attn \(RelPosAttention\) adds a bias"),
    "relpos shared": (
        named("vit_srelpos_small_patch16_224", img_size=32),
        r"shared_rel_pos \(RelPosMlp\) adds a bias",
    ),
    "timm beit": (
        named("beit_base_patch16_224", img_size=32),
        r"blocks\.0\.attn\.relative_position_bias_table adds a bias.*use_rel_pos_bias=False",
    ),
    "timm beit shared": (
        lambda: Beit(**TIMM, use_shared_rel_pos_bias=True),
        r"rel_pos_bias \(RelativePositionBias\) adds a bias",
    ),
    "transformers beit": (
        hugging("Beit", use_relative_position_bias=True),
        r"layer.*0.*config\.use_relative_position_bias adds a bias",
    ),
    "transformers beit shared": (
        hugging("Beit", use_shared_relative_position_bias=True),
        r"config\.use_shared_relative_position_bias adds a bias",
    ),
    "timm swin": (
        lambda: small_swin(),
        r"holds no attention.*layers\.0\.blocks\.0\.attn \(WindowAttention\)",
    ),
    "transformers bert": (
        lambda: transformers.BertModel(
            transformers.BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24)
        ),
        r"holds no attention.*encoder\.layer\.0\.attention \(BertAttention\)",
    ),
    "probability dropout": (eva(attn_drop_rate=0.1), r"blocks\.0\.attn cannot be converted: attn_drop is 0\.1"),
    "probability dropout of transformers": (
        hugging("ViT", attention_probs_dropout_prob=0.1),
        r"cannot be converted: attn_drop is 0\.1",
    ),
}


def small_swin() -> nn.Module:
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, pretrained=False, img_size=56, embed_dim=24, depths=(1, 1, 1, 1))


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_parts_without_a_1_bit_form_are_named(build, message):
    model = build().eval()
    classes = {key: type(module) for key, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        binarize_attention(model, config())
    assert {key: type(module) for key, module in model.named_modules()} == classes


@pytest.mark.parametrize("name", ["timm eva02", "timm beit absolute", "transformers vit", "transformers dinov3"])
@pytest.mark.parametrize("field", ["value_head_dim", "query_key_head_dim"])
def test_other_numbers_of_channels_are_refused(name, field):
    model = random_model(name)
    with pytest.raises(ValueError, match=rf"{field} is 8, its projections have 16 channels.*set {field}=None"):
        binarize_attention(model, config(**{field: 8}))
    assert not attention_modules(model)


@pytest.mark.parametrize("name", ["timm eva02", "timm beit absolute", "transformers vit", "timm vit registers"])
def test_a_second_conversion_is_refused(name):
    model = binarize_attention(random_model(name), config())
    expected = run(model)
    with pytest.raises(ValueError, match="already|forward of its own|holds no attention"):
        binarize_attention(model, config())
    assert torch.equal(run(model), expected)


def test_masks_are_refused_by_name():
    x = torch.randn(1, 5, 48, dtype=torch.float64)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    for name, options, message in (
        ("timm eva02", {"attn_mask": mask}, "masks are not supported"),
        ("timm eva02", {"is_causal": True}, "masks are not supported"),
        ("timm beit absolute", {"shared_rel_pos_bias": mask.double()}, "shared_rel_pos_bias adds a bias"),
        ("transformers vit", {"attention_mask": mask}, "masks are not supported"),
    ):
        module = next(iter(binary_modules(binarize_attention(random_model(name), config())).values()))
        with pytest.raises(ValueError, match=message):
            module(x, **options)


@pytest.mark.parametrize("name", ["timm eva02", "transformers vit"])
def test_a_forward_of_its_own_is_refused(name):
    model, place = random_model(name), places(name)[1]
    module = model.get_submodule(place)
    module.forward = lambda *args, **options: args[0]
    with pytest.raises(ValueError, match=rf"{re.escape(place)}.*forward of its own"):
        binarize_attention(model, config())
    assert not attention_modules(model)

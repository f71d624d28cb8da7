"""The Triton backend without a GPU: its numbers in the interpreter, and what its kernels compile to for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "scripts" / "benchmarks"))
import assembly  # noqa: E402
import hf_binaryformer  # noqa: E402
from hf_binaryformer.kernels import triton_draws, triton_kernels  # noqa: E402
from hf_binaryformer.kernels.triton_tiles import Sizes, Tiles  # noqa: E402

# Of the backward pass that learns bits, and of the paper's own, which learns by weights.
GRADIENTS = [("attend", "none"), ("backward_of_keys", "ternary"), ("backward_of_queries", "ternary")]
MORE = [("backward_of_keys", "none"), ("backward_of_keys", "ste"), ("backward_of_queries", "ste")]


# Tests of triton_interpreted.py, in groups of about equal length.
DRAWS, OTHERS = "draws or ternary or not_a_number", "balance or key_mask or test_accuracy"
PARTS = {
    "accuracy": "test_accuracy and not halves",
    "halves": "halves",
    "draws": DRAWS,
    "balance": "balance",
    "mask": "key_mask",
    "rest": f"not ({DRAWS} or {OTHERS} or halves)",
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_interpreted(part) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(hf_binaryformer.__file__).parents[1])}
    words = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part]
    words.append(str(FOLDER / "triton_interpreted.py"))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def check_build(
    target: str,
    kernel: str,
    gradient: str,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    masked: bool = False,
    weight_gradient: bool = True,
) -> None:
    one = assembly.TARGETS[target]
    sizes = Sizes(head_dim, value_dim, 1, dtype, gradient, weight_gradient, one.unit)
    built = assembly.build(kernel, sizes, one, masked=masked)
    for pattern in one.products if dtype != torch.float32 else one.products[:1]:
        assert re.search(pattern, built.text), f"no {pattern} in {kernel} for {target}"
    assert built.shared <= one.shared
    assert built.spilled == 0, f"{kernel} for {target} spills {built.spilled} bytes at {built.tiles}"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("kernel", "gradient"), GRADIENTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_builds_on_matrix_units_without_spills(target, kernel, gradient) -> None:
    check_build(target, kernel, gradient, 64, 16, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("kernel", "gradient"), GRADIENTS)
def test_builds_with_a_key_mask(kernel, gradient) -> None:
    check_build("sm_90", kernel, gradient, 64, 16, torch.bfloat16, masked=True)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kernel", ["sum_tokens", "balance_rows", "balance_gradient"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 24, 512])
def test_balance_builds_without_spills(target, kernel, head_dim) -> None:
    built = assembly.build_balance(kernel, head_dim, torch.bfloat16, assembly.TARGETS[target])
    assert built.spilled == 0, f"{kernel} for {target} spills {built.spilled} bytes"
    assert built.shared <= assembly.TARGETS[target].shared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("kernel", "gradient"), GRADIENTS + MORE)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 16), (64, 64), (128, 64), (24, 8)])
@pytest.mark.parametrize("target", assembly.TARGETS)
def test_builds_everywhere(target, head_dim, value_dim, kernel, gradient) -> None:
    check_build(target, kernel, gradient, head_dim, value_dim, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("kernel", "gradient"), GRADIENTS)
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "planes", "dtype"),
    [
        (512, 256, 1, torch.bfloat16),
        (128, 128, 1, torch.bfloat16),
        (64, 16, 1, torch.float32),
        (64, 16, 1, torch.float16),
        (64, 16, 2, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_all_that_is_served_finds_shared_memory(target, head_dim, value_dim, planes, dtype, kernel, gradient) -> None:
    """Sizes that are not tuned may spill registers, but must run."""
    one = assembly.TARGETS[target]
    sizes = Sizes(head_dim, value_dim, planes, dtype, gradient if planes == 1 else "none", True, one.unit)
    assert assembly.build(kernel, sizes, one).shared <= one.shared


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kernel", ["backward_of_keys", "backward_of_queries"])
def test_builds_without_gradients_of_weights(kernel) -> None:
    """What sign bits without learned weights take."""
    check_build("sm_90", kernel, "ternary", 64, 16, torch.bfloat16, weight_gradient=False)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_packing_and_hashing_build(target) -> None:
    expand = {"WORDS": 1, "HEAD_DIM": 64, "D": 64, "R": 64}
    pack = {"HEAD_DIM": 100, "WORDS": 2, "R": 32}
    for function, constants in (
        (triton_kernels.expand_signs, expand),
        (triton_kernels.pack_signs, pack),
        (triton_draws.hash_rows, {"SEED_ON_DEVICE": False, "R": 256}),
    ):
        tiles = Tiles(0, 0, 4, 1)
        built = assembly.compile_for(
            assembly.TARGETS[target], function, torch.bfloat16, constants, {"num_warps": 4}, tiles
        )
        assert built.spilled == 0, function

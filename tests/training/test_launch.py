"""The launch files of Accelerate, as far as two CPU processes can go; weights that are split over processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import toys
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from hf_binaryformer.training import loop
from hf_binaryformer.training.recipes import load_recipe
from hf_binaryformer.training.run_log import read_log

ROOT = Path(__file__).parents[2]
LAUNCH = sorted((ROOT / "scripts" / "launch").glob("*.yaml"))
SPLIT = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
import hf_binaryformer as bf
from hf_binaryformer.training.loop import gather

dist.init_process_group("gloo")
torch.manual_seed(0)
config = bf.BinaryFormerConfig(
    image_size=[16, 16], hidden_size=24, num_heads=2, num_hidden_layers=2, value_head_dim=4, attention_type="softmax"
)
network = bf.BinaryFormerForImageClassification(config)
whole = copy.deepcopy(network)
for block in network.binaryformer.encoder.blocks:
    fully_shard(block)
fully_shard(network)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
mine = slice(dist.get_rank(), None, 2)
torch.nn.functional.cross_entropy(network(x[mine]).logits, y[mine]).backward()
optimizer.step()
gathered = gather(network, copy.deepcopy(whole))
if dist.get_rank() == 0:
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(whole(x).logits, y).backward()
    optimizer.step()
    for (name, a), (_, b) in zip(gathered.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    gathered(x)
    print("equal")
dist.destroy_process_group()
# PyTorch's own threads of split weights on a CPU can abort a process at its exit.
sys.stdout.flush()
os._exit(0)
"""


def environment() -> dict[str, str]:
    path = str(ROOT)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(file: Path, output: Path, recipe: Path, data: Path, *options: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(file),
        *options,
    ]
    command += [str(ROOT / "scripts" / "finetune.py"), "--recipe", str(recipe), "--data", str(data)]
    command += ["--output", str(output), "--evaluate", "none"]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check(output: Path, *launched: subprocess.Popen) -> None:
    """All ended well, and both processes took part."""
    for process in launched:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    records = read_log(output / "log.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and {r["processes"] for r in records} == {2}
    assert (output / "model" / "model.safetensors").is_file()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("toy")
    return toys.write_segmentation_recipe(folder / "toy.yaml"), toys.write_segmentation_data(folder)


@pytest.mark.parametrize("path", LAUNCH, ids=lambda p: p.stem)
def test_launch_files_hold_nothing_that_accelerate_does_not_know(path):
    words = yaml.safe_load(path.read_text())
    known = load_config_from_file(str(path)).to_dict()
    assert {key: known[key] for key in words} == words
    assert words["mixed_precision"] == "no"
    options = {word for action in launch_command_parser()._actions for word in action.option_strings}
    assert {f"--{key}" for key in words.get("fsdp_config", {})} <= options


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp"])
def test_files_for_gpus_start_two_processes(name, toy, tmp_path):
    port = free_port()
    options = ("--num_processes", "2", "--main_process_port", port)
    check(tmp_path, launch(ROOT / f"scripts/launch/{name}.yaml", tmp_path, *toy, *options))


@pytest.mark.slow
def test_two_machines_meet(toy, tmp_path):
    port = free_port()
    options = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    file = ROOT / "scripts/launch/multi_node.yaml"
    both = [launch(file, tmp_path, *toy, *options, "--machine_rank", str(rank)) for rank in range(2)]
    check(tmp_path, *both)


@pytest.mark.slow
def test_split_weights_are_gathered_whole(tmp_path):
    """A step of two processes with split weights is one process's step with twice the batch."""
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]


def test_split_weights_refuse_what_needs_them_whole(toy, tmp_path, monkeypatch):
    from accelerate.utils import DistributedType

    class Split:
        def __init__(self, **_: object) -> None:
            self.distributed_type, self.num_processes = DistributedType.FSDP, 2

    monkeypatch.setattr(loop, "Accelerator", Split)
    train = load_recipe(str(toy[0]), [])["train"]
    for change in ({"ema_decay": 0.9}, {"validate_every": 3}, {"freeze_query_key": True}):
        with pytest.raises(loop.typer.BadParameter, match="no process has all weights"):
            loop.start(train | change, tmp_path)
    assert loop.start(train, tmp_path).num_processes == 2

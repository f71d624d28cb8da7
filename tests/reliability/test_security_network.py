"""No command opens a connection unless a name on the Hub was asked for.

Each runs in a process of its own, whose audit hook notes and refuses every look-up of a name, connection and address to
listen at, in it and in the Python processes that it starts. Connections that compiled code makes without Python are not seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toys

import hf_binaryformer as bf
from jobs import head, save, save_network, set_up_inpaint, set_up_prepare, set_up_unpack

# Where the package that is tested was found; processes of their own have to find the same one.
ROOT = Path(bf.__file__).parents[1]
HOOK = """
import os, socket, sys

EVENTS = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"}
EVENTS |= {"socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}


def refuse(event, arguments):
    if event not in EVENTS:
        return
    # Processes of one machine talk through files, which are no connections. urllib3 asks, when it is imported, whether the
    # machine has IPv6: it takes a port of the machine's own, and gives it back without listening.
    local = getattr(arguments[0], "family", None) == getattr(socket, "AF_UNIX", -1) or arguments[1:] == (("::1", 0),)
    if not (local and event in ("socket.connect", "socket.bind", "socket.sendmsg")):
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{event} {arguments[1:] or arguments}\\n")
        raise PermissionError(f"{event} {arguments}")


sys.addaudithook(refuse)
"""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
RESULT = "out/result"


def run(folder: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A Python program under the hook, in an account of its own, and the connections that it tried."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(HOOK)
    noted = folder / "connections"
    noted.write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    environment |= {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "CONNECTIONS": str(noted)}
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True)
    return done, noted.read_text()


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=1)", "socket."),
        ("import socket; socket.create_connection(('localhost', 9), timeout=1)", "socket.getaddrinfo"),
        ("import socket; socket.socket().bind(('127.0.0.1', 0))", "socket.bind"),
        ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'a', ('192.0.2.1', 9))", "socket.sendto"),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', \"import socket; socket.gethostbyname('a')\"])",
            "byname",
        ),
        ("import huggingface_hub as h; h.snapshot_download('somebody/something')", "socket."),
        ("import socket; a, b = socket.socketpair(); a.sendmsg([b'a'])", ""),
    ],
)
def test_the_hook_sees_connections(code, seen, tmp_path):
    done, connections = run(tmp_path, "-c", f"try:\n    {code}\nexcept OSError as error:\n    print(error)")
    assert seen in connections and bool(connections) == bool(seen), (connections, done.stderr)


@pytest.mark.slow
def test_a_name_on_the_hub_is_the_only_reason(tmp_path):
    done, connections = run(tmp_path, "-m", "hf_binaryformer", "synthesize", "-o", "a.nii.gz", "--model", "some/thing")
    assert connections and done.returncode == 1 and "error: no checkpoint 'some/thing'" in done.stderr


def inputs(folder: Path) -> None:
    """What the commands need."""
    set_up_inpaint(folder)
    set_up_prepare(folder / "decathlon")
    set_up_unpack(folder)
    save(head(), folder / "head.nii.gz")
    save((head() > 60).astype(np.uint8), folder / "labels.nii.gz")
    save_network(folder / "segmenter")
    for name, write in (
        ("balls", toys.write_segmentation_data),
        ("volumes", toys.write_balls),
        ("tokens", toys.write_tokens),
        ("pixels", toys.write_pixels),
    ):
        (folder / name).mkdir()
        write(folder / name)
    toys.write_segmentation_recipe(folder / "segmentation.yaml")
    toys.write_autoencoder_recipe(folder / "autoencoder.yaml")
    toys.write_sampler_recipe(folder / "sampler.yaml")
    toys.write_pixel_recipe(folder / "pixels.yaml")
    toys.write_autoencoder(folder / "vqmodel")
    (folder / "out").mkdir()


BINARYFORMER = ("-m", "hf_binaryformer")
TRAIN = (*BINARYFORMER, "train", "--output", RESULT, "--recipe")
COMMANDS = {
    "info": (*BINARYFORMER, "info"),
    "segment": (*BINARYFORMER, "segment", "head.nii.gz", "-o", f"{RESULT}.nii.gz", "--model", "segmenter"),
    "segment, packaged": (*BINARYFORMER, "segment", "head.nii.gz", "-o", f"{RESULT}.nii.gz", "--overlay", "o.png"),
    "inpaint": (
        *BINARYFORMER,
        "inpaint",
        "in.nii.gz",
        "--mask",
        "hole.nii.gz",
        "-o",
        f"{RESULT}.nii.gz",
        "--model",
        "network",
    ),
    "synthesize": (*BINARYFORMER, "synthesize", "-o", f"{RESULT}.nii.gz", "--model", "network", "--steps", "3"),
    "evaluate": (
        *BINARYFORMER,
        "evaluate",
        "--pred",
        "labels.nii.gz",
        "--truth",
        "labels.nii.gz",
        "--report",
        f"{RESULT}.json",
    ),
    "prepare": (
        *(*BINARYFORMER, "prepare", "hippocampus", "--source", "decathlon", "--out", RESULT),
        *("--group-rule", "none", "--test-fraction", "0.3", "--validation-fraction", "0.3"),
    ),
    "prepare shards": (*BINARYFORMER, "prepare", "shards", "--source", "packed/shards", "--out", RESULT),
    "prepare check-leakage": (*BINARYFORMER, "prepare", "check-leakage", "packed"),
    "train segmentation": (*TRAIN, "segmentation.yaml", "--data", "balls"),
    "train classification": (*TRAIN, "pixels.yaml", "--data", "pixels"),
    "train autoencoder": (*TRAIN, "autoencoder.yaml", "--training", "autoencoder", "--data", "volumes"),
    "train sampler": (*TRAIN, "sampler.yaml", "--training", "sampler", "--tokens", "tokens", "--vqmodel", "vqmodel"),
    "from_pretrained": (
        "-c",
        "import hf_binaryformer as bf\nfor name in ('segmenter', 'network'): bf.from_pretrained(name)",
    ),
}


def check(folder: Path, name: str) -> None:
    done, connections = run(folder, *COMMANDS[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert connections == ""
    if any(RESULT in word for word in COMMANDS[name]):
        assert any((folder / "out").iterdir())


def test_segmenting_opens_no_connection(tmp_path):
    save(head(), tmp_path / "head.nii.gz")
    save_network(tmp_path / "segmenter")
    (tmp_path / "out").mkdir()
    check(tmp_path, "segment")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ready")
    inputs(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_opens_a_connection(name, ready, tmp_path):
    check(Path(shutil.copytree(ready, tmp_path / "copy")), name)

"""The command line: what it writes, what it says, what it refuses, and that nothing half-done stays behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from hf_binaryformer import cli
from hf_binaryformer.commands import jobs
from hf_binaryformer.kernels import available_backends
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation

NAMES = {0: "background", 1: "core", 2: "[shell]", 3: "rest"}


def run(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


def error_line(result: Result) -> str:
    """The only line on stderr of a command that failed as it should."""
    assert result.exit_code == 1, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.strip())
    assert line.startswith("error: ") and "Traceback" not in result.output
    return line


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights of the real classes, small enough to run in a moment."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-random"
    torch.manual_seed(0)
    config = BinaryFormerConfig(
        image_size=32,
        num_channels=3,
        hidden_size=48,
        num_heads=3,
        value_head_dim=4,
        num_hidden_layers=1,
        decoder_hidden_size=64,
        attention_type="sign",
        id2label=NAMES,
    )
    BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    processor = BinaryFormerImageProcessor(
        num_slices=3, slice_axis=1, spacing=(2, 2, 2), image_size=(32, 32), mirror=False
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def scan(tmp_path) -> Path:
    """A blurred ellipsoid on an oblique, anisotropic grid in L-I-A order, with codes of its own."""
    folder = tmp_path / "scans"
    folder.mkdir()
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (30, 24, 20)), indexing="ij")
    array = (1000 * np.exp(-2 * sum(a**2 for a in axes))).astype(np.int16)
    turn = np.array([[np.cos(0.1), -np.sin(0.1), 0], [np.sin(0.1), np.cos(0.1), 0], [0, 0, 1]])
    affine = np.eye(4)
    # Axis i runs to the left, j down, k to the front.
    affine[:3, :3] = turn @ np.array([[-1.5, 0, 0], [0, 0, 2.0], [0, -1.7, 0]])
    affine[:3, 3] = 20, -15, 18
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=4)
    nib.save(image, folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_help_is_light():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_binaryformer.cli import app\n"
        "for command in ([], ['segment'], ['evaluate'], ['info'], ['demo']):\n"
        "    assert CliRunner().invoke(app, [*command, '--help']).exit_code == 0\n"
        "print({'torch', 'timm', 'transformers', 'monai', 'nibabel', 'nilearn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_python_dash_m():
    command = [sys.executable, "-m", "hf_binaryformer"]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in ("segment", "evaluate", "info", "demo"))
    assert subprocess.run([*command, "nonsense"], capture_output=True).returncode == 2


def test_segment_writes_everything(scan, out, checkpoint):
    before = scan.read_bytes()
    result = run(
        *("segment", scan, "-o", out / "labels.nii.gz", "--model", checkpoint, "--dtype", "bfloat16"),
        *("--overlay", out / "x.png", "--report", out / "x.json", "--probabilities", out / "p.nii.gz", "--mirror"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads((out / "x.json").read_text())["mirror"]
    assert scan.read_bytes() == before
    assert files_in(out) == {"labels.nii.gz", "x.png", "x.json", "p.nii.gz"}

    image, labels, probabilities = (nib.load(p) for p in (scan, out / "labels.nii.gz", out / "p.nii.gz"))
    for written in (labels, probabilities):
        assert written.shape[:3] == image.shape
        np.testing.assert_array_equal(written.affine, image.affine)
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 4)
    values, shares = np.asarray(labels.dataobj), np.asarray(probabilities.dataobj)
    assert values.dtype == np.uint8 and len(np.unique(values)) > 1
    assert shares.shape[3] == len(NAMES)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=4 / 255)
    # The most probable label is the label, up to the rounding of what is stored.
    np.testing.assert_allclose(
        np.take_along_axis(shares, values[..., None].astype(int), -1)[..., 0], shares.max(-1), atol=1.01 / 255
    )

    report = json.loads((out / "x.json").read_text())
    assert report["input"] == str(scan) and report["model"] == "tiny-random"
    fastest = "cpu" if "cpu" in available_backends() else "reference"
    assert (report["attention_type"], report["backend"], report["dtype"]) == ("sign", fastest, "bfloat16")
    # RAS order: the file's own axes run left, down, forward.
    assert report["shape"] == [30, 20, 24]
    assert report["spacing_mm"] == pytest.approx([1.5, 2.0, 1.7], rel=1e-5)
    assert report["seconds"] > 0 and "torch" in report["versions"]
    assert "not for clinical use" in report["notice"]
    voxel_ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    for row in report["labels"]:
        assert row["name"] == NAMES[row["label"]]
        assert row["volume_ml"] == pytest.approx((values == row["label"]).sum() * voxel_ml)
        if row["label"]:
            assert re.search(rf"{row['label']} +│ {re.escape(row['name'])} +│ +{row['volume_ml']:,.1f} ", result.stdout)
    with Image.open(out / "x.png") as picture:
        assert picture.format == "PNG" and picture.width <= 1600


def test_progress_is_told(scan, out, checkpoint):
    told = []
    jobs.segment_file(scan, out / "x.nii.gz", model=str(checkpoint), progress=lambda *step: told.append(step))
    assert len(told) > 1 and told[-1][0] == told[-1][1] and told == sorted(told)


def test_formats_of_the_output(scan, out, checkpoint):
    pytest.importorskip("SimpleITK")
    for name in ("x.mha", "X.NII"):
        assert run("segment", scan, "-o", out / name, "--model", checkpoint).exit_code == 0
    assert files_in(out) == {"x.mha", "X.NII"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "OUT/missing/x.nii.gz"], r"folder '.*missing' .*does not exist: make it first"),
        (["-o", "SCAN/x.nii.gz"], "is not a folder"),
        (["-o", "OUT/x.png"], "'x.png'; expected an ending of .nii, .nii.gz"),
        (["-o", "SCAN"], "own input, which stays untouched"),
        (["-o", "OUT/x.nii", "--overlay", "OUT/x.jpg"], "'x.jpg'; expected an ending of .png"),
        (["-o", "OUT/x.nii", "--report", "OUT/no/x.json"], "'x.json' does not exist"),
        (["-o", "OUT/x.nii", "--report", "OUT/x.nii"], "asked for twice"),
        (["-o", "OUT/x.mha", "--probabilities", "OUT/p.mha"], "'p.mha'; expected an ending of .nii, .nii.gz"),
    ],
)
def test_unusable_output_is_told_before_the_work(scan, out, monkeypatch, options, message):
    monkeypatch.setattr("hf_binaryformer.pipelines.volumes.read_volume", lambda path: pytest.fail("work began"))
    before = scan.read_bytes()
    arguments = [o.replace("OUT", str(out)).replace("SCAN", str(scan)) for o in options]
    assert re.search(message, error_line(run("segment", scan, *arguments)))
    assert files_in(out) == set() and files_in(scan.parent) == {scan.name} and scan.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_unwritable_folder(scan):
    assert "folder '/proc' cannot be written to" in error_line(run("segment", scan, "-o", "/proc/x.nii.gz"))


def damaged(kind: str, folder: Path) -> Path:
    array = np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
    path = folder / f"{kind}.nii.gz"
    if kind == "missing":
        return path
    if kind == "text":
        path = folder / "text.docx"
        path.write_text("no volume")
        return path
    if kind == "nan":
        array[0, 0, 0] = np.nan
    if kind == "constant":
        array[:] = 3
    if kind == "series":
        array = np.stack([array, array], -1)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("text", "'.docx'"),
        ("nan", "1 NaN"),
        ("constant", "all 512 voxels are 3"),
        ("series", "2 volumes"),
        ("truncated", "truncated or damaged"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(kind, message, tmp_path, out, checkpoint):
    source = damaged(kind, tmp_path)
    result = run("segment", source, "-o", out / "x.nii.gz", "--report", out / "x.json", "--model", checkpoint)
    assert message in error_line(result) and str(source) in error_line(result)
    assert files_in(out) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "metal"], "'metal' is not available"),
        (["--backend", "no-such"], "'no-such' is not available"),
        (["--device", "no-such"], "device 'no-such' cannot be used here"),
        (["--model", "EMPTY"], "has no .safetensors file"),
    ],
)
def test_bad_options_are_one_line(scan, out, checkpoint, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    arguments = [o.replace("EMPTY", str(tmp_path / "empty")) for o in options]
    result = run("segment", scan, "-o", out / "x.nii.gz", "--model", checkpoint, *arguments)
    assert message in error_line(result)
    assert files_in(out) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment"],
        ["segment", "a.nii"],
        ["segment", "a.nii", "-o", "b.nii", "--dtype", "float8"],
        ["evaluate", "--pred", "a.nii"],
        ["evaluate", "--pred", "a.nii", "--truth", "b.nii", "--tolerance", "-1"],
        ["nonsense"],
    ],
)
def test_usage_errors_exit_with_2(arguments):
    assert run(*arguments).exit_code == 2


def test_failure_while_writing_leaves_the_old_results(scan, out, checkpoint, monkeypatch):
    (out / "x.nii.gz").write_text("old")
    (out / "x.json").write_text("old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_binaryformer.pipelines.overlay.label_overlay", fail)
    result = run(
        *("segment", scan, "-o", out / "x.nii.gz", "--model", checkpoint),
        *("--overlay", out / "x.png", "--report", out / "x.json"),
    )
    assert f"no space left for {out}" in error_line(result)
    assert files_in(out) == {"x.nii.gz", "x.json"}
    assert {path.read_text() for path in out.iterdir()} == {"old"}


def test_our_own_mistakes_keep_their_trace(scan, out, monkeypatch):
    for error in (KeyError("bug"), RuntimeError("bug")):
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "segment_file", lambda *a, **k: (_ for _ in ()).throw(error))  # noqa: B023
            assert run("segment", scan, "-o", out / "x.nii").exception is error
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    assert isinstance(run("segment", out / "none.nii", "-o", out / "x.nii").exception, ValueError)


# evaluate


def save_labels(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 2)) -> Path:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), np.diag([*spacing, 1])), path)
    return path


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A 4 x 4 x 4 cube predicted two slices (4 mm) too high, and a label 2 that only the truth has."""
    truth, pred = np.zeros((12, 12, 12)), np.zeros((12, 12, 12))
    truth[2:6, 2:6, 2:6] = 1
    pred[2:6, 2:6, 4:8] = 1
    truth[9:, 9:, 9:] = 2
    return save_labels(tmp_path / "pred" / "a.nii.gz", pred), save_labels(tmp_path / "truth" / "a.nii.gz", truth)


def test_evaluate_two_files(pair, out):
    (out / "names.json").write_text(json.dumps({"0": "background", "1": "cube", "2": "corner", "3": "none"}))
    pred, truth = pair
    result = run(
        *("evaluate", "--pred", pred, "--truth", truth, "--report", out / "r.json", "--tolerance", "3.9"),
        *("--labels", out / "names.json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((out / "r.json").read_text())
    cube, corner, none = report["labels"]
    assert (cube["name"], cube["dice"], cube["hd95"]) == ("cube", pytest.approx(2 * 32 / 128), pytest.approx(4.0))
    # Of the 56 surface voxels of each, only the 16 of the far face lie 4 mm from the other surface.
    assert cube["nsd"] == pytest.approx(40 / 56)
    assert (corner["dice"], corner["nsd"], corner["hd95"]) == (0, 0, None)
    assert [none[m] for m in ("dice", "nsd", "hd95")] == [None] * 3
    assert report["mean"]["dice"] == pytest.approx(0.25) and report["mean"]["hd95"] == pytest.approx(4.0)
    assert report["mean"]["nan"] == {"dice": 1, "nsd": 1, "hd95": 2}
    assert report["tolerance_mm"] == 3.9 and report["cases"][0]["case"] == "a.nii.gz"
    assert re.search(r"1 +│ cube +│ 0.500 │ +0.714 │ +4.00 │ 0/0/0", result.stdout)
    assert re.search(r"mean +│ 0.250 │ .* 1/1/2", result.stdout)
    assert "NSD 3.9 mm" in result.stdout


def test_evaluate_two_folders(pair, out):
    pred, truth = pair
    perfect = np.zeros((5, 5, 5))
    perfect[1:3, 1:3, 1:3] = 1
    for path in pair:
        save_labels(path.with_name("b.nii.gz"), perfect)
    result = run("evaluate", "--pred", pred.parent, "--truth", truth.parent, "--report", out / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((out / "r.json").read_text())
    assert [case["case"] for case in report["cases"]] == ["a.nii.gz", "b.nii.gz"]
    assert [row["dice"] for row in report["labels"]] == [pytest.approx(0.75), 0.0]
    assert "2 case(s)" in result.stdout


@pytest.mark.parametrize(
    "content",
    [
        {"1": "cube", "2": "corner"},
        {"label_names": {"0": "background", "1": "cube", "2": "corner"}, "cases": []},
        {"id2label": {"1": "cube", "2": "corner"}, "label2id": {"cube": 1}},
        {"labels": [{"label": 1, "name": "cube", "voxels": 3}, {"label": 2, "name": "corner", "voxels": 0}]},
    ],
)
def test_label_names_from_any_of_our_files(content, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(content))
    names = jobs.read_label_names(tmp_path / "names.json")
    assert (names[1], names[2]) == ("cube", "corner")


def test_evaluate_errors(pair, tmp_path, out):
    pred, truth = pair
    other = save_labels(tmp_path / "other.nii.gz", np.ones((12, 12, 13)))
    shifted = save_labels(tmp_path / "shifted.nii.gz", np.ones((12, 12, 12)), (1, 1, 1))
    (out / "names.json").write_text('{"1": "cube"}')
    (out / "bad.json").write_text("[3]")
    cases = [
        ((pred, other), [str(pred), str(other), "(12, 12, 12)", "(12, 12, 13)"]),
        ((pred, shifted), [str(pred), str(shifted), "grid"]),
        ((pred, tmp_path / "none.nii"), ["none.nii' does not exist"]),
        ((pred, truth.parent), ["two files or two folders"]),
        ((out, truth.parent), ["1 only in", "a.nii.gz"]),
        ((out, out), ["no volumes in"]),
        ((pred, truth, "--labels", out / "names.json"), ["label ids [2]"]),
        ((pred, truth, "--labels", out / "bad.json"), ["bad.json does not hold label names"]),
        ((pred, truth, "--report", out / "no" / "r.json"), ["does not exist: make it first"]),
    ]
    for (p, t, *options), messages in cases:
        line = error_line(run("evaluate", "--pred", p, "--truth", t, *options))
        assert all(message in line for message in messages), line
    assert files_in(out) == {"names.json", "bad.json"}


def test_info(checkpoint, monkeypatch):
    from hf_binaryformer.kernels import backend_report

    monkeypatch.setattr(pretrained, "PACKAGED", checkpoint.parent)
    result = run("info")
    assert result.exit_code == 0, result.output
    assert all(f"{name} " in result.stdout for name in ("python", "torch", "transformers", "timm", "monai", "nibabel"))
    assert torch.__version__.partition("+")[0] in result.stdout
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for name, state in backend_report().items():
        assert f"{name} {state}" in lines
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert f"tiny-random {size / 1e6:.2f} MB" in lines

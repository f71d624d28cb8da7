"""Notes on a result are told on stderr, so that no choice of a reader stays unseen."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from hf_binaryformer import cli
from hf_binaryformer.commands import display, generation_jobs, jobs

NOTE = "scan.nii.gz: sform and qform lie up to 7 mm apart; the sform is used [sic]"


@pytest.mark.parametrize(
    ("command", "module", "job"),
    [
        (["segment", "scan.nii.gz"], jobs, "segment_file"),
        (["inpaint", "scan.nii.gz", "--mask", "m.nii.gz"], generation_jobs, "inpaint_file"),
    ],
)
def test_notes_are_told_word_for_word(command, module, job, monkeypatch):
    content = {"notes": [NOTE], "labels": [], "model": "m", "seconds": 1.0, "samples": 1}
    content |= {"hole_ml": [1.0], "steps": 1, "generated": "g", "notice": "n"}
    monkeypatch.setattr(module, job, lambda *arguments, **options: content)
    result = CliRunner().invoke(cli.app, [*command, "-o", "out.nii.gz"])
    assert result.exit_code == 0, result.output
    assert f"note: {NOTE}" in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("expected", "said"), [(None, "quality 0.80 (how sure the network is, not how right)"), (0.7, "quality 0.80\n")]
)
def test_a_score_that_stands_for_no_dice_says_so(capsys, expected, said):
    report = {"model": "m", "seconds": 1.0, "labels": [], "intracranial_ml": None}
    display.show_volumes(report | {"quality": {"score": 0.8, "expected_dice": expected}})
    assert said in capsys.readouterr().out

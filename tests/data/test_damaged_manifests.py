"""A damaged manifest, or file of label names, gives one error that names it and says what to do.

Each case is one that `scripts/reliability/fuzz.py` found.
"""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
from typer.testing import CliRunner

from hf_binaryformer.commands.jobs import read_label_names
from hf_binaryformer.commands.prepare import app
from hf_binaryformer.data.prepared_folder import PreparedFolder

CASE = {"case": "a", "group": "p1", "split": "train", "image": "images/a.nii.gz", "label": "labels/a.nii.gz"}
MANIFEST = {"name": "toy", "label_names": {"0": "background", "1": "cortex"}, "cases": [CASE]}
NO_JSON = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"cases": ' + b"1" * 5000 + b"}"]


def with_case(**fields: object) -> dict:
    manifest = deepcopy(MANIFEST)
    manifest["cases"][0] |= fields
    return manifest


def test_a_valid_one_is_read(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    folder = PreparedFolder(tmp_path)
    assert folder.label_names == {0: "background", 1: "cortex"} and folder.split("train")[0].name == "a"


@pytest.mark.parametrize(
    "content",
    [
        *NO_JSON,
        *(json.dumps(value).encode() for value in (None, 3, [], {}, "x", [MANIFEST])),
        *(json.dumps(MANIFEST | change).encode() for change in ({"label_names": None}, {"label_names": ["a"]})),
        *(json.dumps(MANIFEST | {"label_names": {key: "a"}}).encode() for key in ("x", "", "-1", "1.5", "9" * 400)),
        json.dumps(MANIFEST | {"label_names": {"1": 3}}).encode(),
        *(json.dumps(MANIFEST | {"cases": cases}).encode() for cases in (None, {}, "x", [3], [None], [[]], [{}])),
        *(json.dumps(with_case(**{key: 3})).encode() for key in ("case", "split", "image", "label")),
        *(
            json.dumps(MANIFEST | {"cases": [{k: v for k, v in CASE.items() if k != key}]}).encode()
            for key in CASE
            if key != "label"
        ),
    ],
)
def test_manifests(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json.*expected what `binaryformer prepare` wrote") as caught:
        PreparedFolder(tmp_path)
    # Of subclasses, such as UnicodeDecodeError, no docstring speaks.
    assert type(caught.value) is ValueError
    result = CliRunner().invoke(app, ["check-leakage", str(tmp_path)])
    assert result.exit_code == 2 and "manifest.json" in result.output


@pytest.mark.parametrize(
    "content", [*NO_JSON, b"3", b"null", b'{"labels": [{"label": 1e999, "name": "a"}]}', b'{"1e3": "a"}']
)
def test_label_names(tmp_path, content):
    (tmp_path / "names.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"names\.json does not hold label names.*expected JSON") as caught:
        read_label_names(tmp_path / "names.json")
    assert type(caught.value) is ValueError

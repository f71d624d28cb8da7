"""What the page is made of: its parts, its addresses, what is bundled with it, and the Space."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hf_binaryformer import cli
from hf_binaryformer.app import serve
from hf_binaryformer.app.limits import Limits
from hf_binaryformer.app.runs import Networks
from hf_binaryformer.app.workspace import UPLOADS, Workspaces

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "hf_binaryformer" / "app" / "static"


def answer(app: Any, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an application's answer, without a server."""
    sent: list[dict[str, Any]] = []
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": "", "headers": []}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1)}

    async def receive() -> dict[str, Any]:
        # Whoever asked says no more, and stays.
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
def served(tmp_path) -> tuple[Any, Workspaces]:
    applications = pytest.importorskip("starlette.applications")
    from hf_binaryformer.app.routes import app_options

    workspaces = Workspaces(tmp_path / "root")
    return applications.Starlette(**app_options(workspaces)), workspaces


def test_results_are_fetched_by_their_names_only(served, tmp_path):
    app, workspaces = served
    workspace = workspaces.of("one")
    path = workspace.new_scan_folder() / "labels.nii.gz"
    path.write_bytes(b"content")
    address = workspace.publish(path)
    status, headers, body = answer(app, f"/{address}")
    assert (status, body) == (200, b"content")
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    token = address.split("/")[1]
    assert len(token) >= 32
    for wrong in (
        f"results/{token}/other",
        f"results/{token[:-1]}/labels.nii.gz",
        f"results/..%2f{token}/labels.nii.gz",
    ):
        assert answer(app, f"/{wrong}")[0] == 404
    assert answer(app, f"/viewer/../../{path.name}")[0] == 404
    workspaces.close("one")
    assert answer(app, f"/{address}")[0] == 404 and not path.exists()


def test_browsers_may_ask_no_other_host(served):
    app, _ = served
    for path in ("/viewer/viewer.js", "/results/x/y", "/nothing"):
        policy = answer(app, path)[1]["content-security-policy"]
        assert "default-src 'self'" in policy and not re.search(r"https?:|\*", policy)


def test_the_bundled_viewer_is_the_one_that_its_notice_names():
    notice = (STATIC / "niivue" / "NOTICE.md").read_text(encoding="utf-8")
    content = (STATIC / "niivue" / "niivue.umd.js").read_bytes()
    assert hashlib.sha256(content).hexdigest() in notice and "0.69.0" in notice
    assert "Copyright (c) 2021, Niivue" in (STATIC / "niivue" / "LICENSE").read_text(encoding="utf-8")
    for name in ("fflate", "gl-matrix", "nifti-reader-js", "zarrita"):
        assert f"== {name} " in (STATIC / "niivue" / "LICENSES-of-libraries.txt").read_text(encoding="utf-8")


def test_our_own_files_name_no_other_host():
    for name in ("viewer.js", "page.css"):
        assert not re.search(r"https?://|//\w+\.\w+|@import", (STATIC / name).read_text(encoding="utf-8"))


def test_the_space_has_a_card_that_hugging_face_reads():
    _, header, text = (ROOT / "space" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["sdk"] == "gradio" and (ROOT / "space" / card["app_file"]).is_file()
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={card['sdk_version']}" in pins
    assert len(card["short_description"]) <= 60, "the Hub refuses longer ones"
    assert "not for clinical use" in text
    assert (ROOT / "space" / "requirements.txt").read_text().strip() == "hf-binaryformer[app,demo,dicom]"


def test_missing_gradio_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    result = CliRunner().invoke(cli.app, ["app"])
    assert result.exit_code == 1 and 'pip install "hf-binaryformer[app]"' in result.stderr


def test_a_missing_network_is_told_before_anything_is_served():
    result = CliRunner().invoke(cli.app, ["app", "--model", "no-such-thing"])
    assert result.exit_code == 1 and "no-such-thing" in result.stderr


def test_options_reach_the_page(monkeypatch):
    got: dict[str, Any] = {}
    monkeypatch.setattr(serve, "serve", lambda **options: got.update(options))
    arguments = ["app", "--port", "1234", "--max-mb", "7", "--model", "a", "--inpaint-model", "b", "--device", "cpu"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert got.pop("started") is not None
    assert got == {
        "host": "127.0.0.1",
        "port": 1234,
        "share": False,
        "networks": Networks("a", "b", None, "cpu"),
        "limits": Limits(upload_mb=7),
    }


def test_all_temporary_files_lie_in_a_folder_that_goes(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = tempfile.gettempdir()
    with serve.temporary_root() as root:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            assert Path(file.name).parent == root
        assert os.environ["GRADIO_TEMP_DIR"] == str(root / UPLOADS)
    assert not root.exists() and tempfile.gettempdir() == before and "GRADIO_TEMP_DIR" not in os.environ


def test_sigterm_ends_it_in_order():
    before = signal.getsignal(signal.SIGTERM)
    with serve.ended() as end:
        assert not end.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert end.wait(10)
    assert signal.getsignal(signal.SIGTERM) is before

"""The page in a real browser: upload, click, see, download; and no request to any other host."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
from scan_cases import checkpoint, run, save
from vq_cases import save_checkpoint

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
# WebGL 2 without a graphics card.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PATIENCE_MS = 300_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "hf-binaryformer[app]"')
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set CHROMIUM")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return checkpoint(folder / "tiny-random")


@pytest.fixture(scope="module")
def address(folder, model) -> Iterator[str]:
    """The page as `binaryformer app` serves it, in a process of its own that is ended as a service is."""
    (folder / "temporary").mkdir()
    (folder / "here").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "hf_binaryformer", "app", "--port", "0", "--max-mb", "1"]
    command += ["--model", str(model), "--inpaint-model", str(save_checkpoint(folder / "tiny-vq"))]
    process = subprocess.Popen(command, env=environment, cwd=folder / "here", stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield re.findall(r"http://[\d.:]+", line)[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        process.stdout.close()
    left = [str(path.relative_to(folder)) for name in ("temporary", "here") for path in (folder / name).rglob("*")]
    assert left == [], "something is left of the page"


def colours(page: Any) -> int:
    """How many coloured pixels the viewer shows; grey ones, the scan's, do not count."""
    from io import BytesIO

    from PIL import Image

    picture = np.asarray(Image.open(BytesIO(page.locator("#bf-viewer canvas").first.screenshot())).convert("RGB"), int)
    return int((picture.max(-1) - picture.min(-1) > 40).sum())


def shown(page: Any, turn: int, panels: int = 1) -> None:
    """Wait until the viewer has drawn the scene of this number."""
    page.wait_for_selector(f"#bf-viewer[data-turn='{turn}'][data-shown='{panels}']")


def draw(page: Any) -> None:
    """Draw a closed line with the pen, erase a part of what it fills, and take the rest as the hole."""
    page.get_by_role("tab", name="Inpaint").click()
    page.click("#bf-drawing")
    page.wait_for_selector("#bf-status .bf-error")
    assert "nothing is drawn yet" in page.inner_text("#bf-status")
    page.click("#bf-pen")
    canvas = page.locator("#bf-viewer canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    plane, ratio = page.evaluate(
        "(viewer => [viewer.screenSlices[0].leftTopWidthHeight, viewer.uiData.dpr])(binaryformer.viewers()[0])"
    )
    left, top, width, height = (one / ratio for one in plane)

    def line(*places: tuple[float, float]) -> None:
        """Through places in the first plane, in shares of its size."""
        points = [(box["x"] + left + x * width, box["y"] + top + y * height) for x, y in places]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=8)
        page.mouse.up()
        page.wait_for_timeout(500)

    def drawn() -> int:
        return page.evaluate("binaryformer.viewers()[0].drawBitmap.reduce((sum, value) => sum + (value > 0), 0)")

    line((0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7), (0.3, 0.3))
    first = drawn()
    assert first > 20, "the pen does not fill"
    page.click("#bf-eraser")
    line((0.3, 0.3), (0.5, 0.3), (0.5, 0.7), (0.3, 0.7), (0.3, 0.3))
    assert 0 < drawn() < first, "the eraser takes nothing, or all"
    page.click("#bf-drawing")
    shown(page, 3)
    mask = page.evaluate("binaryformer.viewers()[0].volumes[1].img.reduce((sum, value) => sum + (value > 0), 0)")
    assert 0 < mask < first


def inpaint(page: Any) -> None:
    """Set a hole at the crosshair and fill it: before, after and standard deviation, with one crosshair."""
    page.click("#bf-hole")
    shown(page, 4)
    page.click("#bf-inpaint")
    shown(page, 5, panels=3)
    assert "ml filled" in page.inner_text("#bf-result")
    assert page.locator("#bf-files a").count() == 4
    left, top, width, height = page.evaluate("Array.from(binaryformer.viewers()[0].screenSlices[0].leftTopWidthHeight)")
    page.locator("#bf-viewer canvas").first.click(position={"x": left + width / 4, "y": top + height / 4})
    page.wait_for_timeout(1000)
    places = page.evaluate("binaryformer.viewers().map(viewer => Array.from(viewer.scene.crosshairPos))")
    sizes = page.evaluate("[...document.querySelectorAll('#bf-viewer canvas')].map(canvas => canvas.clientHeight)")
    assert sizes == [520] * 3, "the viewer grows"
    assert len(places) == 3 and places[0] != [0.5, 0.5, 0.5]
    np.testing.assert_allclose(places, [places[0]] * 3, atol=0.02)


@pytest.mark.slow
def test_upload_click_see_download(browser, address, folder, model):
    scan = save(folder / "head.nii.gz")
    requests: list[str] = []
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("request", lambda request: requests.append(request.url))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)

    (folder / "large.nii").write_bytes(bytes(1_100_000))
    page.set_input_files("#bf-scan input[type=file]", str(folder / "large.nii"))
    page.get_by_text(re.compile("maximum allowed size|at most 1 MB")).first.wait_for()
    (folder / "wrong.nii.gz").write_bytes(b"no volume")
    page.reload()
    page.set_input_files("#bf-scan input[type=file]", str(folder / "wrong.nii.gz"))
    page.wait_for_selector("#bf-status .bf-error")
    assert "wrong.nii.gz is truncated or damaged" in page.inner_text("#bf-status")

    page.set_input_files("#bf-scan input[type=file]", str(scan))
    page.wait_for_selector("#bf-facts .bf-message")
    shown(page, 1)
    before = colours(page)
    page.click("#bf-segment")
    page.wait_for_selector("#bf-result .bf-volumes")
    shown(page, 2)
    page.wait_for_timeout(1000)
    after = colours(page)
    assert after > before + 5000, "labels are not seen"
    assert page.locator("#bf-result .bf-bar").count() >= 2
    assert page.evaluate("binaryformer.viewers()[0].volumes[1].colormapLabel.labels[1]") == "left core"
    page.evaluate("binaryformer.opacity(0)")
    page.wait_for_timeout(1000)
    assert colours(page) < after - 5000, "opacity has no effect"

    with page.expect_download() as download:
        page.click("#bf-files a:has-text('NIfTI')")
    download.value.save_as(folder / "downloaded.nii.gz")
    assert run(scan, "-o", folder / "labels.nii.gz", "--model", model).exit_code == 0
    assert (folder / "downloaded.nii.gz").read_bytes() == (folder / "labels.nii.gz").read_bytes()
    assert nib.load(folder / "downloaded.nii.gz").shape == nib.load(scan).shape

    draw(page)
    inpaint(page)

    assert errors == []
    hosts = {urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).netloc}, "a request left this machine"
    context.close()
    end = time.monotonic() + 120
    while list((folder / "temporary").rglob("*.nii.gz")) and time.monotonic() < end:
        time.sleep(1)
    assert list((folder / "temporary").rglob("*.nii.gz")) == [], "files stay when the visitor leaves"

"""What happens when a visitor clicks: from values on the page to values on the page, with errors as plain messages."""

from __future__ import annotations

import base64
import functools
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_binaryformer.app import runs, scans, scenes, tables
from hf_binaryformer.app.limits import Limits
from hf_binaryformer.app.workspace import UPLOADS, CancelledError, Workspace, Workspaces
from hf_binaryformer.commands.many_scans import one_line

CANCELLED = "cancelled, nothing was kept"
# A scene of None leaves the viewer as it is.
Page = dict[str, Any]


def told(root: Path, error: Exception) -> str:
    """What a visitor reads of an error; one that nobody foresaw is printed for whoever runs the page."""
    if isinstance(error, CancelledError):
        return tables.message(CANCELLED)
    if isinstance(error, ValueError | OSError | ImportError | MemoryError):
        return tables.message(tables.without_folders(one_line(error), root), "error")
    traceback.print_exception(error, file=sys.stderr)
    return tables.message(
        f"this failed ({type(error).__name__}); whoever runs this page finds more in its log", "error"
    )


def plainly(handler: Callable[..., Page]) -> Callable[..., Page]:
    """Turn whatever a handler raises into ``{"status": message}``."""

    @functools.wraps(handler)
    def run(self: Handlers, *args: Any, **kwargs: Any) -> Page:
        try:
            return handler(self, *args, **kwargs)
        except Exception as error:
            return {"status": told(self.workspaces.root, error)}

    return run


class Handlers:
    """The page's work, without Gradio.

    Every method but ``cancel`` and ``leave`` returns new values for parts of the page: "status", "facts", "scene", "result",
    "files". Parts that are not named stay as they are.

    Args:
        workspaces: of all visitors.
        networks: which networks run.
        limits: what is accepted.
    """

    def __init__(self, workspaces: Workspaces, networks: runs.Networks, limits: Limits) -> None:
        self.workspaces = workspaces
        self.networks = networks
        self.limits = limits

    @plainly
    def upload(self, session: str, path: str | None) -> Page:
        """Take an uploaded scan."""
        if path is None:
            return {}
        workspace = self.workspaces.of(session)
        volume = scans.take_upload(workspace, Path(path), self.limits)
        return self._shown(workspace, volume)

    @plainly
    def example(self, session: str) -> Page:
        """Take the MNI152 template."""
        workspace = self.workspaces.of(session)
        return self._shown(workspace, scans.take_example(workspace, self.limits))

    def _shown(self, workspace: Workspace, volume: Any) -> Page:
        source, _ = workspace.scan()
        facts = tables.scan_facts(source.name, volume)
        return {"status": "", "facts": facts, "scene": scenes.scan_scene(workspace), "result": "", "files": ""}

    def announce(self, session: str, kind: str) -> None:
        """Prepare a job of kind "segment" or "inpaint", so that it can be cancelled while it waits."""
        self.workspaces.of(session).announce(kind)

    @plainly
    def segment(self, session: str, progress: runs.Progress, views: str, keep_largest: bool) -> Page:
        """Label the scan; ``views`` is "model" for the checkpoint's own."""
        workspace = self.workspaces.of(session)
        chosen = None if views == "model" else views
        result = runs.run_segmentation(workspace, self.networks, progress, views=chosen, keep_largest=keep_largest)
        return {
            "status": "",
            "scene": scenes.labels_scene(workspace, result.files["NIfTI"], result.report),
            "result": tables.quality_box(result.report) + tables.volumes_table(result.report),
            "files": tables.downloads(workspace, result.files),
        }

    @plainly
    def draw_hole(self, session: str, centre: list[float] | None, form: str, *size: float) -> Page:
        """Set a hole around the crosshair, whose place in mm the viewer told."""
        workspace = self.workspaces.of(session)
        workspace.scan()
        if centre is None:
            raise ValueError("the viewer shows no scan yet: wait until it does, then click into it")
        mask = runs.write_hole(workspace, centre, size, form)
        return {"status": "", "scene": scenes.hole_scene(workspace, mask)}

    @plainly
    def drawn_hole(self, session: str, drawing: str | None) -> Page:
        """Take a mask that was drawn in the viewer: a .nii.gz in base64."""
        workspace = self.workspaces.of(session)
        workspace.scan()
        if drawing is None:
            raise ValueError(
                "nothing is drawn yet: press Pen, draw a closed line in one of the planes, then press this"
            )
        content = base64.b64decode(drawing, validate=True)
        uploads = self.workspaces.root / UPLOADS
        uploads.mkdir(exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=uploads)) / "drawing.nii.gz"
        path.write_bytes(content)
        return self._with_mask(workspace, path)

    def _with_mask(self, workspace: Workspace, path: Path) -> Page:
        mask = scans.take_mask(workspace, path, self.limits)
        return {"status": "", "scene": scenes.hole_scene(workspace, mask)}

    @plainly
    def upload_hole(self, session: str, path: str | None) -> Page:
        """Take an uploaded mask."""
        if path is None:
            return {}
        return self._with_mask(self.workspaces.of(session), Path(path))

    @plainly
    def inpaint(
        self,
        session: str,
        progress: runs.Progress,
        samples: int,
        steps: int,
        temperature: float,
        feather: int,
        seed: int,
    ) -> Page:
        """Fill the hole."""
        workspace = self.workspaces.of(session)
        options = {"samples": int(samples), "steps": int(steps), "feather": int(feather), "seed": int(seed)}
        result = runs.run_inpainting(workspace, self.networks, progress, temperature=temperature, **options)
        return {
            "status": "",
            "scene": scenes.filled_scene(workspace, result.files),
            "result": tables.filling_box(result.report),
            "files": tables.downloads(workspace, result.files),
        }

    def cancel(self, session: str) -> None:
        """Stop the visitor's jobs, also those that wait."""
        self.workspaces.of(session).cancel()

    def leave(self, session: str) -> None:
        """The visitor closed the page: nothing of theirs stays."""
        self.workspaces.close(session)
        scans.sweep(self.workspaces.root / UPLOADS)

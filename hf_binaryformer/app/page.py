"""The page as Gradio builds it: what lies where, and which click leads to which handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from hf_binaryformer.app.handlers import Handlers, Page
from hf_binaryformer.app.holes import FORMS
from hf_binaryformer.app.routes import STATIC
from hf_binaryformer.pipelines.provenance import NOTICE

TITLE = "BinaryFormer"
INTRODUCTION = (
    "# BinaryFormer\nLabels structures in an MR scan, or fills a hole in it, with 1-bit attention. "
    f"**{NOTICE}** Files are deleted when you close the page."
)
VIEWS = ("sagittal", "coronal", "axial")
PARTS = ("status", "facts", "scene", "result", "files")
SYSTEM_FONTS = ["system-ui", "sans-serif"]
SYSTEM_MONO = ["ui-monospace", "monospace"]
HEAD = (
    '<script src="viewer/niivue/niivue.umd.js"></script><script src="viewer/viewer.js"></script>'
    '<link rel="stylesheet" href="viewer/page.css">'
)


def launch_options() -> dict[str, Any]:
    """What ``launch`` takes for the page's look, and to keep it to itself: no history, no link to elsewhere, no Node server."""
    return {
        "theme": gr.themes.Base(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO),
        "head": HEAD,
        "favicon_path": STATIC / "icon.png",
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
    }


class PageBuilder:
    """Builds the page around handlers.

    Args:
        handlers: what the clicks lead to.
    """

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.parts: dict[str, Any] = {}

    def build(self) -> gr.Blocks:
        """The page, with its queue."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    self._choose_scan()
                    with gr.Tab("Segment"):
                        self._segment()
                    with gr.Tab("Inpaint"):
                        self._inpaint()
                    stop = gr.Button("Cancel", elem_id="bf-cancel")
                with gr.Column(scale=3, min_width=480):
                    self._results()
            self._wire(stop)
            page.unload(self._leave)
        return page.queue(default_concurrency_limit=4, max_size=50)

    def _choose_scan(self) -> None:
        self.scan_file = gr.File(
            label="NIfTI (.nii, .nii.gz), or a DICOM series as .zip",
            file_types=[".nii", ".gz", ".zip"],
            type="filepath",
            height=150,
            elem_id="bf-scan",
        )
        self.example = gr.Button("MNI152 example", elem_id="bf-example")
        self.parts["facts"] = gr.HTML(elem_id="bf-facts")

    def _segment(self) -> None:
        choices = [("as the model was made", "model"), ("all three, averaged", "all")]
        self.views = gr.Dropdown([*choices, *VIEWS], value="model", label="slices that the network sees")
        self.keep_largest = gr.Checkbox(label="largest piece of each structure only")
        self.segment = gr.Button("Segment", variant="primary", elem_id="bf-segment")

    def _inpaint(self) -> None:
        gr.Markdown("Draw the hole: the pen fills what a line encloses. Draw in several slices.")
        with gr.Row():
            self.pen = gr.Button("Pen", elem_id="bf-pen")
            self.eraser = gr.Button("Eraser", elem_id="bf-eraser")
        # The viewer fills it in at the click.
        self.drawing = gr.Textbox(visible="hidden")
        self.take_drawing = gr.Button("Use the drawing", elem_id="bf-drawing")
        gr.Markdown("Or set a simple form: click into the scan where it shall be.")
        self.form = gr.Radio(list(FORMS), value=FORMS[0], label="form")
        ways = ("left to right", "back to front", "bottom to top")
        self.size = [gr.Slider(2, 120, value=30, step=1, label=f"{way}, mm") for way in ways]
        # The viewer fills it in at the click.
        self.centre = gr.JSON(visible="hidden")
        self.draw = gr.Button("Set the hole", elem_id="bf-hole")
        with gr.Accordion("or upload a mask on the scan's grid", open=False):
            self.mask_file = gr.File(
                label="NIfTI; not 0 is the hole",
                file_types=[".nii", ".gz"],
                type="filepath",
                height=150,
                elem_id="bf-mask",
            )
        with gr.Accordion("how it is filled", open=False):
            self.filling = [
                gr.Slider(1, 4, value=2, step=1, label="samples; two or more give a standard deviation"),
                gr.Slider(5, 200, value=50, step=5, label="steps"),
                gr.Slider(0, 1.5, value=0.2, step=0.05, label="temperature; 0 takes the likeliest"),
                gr.Slider(0, 16, value=8, step=1, label="feather, voxels"),
                gr.Number(0, precision=0, label="random seed"),
            ]
        self.inpaint = gr.Button("Inpaint", variant="primary", elem_id="bf-inpaint")

    def _results(self) -> None:
        self.parts["status"] = gr.HTML(elem_id="bf-status", min_height=40)
        gr.HTML('<div id="bf-viewer"></div><p id="bf-place"></p>')
        self.opacity = gr.Slider(0, 1, value=0.6, step=0.05, label="opacity of labels", elem_id="bf-opacity")
        self.parts["files"] = gr.HTML(elem_id="bf-files")
        self.parts["result"] = gr.HTML(elem_id="bf-result")
        self.parts["scene"] = gr.JSON(visible="hidden")

    def _wire(self, stop: gr.Button) -> None:
        # For this page only: programs have the package itself.
        hidden: Any = {"api_visibility": "private"}
        handlers, outputs = self.handlers, [self.parts[name] for name in PARTS]
        scene = self.parts["scene"]
        scene.change(None, [scene, self.opacity], None, js="(scene, opacity) => { binaryformer.show(scene, opacity) }")
        self.opacity.change(None, self.opacity, None, js="opacity => { binaryformer.opacity(opacity) }")
        # The drop field is empty afterwards, ready for the next file: the page's own copy is gone.
        self.scan_file.upload(_uploaded(handlers.upload), self.scan_file, [self.scan_file, *outputs], **hidden)
        self.mask_file.upload(_uploaded(handlers.upload_hole), self.mask_file, [self.mask_file, *outputs], **hidden)
        self.example.click(_quick(handlers.example), None, outputs, **hidden)
        self.draw.click(
            _quick(handlers.draw_hole),
            [self.centre, self.form, *self.size],
            outputs,
            js="(centre, ...others) => [binaryformer.position(), ...others]",
            **hidden,
        )
        self.pen.click(None, None, None, js="() => { binaryformer.pen(1) }")
        self.eraser.click(None, None, None, js="() => { binaryformer.pen(0) }")
        self.take_drawing.click(
            _quick(handlers.drawn_hole), self.drawing, outputs, js="() => binaryformer.drawing()", **hidden
        )
        # One network at a time: jobs of all visitors wait in one queue.
        for button, kind, options in (
            (self.segment, "segment", [self.views, self.keep_largest]),
            (self.inpaint, "inpaint", self.filling),
        ):
            click = button.click(_announcement(handlers, kind), None, None, queue=False, **hidden)
            click.then(
                _long(getattr(handlers, kind)),
                options,
                outputs,
                show_progress_on=self.parts["status"],
                concurrency_id="network",
                concurrency_limit=1,
                **hidden,
            )
        stop.click(self._cancel, None, None, queue=False, **hidden)

    def _cancel(self, request: gr.Request) -> None:
        self.handlers.cancel(str(request.session_hash))

    def _leave(self, request: gr.Request) -> None:
        self.handlers.leave(str(request.session_hash))


def in_order(page: Page) -> list[Any]:
    """Values for :data:`PARTS`; what is not named stays as it is."""
    return [page.get(name, gr.skip()) for name in PARTS]


def _quick(handler: Callable[..., Page]) -> Callable[..., list[Any]]:
    def run(request: gr.Request, *values: Any) -> list[Any]:
        return in_order(handler(str(request.session_hash), *values))

    return run


def _uploaded(handler: Callable[..., Page]) -> Callable[..., list[Any]]:
    def run(path: str | None, request: gr.Request) -> list[Any]:
        return [None, *in_order(handler(str(request.session_hash), path))]

    return run


def _announcement(handlers: Handlers, kind: str) -> Callable[..., None]:
    def run(request: gr.Request) -> None:
        handlers.announce(str(request.session_hash), kind)

    return run


def _long(handler: Callable[..., Page]) -> Callable[..., list[Any]]:
    # Gradio finds the bar by this default.
    def run(request: gr.Request, bar: gr.Progress = gr.Progress(), *values: Any) -> list[Any]:  # noqa: B008
        def progress(done: int, total: int) -> None:
            bar((done, total))

        return in_order(handler(str(request.session_hash), progress, *values))

    return run

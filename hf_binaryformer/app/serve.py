"""Serves the page, in a temporary folder that goes when it ends."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hf_binaryformer.app.limits import MB, Limits
from hf_binaryformer.app.runs import Networks
from hf_binaryformer.app.workspace import UPLOADS, Workspaces

HOST, PORT = "127.0.0.1", 7860
# So long a job may take to notice that the page ends: a batch of slices, or a step.
SECONDS_TO_STOP = 60.0
# Read when Gradio is imported: no telemetry, no look for newer versions.
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TELEMETRY": "1"}


def serve(
    *,
    host: str = HOST,
    port: int = PORT,
    share: bool = False,
    networks: Networks | None = None,
    limits: Limits | None = None,
    started: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until the process is interrupted (SIGINT) or ended (SIGTERM).

    Args:
        host: address to listen on; "0.0.0.0" lets other machines in.
        port: number of the port; 0 takes a free one.
        share: have Gradio make a public address, which needs a network and leads everything through a server of Gradio's.
        networks: which networks run; None: the packaged ones.
        limits: what is accepted; None: the defaults.
        started: called with the page's address once it answers.

    Raises:
        CheckpointNotFoundError: there is no such network.
        ModuleNotFoundError: the extra ``app`` is missing.
        OSError: the port is taken.
    """
    networks, limits = networks or Networks(), limits or Limits()
    check_networks(networks)
    address_of: dict[str, Any] = {"host": host, "port": port, "share": share}
    with temporary_root() as root, ended() as end, launched(root, networks, limits, **address_of) as address:
        if started is not None:
            started(address)
        end.wait()


@contextmanager
def launched(
    root: Path, networks: Networks, limits: Limits, *, host: str = HOST, port: int = PORT, share: bool = False
) -> Iterator[str]:
    """Serve in the background while the block runs; yields the page's address.

    Args:
        root: folder of all files, from :func:`temporary_root`.
        networks, limits, host, port, share: as for :func:`serve`.

    Raises:
        ModuleNotFoundError, OSError: as for :func:`serve`.
    """
    require_gradio()
    from hf_binaryformer.app.handlers import Handlers
    from hf_binaryformer.app.page import PageBuilder, launch_options
    from hf_binaryformer.app.routes import app_options

    workspaces = Workspaces(root)
    page = PageBuilder(Handlers(workspaces, networks, limits)).build()
    _, local, public = page.launch(
        server_name=host,
        server_port=port or free_port(host),
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=limits.upload_mb * MB,
        app_kwargs=app_options(workspaces),
        **launch_options(),
    )
    try:
        yield public or local
    finally:
        workspaces.close_all(SECONDS_TO_STOP)
        page.close(verbose=False)


def require_gradio() -> None:
    """Import Gradio, silenced.

    Raises:
        ModuleNotFoundError: it is missing; the message names the extra.
    """
    os.environ.update(SILENT)
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the page needs gradio, which is missing: pip install "hf-binaryformer[app]"'
        ) from error


def check_networks(networks: Networks) -> None:
    """Fail before anybody waits for a job, if a network is not there.

    Raises:
        CheckpointNotFoundError: names what was tried.
        ValueError: the device cannot be used here.
    """
    from hf_binaryformer.commands.jobs import usable_device
    from hf_binaryformer.modeling.pretrained import resolve_checkpoint

    usable_device(networks.device)
    for name in (networks.model, networks.inpaint_model):
        resolve_checkpoint(name)


@contextmanager
def temporary_root() -> Iterator[Path]:
    """A new folder for all that the process writes, uploads under way included; deleted at the end."""
    before, uploads = tempfile.tempdir, os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="binaryformer-app-", ignore_cleanup_errors=True) as name:
        root = Path(name).resolve()
        tempfile.tempdir = str(root)
        os.environ["GRADIO_TEMP_DIR"] = str(root / UPLOADS)
        try:
            yield root
        finally:
            tempfile.tempdir = before
            os.environ.pop("GRADIO_TEMP_DIR")
            if uploads is not None:
                os.environ["GRADIO_TEMP_DIR"] = uploads


@contextmanager
def ended() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the block ends in order and its files are deleted."""
    event = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        event.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    import socket

    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])

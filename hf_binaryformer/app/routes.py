"""Addresses beside Gradio's own: the viewer's code, and files of visitors. Every answer forbids requests to other hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_binaryformer.app.workspace import Workspaces

STATIC = Path(__file__).parent / "static"
# Gradio compiles templates in the browser and styles elements in place, hence 'unsafe-eval' and 'unsafe-inline'.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


class OwnHostOnly:
    """Has browsers refuse whatever would be fetched from another host: fonts, scripts, pictures.

    Args:
        app: the application that answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the policy to each answer."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def results_route(workspaces: Workspaces) -> Route:
    """``/results/{token}/{name}``: a file of a visitor, under a name that cannot be guessed and that ends with their session."""

    async def results(request: Request) -> Response:
        path = workspaces.find(request.path_params["token"])
        if path is None or path.name != request.path_params["name"]:
            return PlainTextResponse("not here, or no longer: the session has ended", status_code=404)
        kind = {".png": "image/png", ".csv": "text/csv"}.get(path.suffix, "application/octet-stream")
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type=kind, headers=headers)

    return Route("/results/{token}/{name}", results)


def app_options(workspaces: Workspaces) -> dict[str, Any]:
    """What Gradio's ``launch`` takes as ``app_kwargs``."""
    viewer = Mount("/viewer", StaticFiles(directory=STATIC))
    return {"routes": [results_route(workspaces), viewer], "middleware": [Middleware(OwnHostOnly)]}

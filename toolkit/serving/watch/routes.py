"""The page of a run beside a served model."""

import asyncio

from fastapi import Request, Response

from toolkit.serving.base import Base
from toolkit.serving.errors import RequestError
from toolkit.serving.watch.run import WatchedRun


def add_watch(base: Base, run: WatchedRun) -> None:
    """Add what the page asks for to an application."""

    @base.app.get("/watch/{name}", dependencies=base.guarded, include_in_schema=False)
    async def ask(name: str, request: Request) -> Response:
        text = await asyncio.to_thread(run.respond, name, dict(request.query_params))
        if text is None:
            raise RequestError("The run has no such step.", status=404)
        return Response(text, media_type="application/json", headers={"cache-control": "no-store"})

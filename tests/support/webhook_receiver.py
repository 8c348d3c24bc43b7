"""A real HTTP server that takes notifications and remembers them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class WebhookReceiver:
    """What was posted; answers with ``status``."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        """Answers a notification."""
        self.headers.append(dict(request.headers))
        body = await request.json()
        if self.status == 200:
            self.bodies.append(body)
        return web.Response(status=self.status)

    def told(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The status of each notification, with the status and summary of each alert."""
        return [
            (
                body["status"],
                [
                    (each["status"], each["annotations"].get("summary", ""))
                    for each in body["alerts"]
                ],
            )
            for body in self.bodies
        ]


def _told(alert: dict[str, Any]) -> tuple[str, str]:
    return alert["status"], alert["annotations"].get("summary", "")


@asynccontextmanager
async def webhook_receiver() -> AsyncIterator[WebhookReceiver]:
    """One that listens on a free port of loopback."""
    receiver = WebhookReceiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    (address,) = runner.addresses
    receiver.url = f"http://127.0.0.1:{address[1]}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()

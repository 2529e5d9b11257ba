"""What a router and its replicas know of each other."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from twotower.server.errors import error_response

SECRET = "x-twotower-secret"
REQUEST_ID = "x-request-id"
# After which a replica closes a router's connection
IDLE_SECONDS = 30
# Most characters of an id that isn't the router's own
_LONGEST_ID = 64


class TakenId:
    """Takes a request's id from whoever stands in front and tells the client: a router, or Ray's proxy.

    With a `secret`, requests without it are refused: they would get past the router's keys and limits.
    """

    def __init__(self, app: ASGIApp, secret: str | None = None) -> None:
        self._app = app
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            sent = headers.get(SECRET, "").encode("latin-1")
            if self._secret is not None and not hmac.compare_digest(sent, self._secret.encode()):
                message = "this is a replica, and it answers its router alone; send requests there"
                await error_response(scope["path"], 403, message, code="not_the_router")(scope, receive, send)
                return
            scope.setdefault("state", {})["request_id"] = headers.get(REQUEST_ID, "")[:_LONGEST_ID]
        await self._app(scope, receive, send)

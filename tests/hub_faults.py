"""Faults between a client and the stand-in Hub."""

from dataclasses import dataclass

from hub_server import Drop

ALWAYS = 10**6
HTML = b"<html><body>Please log in to this network.</body></html>"
DROP, LOSE, LOSE_IN_GATEWAY, LOSE_IN_PORTAL = "drop", "lose the reply", "gateway times out", "a portal answers"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to requests: an HTTP status, or one of the words above, so many times."""

    method: str
    path: str
    act: int | str
    times: int = ALWAYS
    body: bytes = b""

    def on(self, hub):
        """A hook for the server."""
        left = self.times

        def hook(request):
            nonlocal left
            if request.command != self.method or self.path not in request.path or not left:
                return None
            left -= 1
            if self.act in (LOSE, LOSE_IN_GATEWAY, LOSE_IN_PORTAL):
                hub.respond(request)
            if self.act in (DROP, LOSE):
                raise Drop
            if self.act == LOSE_IN_PORTAL:
                return 200, {"Content-Type": "text/html"}, HTML
            return (504 if self.act == LOSE_IN_GATEWAY else self.act), {}, self.body

        return hook


def sentence(caught) -> str:
    """The text of an error, which is one sentence."""
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def writes(hub):
    """Requests that change something, or try to."""
    return [entry for entry in hub.requests if entry[0] in ("POST", "PUT")]

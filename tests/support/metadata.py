"""The metadata service of a machine in Amazon's cloud, where an instance role's credentials come from (IMDSv2)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["instance_role"]

_TOKEN = "token-of-this-session"
_ROLE = "/latest/meta-data/iam/security-credentials/"


@contextmanager
def instance_role(key: str, secret: str) -> Iterator[str]:
    """Give the credentials of a role to who asks for them properly; yields the service's URL."""

    class Handler(_Handler):
        credentials = (key, secret)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="metadata")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    credentials: tuple[str, str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        self._say(_TOKEN)

    def do_GET(self) -> None:
        if self.headers.get("x-aws-ec2-metadata-token") != _TOKEN:
            self.send_error(401)
        elif self.path == _ROLE:
            self._say("role")
        elif self.path == _ROLE + "role":
            self._say(json.dumps(self._credentials()))
        else:
            self.send_error(404)

    def _credentials(self) -> dict[str, str]:
        key, secret = self.credentials
        end = datetime.now(UTC) + timedelta(hours=6)
        facts = {"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": key, "SecretAccessKey": secret, "Token": ""}
        return facts | {"LastUpdated": f"{end:%Y-%m-%dT%H:%M:%SZ}", "Expiration": f"{end:%Y-%m-%dT%H:%M:%SZ}"}

    def _say(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

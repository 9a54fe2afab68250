"""A local server that speaks as much of the hub's protocol as downloads need (metadata, redirects, ranges), with its faults."""
import hashlib
import http.server
import os
import re
import socket
import struct
import threading
from types import SimpleNamespace


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves `files`, {name: bytes}, of kjj0/fineweb10B-gpt2 at `url`: like LFS files (a redirect to another host, `localhost`,
    and the SHA-256 as X-Linked-Etag) or, if not `lfs`, like small ones (no redirect, no SHA-256).

    `faults` {(method, name): iterator of dicts} says what goes wrong in one request after the other:
        status, headers     this answer, instead of the file
        content             these bytes, instead of the file's
        cut, reset, stall   after so many bytes: the connection ends, is reset, or falls silent (then `stalled` is set)
    `requests` has method, name, host, token and start (first byte, 0 for the whole file) of each.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.lfs, self.stalled = files, {}, [], True, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def starts(self, name):
        """The first byte of each download of this file."""
        return [request.start for request in self.requests if (request.method, request.name) == ("GET", name)]

    def handle_error(self, *arguments):
        """Nothing: connections that clients leave are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, **headers):
        self.send_response(status)
        for name, value in {"Content_Length": 0, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self):
        hub, method = self.server, self.command
        cdn, name = re.fullmatch(r"(?:/datasets/kjj0/fineweb10B-gpt2/resolve/main|(/cdn))/(.+)", self.path).groups()
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        redirects, fault = hub.lfs and not cdn, {}
        if not (redirects and method == "GET"):  # a redirected GET gets its fault behind the redirect
            hub.requests.append(SimpleNamespace(method=method, name=name, start=start, host=self.headers["Host"].split(":")[0],
                                                token=self.headers.get("Authorization")))
            fault = next(hub.faults.get((method, name), iter(())), {})
        if "status" in fault:
            return self.reply(fault["status"], **fault.get("headers", {}))
        if hub.files.get(name) is None:
            return self.reply(404, X_Error_Code="EntryNotFound")
        content = fault.get("content", hub.files[name])
        headers = dict(X_Repo_Commit="0" * 40, ETag='"' + "1" * 40 + '"')
        if redirects:
            return self.reply(302, **headers, X_Linked_Etag=f'"{hashlib.sha256(content).hexdigest()}"', X_Linked_Size=len(content),
                              Location=f"http://localhost:{hub.server_port}/cdn/{name}")
        if start and start >= len(content):
            return self.reply(416, Content_Range=f"bytes */{len(content)}")
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, **headers, Content_Length=len(content) - start)
        if method == "GET":
            self.wfile.write(content[start:][:min((fault[key] for key in ("cut", "reset", "stall") if key in fault), default=None)])
        if "stall" in fault:
            hub.stalled.set()
            self.rfile.read()  # returns when the client leaves
        if "reset" in fault:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # and not close(), which would send a FIN first
        self.close_connection = bool(fault)

    do_HEAD = do_GET

"""A local server that speaks the hub's protocol, as far as downloads need it, and misbehaves on request."""
import hashlib
import http.server
import os
import re
import socket
import struct
import threading
from types import SimpleNamespace

PATH = re.compile(r"(?:/datasets/kjj0/fineweb10B-gpt2/resolve/main|(/cdn))/(.+)")


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves `files`, {name: bytes}, of kjj0/fineweb10B-gpt2 at `url`.

    If `lfs`, as the hub serves LFS files: with a redirect to another host, `localhost`, and the SHA-256 as
    X-Linked-Etag. If not, as it serves small ones: no redirect, no SHA-256.

    `faults` {(method, name): iterator of dicts} says what goes wrong in one request after the other:
        status, headers     this answer, instead of the file
        content             these bytes, instead of the file's
        cut                 after so many bytes the connection ends
        reset               after so many bytes it is reset
        stall               after so many bytes it falls silent; then the event `stalled` is set
    `requests` has method, name, host, token and start (first byte, 0 for the whole file) of each.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.lfs = True
        self.faults = {}
        self.requests = []
        self.stalled = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def starts(self, name):
        """The first byte of each download of this file."""
        downloads = [request for request in self.requests if request.method == "GET"]
        return [request.start for request in downloads if request.name == name]

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
        hub = self.server
        cdn, name = PATH.fullmatch(self.path).groups()
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        redirects = hub.lfs and not cdn
        if redirects and self.command == "GET":
            fault = {}  # it comes behind the redirect
        else:
            fault = self.note_request(name, start)
        if "status" in fault:
            return self.reply(fault["status"], **fault.get("headers", {}))
        if hub.files.get(name) is None:
            return self.reply(404, X_Error_Code="EntryNotFound")
        content = fault.get("content", hub.files[name])
        headers = dict(X_Repo_Commit="0" * 40, ETag='"' + "1" * 40 + '"')
        if redirects:
            sha256 = hashlib.sha256(content).hexdigest()
            return self.reply(302, **headers, X_Linked_Etag=f'"{sha256}"', X_Linked_Size=len(content),
                              Location=f"http://localhost:{hub.server_port}/cdn/{name}")
        if start and start >= len(content):
            return self.reply(416, Content_Range=f"bytes */{len(content)}")
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, **headers, Content_Length=len(content) - start)
        if self.command == "GET":
            self.send_content(content[start:], fault)
        self.close_connection = bool(fault)

    do_HEAD = do_GET

    def note_request(self, name, start):
        """Adds it to the hub's list. Returns its fault, {} if there is none."""
        host = self.headers["Host"].split(":")[0]
        token = self.headers.get("Authorization")
        self.server.requests.append(
            SimpleNamespace(method=self.command, name=name, start=start, host=host, token=token))
        return next(self.server.faults.get((self.command, name), iter(())), {})

    def send_content(self, content, fault):
        limits = [fault[key] for key in ("cut", "reset", "stall") if key in fault]
        self.wfile.write(content[:limits[0]] if limits else content)
        if "stall" in fault:
            self.server.stalled.set()
            self.rfile.read()  # returns when the client leaves
        if "reset" in fault:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # and not close(), which would send a FIN first

"""A local server that speaks as much of the hub's protocol as downloads need (metadata, redirects, ranges), with its faults."""
import hashlib
import http.server
import os
import re
import socket
import struct
import threading
from types import SimpleNamespace


class FakeHub:
    """Serves `files`, {name: bytes}, of kjj0/fineweb10B-gpt2 at `url`: like LFS files (a redirect to another host, `localhost`,
    and the SHA-256 as X-Linked-Etag) or, if not `lfs`, like small ones (no redirect, no SHA-256). If not `is_a_hub`, without the
    header that tells the hub from other servers.

    `faults` {(method, name): iterator of dicts} says what goes wrong in one request after the other:
        status, headers     this answer, instead of the file
        content             these bytes, instead of the file's
        length              announced, instead of the content's
        cut, reset, stall   after so many bytes: the connection ends, is reset, or falls silent (then `stalled` is set)
        barrier             waits for this threading.Barrier before the first byte
    `requests` has method, name, host, token, start (first byte of the range, None without) and sent (bytes) of each.
    """

    def __init__(self, files):
        hub = self
        self.files, self.faults, self.requests, self.lfs, self.is_a_hub = files, {}, [], True, True
        self.stalled, self.closed = threading.Event(), threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, **headers):
                self.send_response(status)
                for name, value in {"Content_Length": 0, **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()

            def answer(self):
                match = re.fullmatch(r"/datasets/kjj0/fineweb10B-gpt2/resolve/main/(.+)|/cdn/(.+)", self.path)
                name, from_cdn = match and (match[1] or match[2]), match and bool(match[2])
                start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                request = SimpleNamespace(method=self.command, name=name, host=self.headers["Host"].split(":")[0], sent=0,
                                          token=self.headers.get("Authorization"), start=start and int(start[1]))
                redirects = hub.lfs and not from_cdn
                fault = {}
                if not (redirects and self.command == "GET"):  # a redirected GET gets its fault behind the redirect
                    hub.requests.append(request)
                    fault = next(hub.faults.get((self.command, name), iter(())), {})
                if "status" in fault:
                    return self.reply(fault["status"], **fault.get("headers", {}))
                if name not in hub.files:
                    return self.reply(404, X_Error_Code="EntryNotFound")
                size, sha256 = len(hub.files[name]), hashlib.sha256(hub.files[name]).hexdigest()
                metadata = dict(X_Repo_Commit="0" * 40, ETag='"' + "1" * 40 + '"') if hub.is_a_hub else {}
                if redirects:
                    return self.reply(302, **metadata, X_Linked_Etag=f'"{sha256}"', X_Linked_Size=size,
                                      Location=f"http://localhost:{hub.server.server_port}/cdn/{name}")
                content, first = fault.get("content", hub.files[name]), request.start or 0
                if first and first >= len(content):
                    return self.reply(416, Content_Range=f"bytes */{len(content)}")
                ranged = dict(Content_Range=f"bytes {first}-{len(content) - 1}/{len(content)}") if start else {}
                self.reply(206 if start else 200, **metadata, **ranged, Content_Length=fault.get("length", len(content) - first))
                if self.command == "GET":
                    self.send(content[first:], request, fault)

            def send(self, content, request, fault):
                if "barrier" in fault:
                    fault["barrier"].wait(timeout=30)
                for kind in ("cut", "reset", "stall"):
                    content = content[:fault.get(kind, len(content))]
                for piece in (content[i:i + 65536] for i in range(0, len(content), 65536)):
                    try:
                        self.wfile.write(piece)
                    except OSError:  # the client has gone
                        break
                    request.sent += len(piece)
                if "stall" in fault:
                    hub.stalled.set()
                    hub.closed.wait(timeout=60)
                if "reset" in fault:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())  # and not close(), which would send a FIN first
                self.close_connection = bool(fault)

            do_GET = do_HEAD = answer

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *arguments: None  # connections that clients leave are part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def gets(self, name):
        return [request for request in self.requests if request.method == "GET" and request.name == name]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

"""A local server that speaks as much of the hub's protocol as a download of a data set's files needs."""
import hashlib
import http.server
import re
import threading


class FakeHub:
    """Serves `files` {name: bytes} of any data set at `url`; `requests` counts those for each method and file."""

    def __init__(self, files):
        hub = self
        self.files, self.requests = files, []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                found = re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", self.path)
                content = hub.files.get(found[1]) if found else None
                hub.requests.append((self.command, found[1] if found else self.path))
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "bytes=0-"))[1])
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Accept-Ranges", "bytes")
                if "Range" in self.headers:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[start:])

            do_GET = do_HEAD = answer

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

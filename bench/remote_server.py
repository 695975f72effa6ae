"""The fastest S3 that Python gives: one bucket in memory, nothing checked. A process of its own, for `remote.py`."""

from __future__ import annotations

import hashlib
import re
import socketserver
import sys
import threading
from collections import defaultdict
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

RANGE = re.compile(r"bytes=(\d+)-(\d*)")
DATE = "Sat, 21 Nov 2026 12:00:00 GMT"


class Handler(socketserver.StreamRequestHandler):
    rbufsize = 1 << 20
    disable_nagle_algorithm = True
    objects: ClassVar[dict[str, bytes]] = {}
    uploads: ClassVar[dict[str, dict[int, bytes]]] = defaultdict(dict)
    lock = threading.Lock()

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, target, _ = line.decode().split(" ", 2)
            headers: dict[str, str] = {}
            while (line := self.rfile.readline().strip()) != b"":
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers.get("content-length", 0)))
            self.answer(method, target, headers, body)

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        match method:
            case "PUT" if "partNumber" in query:
                self.uploads[query["uploadId"]][int(query["partNumber"])] = body
                self.say(200, etag='"part"')
            case "PUT":
                with self.lock:
                    if "if-none-match" in headers and key in self.objects:
                        self.say(412)
                        return
                    if "if-match" in headers and headers["if-match"] != self.etag(key):
                        self.say(412)
                        return
                    self.objects[key] = body
                self.say(200, etag=self.etag(key))
            case "POST" if "uploads" in query:
                self.say(
                    200, f"<InitiateMultipartUploadResult><UploadId>{key}</UploadId></InitiateMultipartUploadResult>"
                )
            case "POST" if "uploadId" in query:
                sent = self.uploads.pop(query["uploadId"])
                self.objects[key] = b"".join(sent[number] for number in sorted(sent))
                self.say(
                    200, f"<CompleteMultipartUploadResult><ETag>{self.etag(key)}</ETag></CompleteMultipartUploadResult>"
                )
            case "GET" if "list-type" in query:
                prefix = query.get("prefix", "")
                found = "".join(
                    f"<Contents><Key>{name}</Key><LastModified>2026-11-21T12:00:00.000Z</LastModified>"
                    f"<ETag>{self.etag(name)}</ETag><Size>{len(data)}</Size></Contents>"
                    for name, data in sorted(self.objects.items())
                    if name.startswith(prefix)
                )
                self.say(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>")
            case "GET" | "HEAD" if key in self.objects:
                self.send(key, headers.get("range"), has_body=method == "GET")
            case _:
                self.say(404)

    def etag(self, key: str) -> str:
        data = self.objects.get(key)
        return "" if data is None else f'"{hashlib.md5(data[:4096], usedforsecurity=False).hexdigest()}-{len(data)}"'

    def send(self, key: str, wanted: str | None, *, has_body: bool) -> None:
        data = memoryview(self.objects[key])
        status, more = 200, ""
        if wanted and (found := RANGE.match(wanted)):
            first = int(found[1])
            last = min(int(found[2] or len(data) - 1), len(data) - 1)
            status, more = 206, f"Content-Range: bytes {first}-{last}/{len(data)}\r\n"
            data = data[first : last + 1]
        head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(data)}\r\nLast-Modified: {DATE}\r\n{more}"
        self.connection.sendall(f"{head}ETag: {self.etag(key)}\r\n\r\n".encode())
        if has_body:
            self.connection.sendall(data)

    def say(self, status: int, text: str = "", etag: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\nETag: {etag}\r\nContent-Length: {len(text)}\r\n\r\n"
        self.connection.sendall((head + text).encode())


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        sys.stdout.close()
        server.serve_forever()

"""A small S3 server for benchmarks, over TLS: objects in a directory, If-None-Match, an added delay for each request.

moto takes about 30 ms of a core for a PUT, which would be most of what is measured. This one takes a few, checks no signature,
and knows only what the programs that are compared ask for. It is no reference for what S3 does: tests use moto.

    python s3_stand_in.py --directory DIR --certificate FILE --key FILE [--delay-ms 30]

prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import ssl
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

LAST_MODIFIED = "Tue, 01 Jan 2030 00:00:00 GMT"
LAST_MODIFIED_ISO = "2030-01-01T00:00:00.000Z"
ENTRIES_MAX = 1000
SHA256_HEADER = "x-amz-checksum-sha256"


@dataclass(frozen=True, slots=True)
class Stored:
    """An object; its content lies in a file."""

    path: Path
    size_bytes: int
    etag: str
    metadata: dict[str, str]
    """And the SHA-256, where it came with one."""

    @property
    def headers(self) -> dict[str, str]:
        return {"ETag": f'"{self.etag}"', "Last-Modified": LAST_MODIFIED, **self.metadata}


@dataclass
class StandIn:
    """All buckets are there; a key is `<bucket>/<name>`."""

    directory: Path
    delay_s: float = 0.0
    objects: dict[str, Stored] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        self.requests += 1
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        bucket, _, name = request.path.lstrip("/").partition("/")
        if not name:
            return await self._bucket(request, bucket)
        handler = getattr(self, f"_{request.method.lower()}")
        answer: web.Response = await handler(request, f"{bucket}/{name}")
        return answer

    async def _bucket(self, request: web.Request, bucket: str) -> web.Response:
        if request.method == "GET":
            return self._list(request, bucket)
        if request.method == "POST" and "delete" in request.query:
            text = await request.text()
            for part in text.split("<Key>")[1:]:
                self.objects.pop(f"{bucket}/{part.partition('</Key>')[0]}", None)
            return _xml("<DeleteResult></DeleteResult>")
        return web.Response()

    def _list(self, request: web.Request, bucket: str) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        after = request.query.get("continuation-token") or request.query.get("start-after", "")
        contents: list[tuple[str, Stored]] = []
        folders: list[str] = []
        last = ""
        for key in sorted(self.objects):
            name = key.removeprefix(f"{bucket}/")
            if name == key or not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                name = prefix + rest.partition(delimiter)[0] + delimiter
            if name <= after or name in folders:
                continue
            if len(contents) + len(folders) == ENTRIES_MAX:
                break
            last = name
            if name.endswith(delimiter or "\0"):
                folders.append(name)
            else:
                contents.append((name, self.objects[key]))
        else:
            last = ""
        text = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{LAST_MODIFIED_ISO}</LastModified>"
            f"<ETag>&quot;{found.etag}&quot;</ETag><Size>{found.size_bytes}</Size></Contents>"
            for name, found in contents
        )
        text += "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if last else ""
        return _xml(
            f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>{str(bool(last)).lower()}</IsTruncated>"
            f"{more}{text}</ListBucketResult>"
        )

    async def _put(self, request: web.Request, key: str) -> web.Response:
        body = await request.read()
        if "uploadId" in request.query:
            self.parts[request.query["uploadId"]][int(request.query["partNumber"])] = body
            return web.Response(headers={"ETag": f'"{_md5(body)}"'})
        return self._store(request, key, body, _md5(body))

    async def _post(self, request: web.Request, key: str) -> web.Response:
        if "uploads" in request.query:
            upload = uuid.uuid4().hex
            self.parts[upload] = {}
            return _xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        parts = [body for _, body in sorted(self.parts.pop(request.query["uploadId"]).items())]
        digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts)
        answer = self._store(request, key, b"".join(parts), f"{_md5(digests)}-{len(parts)}")
        if answer.status != 200:
            return answer
        return _xml(
            f"<CompleteMultipartUploadResult><ETag>{self.objects[key].etag}</ETag></CompleteMultipartUploadResult>"
        )

    def _store(self, request: web.Request, key: str, body: bytes, etag: str) -> web.Response:
        if request.headers.get("If-None-Match") == "*" and key in self.objects:
            return _error(412, "PreconditionFailed")
        sha256 = request.headers.get(SHA256_HEADER)
        if sha256 is not None and base64.b64decode(sha256) != hashlib.sha256(body).digest():
            return _error(400, "BadDigest")
        path = self.directory / uuid.uuid4().hex
        path.write_bytes(body)
        before = self.objects.get(key)
        metadata = {name: value for name, value in request.headers.items() if name.lower().startswith("x-amz-meta-")}
        told = {} if sha256 is None else {SHA256_HEADER: sha256}
        self.objects[key] = Stored(path, len(body), etag, metadata | told)
        if before is not None:
            before.path.unlink()
        return web.Response(headers={"ETag": f'"{etag}"', **told})

    async def _get(self, request: web.Request, key: str) -> web.Response:
        found = self.objects.get(key)
        if found is None:
            return _error(404, "NoSuchKey")
        return web.Response(body=found.path.read_bytes(), headers=found.headers)

    async def _head(self, request: web.Request, key: str) -> web.Response:
        found = self.objects.get(key)
        if found is None:
            return web.Response(status=404)
        return web.Response(headers={**found.headers, "Content-Length": str(found.size_bytes)})

    async def _delete(self, request: web.Request, key: str) -> web.Response:
        found = self.objects.pop(key, None)
        if found is not None:
            found.path.unlink()
        return web.Response(status=204)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _xml(text: str) -> web.Response:
    return web.Response(text=f'<?xml version="1.0" encoding="UTF-8"?>{text}', content_type="application/xml")


def _error(status: int, code: str) -> web.Response:
    answer = _xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")
    answer.set_status(status)
    return answer


async def serve(server: StandIn, tls: ssl.SSLContext | None) -> None:
    """Until cancelled; prints the port."""
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(arguments.certificate, arguments.key)
    asyncio.run(serve(StandIn(arguments.directory, arguments.delay_ms / 1000), tls))


if __name__ == "__main__":
    main()

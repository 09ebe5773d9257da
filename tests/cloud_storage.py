"""A Cloud Storage emulator, complete enough for gcsfs, google-cloud-storage and TensorStore."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


@dataclass
class Emulator:
    """What it is told of every object that is about to be written: its name."""

    on_write: Callable[[str], object] = lambda name: None


@contextmanager
def emulate(bucket: str) -> Iterator[Emulator]:
    """Serve an empty bucket; this process and those it starts find it by the environment."""
    running: Any = server.create_server("localhost", 0, in_memory=True, default_bucket=bucket)
    told, create, send, read, upload = (
        Emulator(),
        running._storage.create_file,
        objects.download,
        server._read_data,
        objects._multipart_upload,
    )

    def create_file(bucket: str, name: str, *contents: Any) -> None:
        told.on_write(name)
        create(bucket, name, *contents)

    def multipart_upload(request: Any, response: Any, storage: Any) -> None:
        bucket, name = request.params["bucket_name"], request.data["meta"]["name"]
        if request.query.get("ifGenerationMatch") == ["0"]:  # which the emulator does not know
            with suppress(NotFound):
                storage.get_file_obj(bucket, name)
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        upload(request, response, storage)

    def download(request: Any, response: Any, storage: Any) -> None:
        send(request, response, storage)
        if response.status < 300:  # TensorStore asks for what the emulator leaves out
            file = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["X-Goog-Generation"] = file["generation"]

    def read_data(handler: Any, query: Any) -> Any:
        kind = handler.headers.get("Content-Type") or ""
        if not kind.startswith("multipart/related"):
            return read(handler, query)
        # read as mail, binary contents that end in "\r" would lose it
        boundary = b"--" + kind.partition("boundary=")[2].strip("\"'").encode()
        _, about, content, _ = server._read_raw_data(handler).split(boundary)
        return {
            "meta": json.loads(about[about.index(b"{") :]),
            "content": content.partition(b"\n\n")[2].removesuffix(b"\n"),
            "content-type": "application/octet-stream",
        }

    running._storage.create_file = create_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "download", download)
        patch.setattr(objects, "_multipart_upload", multipart_upload)
        patch.setattr(server, "_read_data", read_data)
        running.start()
        url = f"http://localhost:{running._api._httpd.server_port}"
        for name, value in {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "tests",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask for credentials first
        }.items():
            patch.setenv(name, value)
        yield told
        running.stop()

# SPDX-License-Identifier: Apache-2.0
"""A storage emulator on the loopback, as a bucket that a run keeps its files in."""

import contextlib
import socket

from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

BUCKET = "pod"


def with_generation(download):
    """The emulator's download with the header by which TensorStore knows what it has read."""

    def handler(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        with contextlib.suppress(Exception):  # there is no such object, as the answer says
            params = request.params
            found = storage.get_file_obj(params["bucket_name"], params["object_id"])
            response["x-goog-generation"] = found["generation"]

    return handler


@contextlib.contextmanager
def emulator():
    """Serves gs://pod; yields the environment variables by which programs find it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain, objects.download = objects.download, with_generation(objects.download)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    address = f"http://127.0.0.1:{port}"
    try:
        yield dict(
            STORAGE_EMULATOR_HOST=address,
            TENSORSTORE_GCS_HTTP_URL=address,
            CLOUD_STORAGE_EMULATOR_ENDPOINT=address,  # for ArrayRecord
            GOOGLE_AUTH_TOKEN_FOR_TESTING="token",
            GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
            NO_GCE_CHECK="true",
        )
    finally:
        server.stop()
        objects.download = plain

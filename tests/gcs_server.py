"""gs://bucket on this machine: ``python tests/gcs_server.py PORT``, with what the emulator leaves out and TensorStore needs.

That is the generation of what is downloaded, and writes that are made only where nobody else has written meanwhile.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_download, _insert = objects.download, objects.insert


def _generation(storage, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, **kwargs):
    """As before, and says which generation it is."""
    _download(request, response, storage, *args, **kwargs)
    response["x-goog-generation"] = _generation(storage, request.params["bucket_name"], request.params["object_id"])


def insert(request, response, storage, *args, **kwargs):
    """As before, where the object is of the generation that is wanted."""
    wanted, name = (request.query.get(key, [""])[0] for key in ("ifGenerationMatch", "name"))
    if wanted and name and wanted != _generation(storage, request.params["bucket_name"], name):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    _insert(request, response, storage, *args, **kwargs)


objects.download, objects.insert = download, insert

from gcp_storage_emulator.server import create_server  # noqa: E402  its routes hold the two functions

if __name__ == "__main__":
    create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()

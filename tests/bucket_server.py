"""A real S3 server (moto) on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""What the environment of a client must say, beside AWS_ENDPOINT_URL."""

ADDRESS = "s3://scans/lab/ct"


@contextmanager
def bucket_server(folder: Path, log: Path) -> Iterator[str]:
    """Host and port of a server that has a folder's files below ADDRESS."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    host, port = place.split(":")
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", host, "-p", port], stdout=out, stderr=out
        )
        try:
            keys = {name.lower(): value for name, value in list(CREDENTIALS.items())[:2]}
            client = boto3.client(
                "s3", endpoint_url=f"http://{place}", region_name="us-east-1", **keys
            )
            for attempt in range(100):
                try:
                    client.create_bucket(Bucket="scans")
                    break
                except Exception:
                    if server.poll() is not None or attempt == 99:
                        raise
                    time.sleep(0.1)
            for file in folder.rglob("*"):
                if file.is_file():
                    client.upload_file(str(file), "scans", f"lab/ct/{file.relative_to(folder)}")
            yield place
        finally:
            server.terminate()
            server.wait()

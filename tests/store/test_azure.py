"""The suite of stores on Azurite, Azure's own emulator: an npm package, so only where KVIST_AZURITE names it.

npm install azurite && pip install azure-storage-blob
KVIST_AZURITE=node_modules/.bin/azurite-blob pytest tests/store/test_azure.py
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

pytest.importorskip("obstore")

from kvist.store import Store, open_store
from kvist.testing.objects import running, wait_until_it_answers
from kvist.testing.store import StoreTests

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's account, the same everywhere and in its manual."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    command = os.environ.get("KVIST_AZURITE")
    if not command:
        pytest.skip("KVIST_AZURITE does not name azurite-blob")
    blob = pytest.importorskip("azure.storage.blob")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--blobPort", str(port)]
    with running([command, *arguments], stdout=subprocess.DEVNULL):
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        wait_until_it_answers(endpoint)
        blob.BlobServiceClient(endpoint, credential=KEY).create_container("kvist")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
            yield endpoint


class TestAzurite(StoreTests):
    @pytest.fixture(autouse=True)
    def use(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def make_store(self, tmp_path: Path) -> Store:
        return open_store(f"az://kvist/{uuid4().hex}?account={ACCOUNT}&endpoint={self.endpoint}")

    def reopen(self, store: Store) -> Store:
        return open_store(store.url)

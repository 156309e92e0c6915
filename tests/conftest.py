"""What all tests share: a world without network and without the user's own settings, a server and a tiny student."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


# The libraries read these when they are imported, so they stand before anything else.
# Not HF_HUB_OFFLINE: it forbids calls to the loopback server as well. The Hub is a port where nobody listens.
os.environ.update(
    HF_HOME=tempfile.mkdtemp(prefix="hf_reflect-tests-"),
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # a tiny model is slower on two cores than on one, and much slower on two busy ones
    NO_PROXY="*",
)
for name in ("http_proxy", "https_proxy", "all_proxy", "hf_token", "hf_reflect_api_key", "hugging_face_hub_token"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)

from oracle_server import OracleServer  # noqa: E402


@pytest.fixture
def server() -> Iterator[OracleServer]:
    """An oracle on a loopback socket, which reflects usefully unless it is given a `rule`."""
    with OracleServer() as running:
        yield running


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Where a fresh journal will be."""
    return tmp_path / "journal.sqlite3"


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny real causal LM."""
    from tiny import save_tiny_model

    return str(save_tiny_model(tmp_path_factory.mktemp("student")))

"""A server that imitates vLLM's, and a client of it."""

import pytest

from fake_vllm import serving
from ragkv import rag


@pytest.fixture
def fake():
    with serving() as found:
        yield found


@pytest.fixture
def server(fake):
    return rag.Server(fake.url)

"""The tests' own server, one for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from faulty_server import FaultyServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    # Only here: without the server extra other tests of this folder are still collected.
    from faulty_server import FaultyServer
    from served import KEY, VOCABULARY

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = FaultyServer(VOCABULARY)
    yield made
    made.close()

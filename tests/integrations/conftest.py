from __future__ import annotations

from pathlib import Path

import pytest
from integrations.corpus import cleaned_corpus


@pytest.fixture(scope="session")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run over 200 records."""
    return cleaned_corpus(tmp_path_factory.mktemp("corpus"))

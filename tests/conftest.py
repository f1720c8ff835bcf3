"""What every suite may use."""

from pathlib import Path

import pytest

from serving.models.fetch import fetch_model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, the model of the demo: 9 query heads over 3 key/value heads, tied embeddings, Q4_1."""
    return fetch_model("smollm2-135m-instruct")

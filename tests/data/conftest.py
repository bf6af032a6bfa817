"""Fixtures for rows that are rendered into stores."""

from pathlib import Path

import pytest

from minorca.config import DataConfig, Source
from tests.data.samples import FORMATS, records, write
from tests.data.test_tokenizer import orca


@pytest.fixture
def model(tmp_path) -> Path:
    return orca(tmp_path / "model")


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Two sources, in a store of their own."""
    rows = write(tmp_path / "rows.jsonl", records(60))
    turns = write(tmp_path / "turns.parquet", FORMATS["sharegpt"][0])
    return DataConfig([Source(rows), Source(turns, "sharegpt")], store=str(tmp_path / "store"))

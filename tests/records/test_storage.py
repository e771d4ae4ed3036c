"""Whole files only, and values that JSON can hold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ssl_bench.records.storage import atomic_file, jsonable, restored


def test_an_atomic_file_keeps_the_old_contents_when_the_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_jsonable_and_restored_are_inverse_for_numbers() -> None:
    value = {"a": [1, 2.5, math.inf, -math.inf], "b": {"c": None, "d": True, "e": "text"}}
    assert restored(json.loads(json.dumps(jsonable(value), allow_nan=False))) == value
    assert jsonable({"p": Path("x"), "s": {2, 1}, 3: np.int64(4)}) == {"p": "x", "s": [1, 2], "3": 4}

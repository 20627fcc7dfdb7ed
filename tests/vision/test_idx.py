"""The four idx files: read exactly, found in either layout, refused with a way out where they are not whole."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qtrain.errors import DataError
from qtrain.vision.files import find_files
from qtrain.vision.idx import read_idx


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    array=st.integers(1, 3).flatmap(lambda n: arrays(np.uint8, st.tuples(*[st.integers(0, 5)] * n))),
    packed=st.booleans(),
)
def test_round_trip(tmp_path: Path, array: np.ndarray, packed: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = read_idx(path, array.ndim)
    assert read.shape == array.shape and read.dtype == np.uint8
    assert np.array_equal(read, array)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, 27))
def test_a_file_that_was_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "labels"
    path.write_bytes(idx(np.arange(20, dtype=np.uint8))[:cut])
    with pytest.raises(DataError, match="it (ends|holds)") as caught:
        read_idx(path, 1)
    assert str(path) in str(caught.value) and "apt install" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 a zip file", "it begins with 50 4b 03 04"),
        (struct.pack(">HBBI", 0, 8, 3, 1) + bytes(8), "begins with 00 00 08 01"),
        (struct.pack(">HBBI", 0, 13, 1, 1) + bytes(4), "it begins with 00 00 0d 01"),
        (idx(np.zeros(4, np.uint8)) + b"more", "it holds 8 values of 4"),
        (gzip.compress(idx(np.zeros(400, np.uint8)))[:-9], "cannot be read"),
        (gzip.compress(bytes(range(256)) * 4)[:60] + b"?" * 40, "cannot be read"),
    ],
    ids=["a-zip", "images-for-labels", "floats", "too-long", "gz-cut-off", "gz-damaged"],
)
def test_what_is_no_such_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_idx(path, 1)


@pytest.mark.parametrize("folder", ["", "raw", "FashionMNIST/raw"])
def test_files_are_found_in_both_layouts(fashion: Path, tmp_path: Path, folder: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(fashion, root / folder)
    found = find_files(str(root))
    assert found["train"].images == root / folder / "train-images-idx3-ubyte.gz"
    assert found["test"].labels == root / folder / "t10k-labels-idx1-ubyte"
    assert read_idx(found["train"].images, 3).shape == (64, 28, 28)


def test_missing_files_are_named_with_both_ways_to_get_them(fashion: Path) -> None:
    with pytest.raises(DataError) as caught:
        find_files(str(fashion / "elsewhere"))
    message = str(caught.value)
    assert (
        "no such directory" in message and "apt install dataset-fashion-mnist" in message and "torchvision" in message
    )
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"no t10k-labels-idx1-ubyte\[\.gz\]"):
        find_files(str(fashion))

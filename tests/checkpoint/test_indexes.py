"""Untrusted text: indexes and manifests say what is wrong, and never lead outside of their folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.checkpoint.folder import read_index
from shardwright.checkpoint.manifest import parse_manifest
from shardwright.errors import CheckpointError
from shardwright.untrusted import is_plain_name

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.sampled_from(["..", ".", "", "a", "model.safetensors", "C:", "\\", "\0", "~", "a.safetensors"])
PATHS = st.builds("/".join, st.lists(PARTS, min_size=1, max_size=4)) | st.text(max_size=8)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_text_is_an_index_or_is_refused(text: bytes) -> None:
    with suppress(CheckpointError):
        assert isinstance(read_index(text, "index"), dict)


@given(st.dictionaries(st.text(max_size=3), PATHS, max_size=4))
def test_an_index_names_files_of_its_folder_only(places: dict[str, str]) -> None:
    folder = Path("/some/folder")
    with suppress(CheckpointError):
        for file in read_index(json.dumps({"weight_map": places}).encode(), "index").values():
            assert (folder / file).resolve().parent == folder
            assert is_plain_name(file)


@given(st.text(max_size=40) | JSON.map(json.dumps))
def test_any_text_is_a_manifest_or_is_refused(text: str) -> None:
    with suppress(CheckpointError):
        assert isinstance(parse_manifest(text, "manifest"), dict)


@given(st.dictionaries(PATHS, st.tuples(st.integers(0), st.text(max_size=4)), max_size=4))
def test_a_manifest_names_files_of_its_folder_only(files: dict[str, tuple[int, str]]) -> None:
    folder = Path("/some/folder")
    with suppress(CheckpointError):
        for file in parse_manifest(json.dumps({"files": files}), "manifest"):
            assert (folder / file).resolve().is_relative_to(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "x.bin"]
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(CheckpointError, match="plain names"):
        read_index(json.dumps({"weight_map": {"a": name}}).encode(), "index")

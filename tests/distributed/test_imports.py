"""Objects at dotted paths."""

from __future__ import annotations

import collections.abc
import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from shardwright.distributed.parallelizer import import_class_from_path, import_classes_from_paths


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("torch.optim.AdamW", torch.optim.AdamW),
        ("torch.optim", torch.optim),
        ("torch", torch),
        ("torch.nn.Linear.forward", torch.nn.Linear.forward),
        ("collections.abc.Mapping", collections.abc.Mapping),
        ("transformers.LlamaForCausalLM", LlamaForCausalLM),
    ],
)
def test_finds(path: str, found: object) -> None:
    assert import_class_from_path(path) is found


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("torch.optim.AdmaW", "AdmaW"),
        ("torch.optimm.AdamW", "optimm"),
        ("tortch.optim.AdamW", "tortch"),
        ("torch.nn.Linear.nothing", "nothing"),
        ("torch..nn", "torch..nn"),
        ("", "''"),
        (".nn", ".nn"),
        ("torch.nn.", "torch.nn."),
        ("not a path", "not a path"),
    ],
)
def test_names_the_part_that_failed(path: str, part: str) -> None:
    with pytest.raises(ImportError, match=part) as caught:
        import_class_from_path(path)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("path", [None, 3, torch.nn.Linear])
def test_something_that_is_no_string(path: object) -> None:
    with pytest.raises(ValueError, match="dotted path"):
        import_class_from_path(path)  # type: ignore[arg-type]


def test_a_module_that_fails_while_it_is_imported(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="a_package_nobody_has"):
        import_class_from_path("needs_more.thing")


def test_a_list_skips_what_cannot_be_imported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = import_classes_from_paths(["torch.nn.Linear", "torch.nn.Linera", "no.such", "torch.nn.ReLU"])
    assert found == [torch.nn.Linear, torch.nn.ReLU]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "torch.nn.Linera" in warnings[0]
    assert "no.such" in warnings[1]
    assert import_classes_from_paths([]) == []

"""Private names of other packages are used in one file each, where a new version of the package is looked at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shardwright
from shardwright import _torch, _transformers

ROOT = Path(shardwright.__file__).parent
FILES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
HOMES = {
    "_torch.py",
    "_transformers.py",
    "distributed/apply/megatron_fsdp/engine.py",  # megatron-fsdp's
    "hf/accelerator.py",  # accelerate's
    "hf/trainer.py",  # those of transformers.Trainer
}
# What modules keep their contents in has been the same since torch 1.0; Python documents the other two.
KNOWN = {"_parameters", "_buffers", "_modules", "_current_frames", "_exit"}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.AST) -> Iterator[str]:
    """Every name that a file gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every private module, name or attribute that may be another package's."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if not module.startswith("shardwright"):
                if any(map(_is_private, module.split("."))):
                    yield node.lineno, module
                yield from ((node.lineno, f"{module}.{a.name}") for a in node.names if _is_private(a.name))
            case ast.Import():
                yield from ((node.lineno, a.name) for a in node.names if any(map(_is_private, a.name.split("."))))
            case ast.Attribute(value=ast.Name(id="_aten")):
                pass  # operations are torch's public instruction set; many of their names begin so
            case ast.Attribute(ctx=ast.Load()) if _is_private(node.attr):
                yield node.lineno, node.attr
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                if _is_private(name):
                    yield node.lineno, name


OWN = {name for file, tree in FILES.items() if file not in HOMES for name in _defined(tree)}


def test_no_private_name_of_another_package_outside_its_file() -> None:
    found = {
        file: uses
        for file in sorted(set(FILES) - HOMES)
        if (uses := [use for use in _used(FILES[file]) if use[1] not in KNOWN | OWN])
    }
    assert found == {}


def test_every_use_is_there() -> None:
    """With the versions that are installed: ``make test-oldest`` runs this with the oldest ones."""
    assert [name for name in _torch.__all__ if not hasattr(_torch, name)] == []
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, use_cache=False
    )
    model = _transformers.make_from_config(LlamaForCausalLM, config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert list(_transformers.kept_in_float32(model, torch.bfloat16)) == []
    assert _transformers.own_tp_plan(model)["model.layers.*.mlp.down_proj"] == "rowwise"
    assert list(_transformers.names_not_saved(model)) == list(_transformers.names_missing_by_design(model)) == []
    assert _transformers.conversions_of(model) is None
    _transformers.set_conversions(model, [])
    assert _transformers.conversions_of(model) == []
    _transformers.set_attention(model.config, "eager")
    _transformers.set_experts_implementation(model.config, "eager")
    assert _transformers.attention_of(model.config) == "eager"
    norm = model.model.norm
    norm.weight.data.zero_()
    _transformers.initialise_module(model, norm)
    assert norm.weight.sum() == 8
    assert _transformers.own_initialiser(norm) is None


def test_the_check_finds_each_kind() -> None:
    code = """
import torch._dynamo
from torch._utils import x
from torch import _C
torch._C.f()
getattr(model, "_hidden", None)
self.public
self.__dict__
"""
    assert [name for _, name in sorted(_used(ast.parse(code)))] == [
        "torch._dynamo",
        "torch._utils",
        "torch._C",
        "_C",
        "_hidden",
    ]

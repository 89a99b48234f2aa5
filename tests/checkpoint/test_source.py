"""Where a model comes from: folders, the hub (one that this file serves), and code that comes with the weights."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from checkpoint_models import MESHES, mesh_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shardwright import load_pretrained, save_pretrained
from shardwright.checkpoint.source import local_folder
from shardwright.errors import CheckpointError, ConfigError
from shardwright.verify.ranks import RankPool

COMMIT = "c0ffee" + "0" * 34


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as fetching a repository needs; ``files`` is what ``me/model`` holds."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/me/model/revision/main":
            siblings = [{"rfilename": name} for name in self.files]
            self._send({}, json.dumps({"id": "me/model", "sha": COMMIT, "siblings": siblings}).encode(), body)
        elif path == f"/api/models/me/model/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._send({}, json.dumps(tree).encode(), body)
        elif path.startswith(f"/me/model/resolve/{COMMIT}/") and path.rpartition("/")[2] in self.files:
            data = self.files[path.rpartition("/")[2]]
            if body:
                self.asked.append(path.rpartition("/")[2])
            self._send({"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data, body)
        else:
            self.send_error(404)

    def _send(self, headers: dict[str, str], data: bytes, body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Callable[[str], Path]) -> Iterator[type[_Hub]]:
    """A hub on this machine with the repository ``me/model``, and an empty cache."""
    files = {file.name: file.read_bytes() for file in saved("llama").iterdir()}
    files |= {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"}
    served = type("Served", (_Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address := f"http://127.0.0.1:{server.server_port}")
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_name_is_fetched_once_without_pickles_and_code(hub: type[_Hub]) -> None:
    folder = local_folder("me/model")
    assert sorted(file.name for file in folder.iterdir()) == sorted({*hub.files} - {"pytorch_model.bin", "modeling.py"})
    assert all((folder / file).read_bytes() == hub.files[file] for file in hub.asked)
    fetched = len(hub.asked)
    assert local_folder("me/model") == folder
    assert len(hub.asked) == fetched
    assert (local_folder("me/model", trust_remote_code=True) / "modeling.py").is_file()


def test_what_is_neither_folder_nor_repository_is_told_in_one_paragraph(hub: type[_Hub]) -> None:
    for name in ("me/nothing", "me/../model", "/no/such/folder", "--x"):
        with pytest.raises(CheckpointError, match="There is no folder") as caught:
            local_folder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="fetching a repository of that name"):
        local_folder("me/model", revision="no-such-branch")


def test_without_a_network_nothing_hangs(hub: type[_Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    local_folder("me/model")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert (local_folder("me/model") / "config.json").is_file()  # fetched before
    with pytest.raises(CheckpointError, match="copy the folder here") as caught:
        local_folder("me/other")
    assert "\n" not in str(caught.value)


CONFIG_CODE = """
from transformers import LlamaConfig

class ShoutConfig(LlamaConfig):
    model_type = "shout"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM

from .configuration_shout import ShoutConfig

class ShoutForCausalLM(LlamaForCausalLM):
    config_class = ShoutConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


@pytest.fixture
def with_code(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with a model whose classes are in the folder."""
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model.save_pretrained(tmp_path / "shout")
    (tmp_path / "shout" / "configuration_shout.py").write_text(CONFIG_CODE)
    (tmp_path / "shout" / "modeling_shout.py").write_text(MODEL_CODE)
    config = json.loads((tmp_path / "shout" / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_shout.ShoutConfig",
        "AutoModelForCausalLM": "modeling_shout.ShoutForCausalLM",
    }
    config |= {"model_type": "shout", "architectures": ["ShoutForCausalLM"], "auto_map": auto_map}
    (tmp_path / "shout" / "config.json").write_text(json.dumps(config))
    return tmp_path / "shout"


def _refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_pretrained(folder, MESHES["fsdp2"], mesh_for(MESHES["fsdp2"]))
    return str(caught.value)


def _load_and_save(folder: Path, to: Path) -> torch.Tensor:
    config = MESHES["fsdp2"]
    model = load_pretrained(folder, config, mesh_for(config), trust_remote_code=True)
    save_pretrained(model, to)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 11)[None]).logits


def test_code_is_run_where_it_is_trusted_and_saved_with_the_weights(
    ranks2: RankPool, with_code: Path, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    for message in ranks2.run(_refused, with_code):
        assert "trust_remote_code" in message
    expected = AutoModelForCausalLM.from_pretrained(saved("llama"))(input_ids=torch.arange(3, 11)[None]).logits
    for logits in ranks2.run(_load_and_save, with_code, tmp_path / "out"):
        torch.testing.assert_close(logits, 2 * expected.detach(), rtol=1e-5, atol=1e-5)
    for file in ("configuration_shout.py", "modeling_shout.py"):
        assert (tmp_path / "out" / file).read_text() == (with_code / file).read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"].keys() >= {"AutoModelForCausalLM"}
    weights = "model.safetensors"
    assert load_file(tmp_path / "out" / weights).keys() == load_file(with_code / weights).keys()

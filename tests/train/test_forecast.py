"""What a run will take is told before it starts; one that cannot fit never has a rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwright.errors import ConfigError
from shardwright.estimate.hardware import known_machine
from shardwright.train import launch
from shardwright.train.config import load_config
from shardwright.train.forecast import Forecast, beside

CONFIG = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
tokenizer: {vocab_size: 300}
data: {paths: "stdlib:json/decoder.py", sequence_length: 24}
output: {dir: run, tensorboard: false}
sharding: {tp: 2, dp_shard: 1}
steps: 2
device: cpu
"""
DEVICE = "name: mine\nmemory_mib: {mib}\nteraflops: {{float32: 1}}\nmemory_gb_per_s: 10\nfabric: pcie4\n" \
         "gpus_per_node: 8\nsource: me\n"  # fmt: skip


def test_a_run_that_cannot_fit_has_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[Forecast | None] = []
    monkeypatch.setattr(launch, "start_ranks", lambda ranks, job, worker: started.append(Forecast.read(job)))
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "mine.yaml").write_text(DEVICE.format(mib=1000))
    with pytest.raises(ConfigError, match=r"does not fit: a rank needs 1\.\d+ of 0\.98 GiB on each mine.*require_fit"):
        launch.run_on_local_ranks(load_config("run.yaml", ["gpu=mine.yaml"]))
    assert not started
    launch.run_on_local_ranks(load_config("run.yaml", ["gpu=mine.yaml", "require_fit=false"]))
    assert "tokens/s on all ranks" in capsys.readouterr().out
    assert started[0] is not None
    assert 0 < started[0].tensors < 2**21 < started[0].needed
    launch.run_on_local_ranks(load_config("run.yaml"))
    assert started[1] is None, "nobody says what this CPU is"


def test_what_was_measured_stands_beside_it() -> None:
    text = beside(Forecast(2**30, 2**31, 1000.0), [900.0, 800.0, 950.0], 1.25, on_gpu=True)
    assert text == "Measured: 1.25 GiB allocated (estimated: 1.00 GiB of tensors), 900 tokens/s (estimated: 1,000)."


def test_devices_are_known_by_the_name_that_torch_gives_them() -> None:
    found = known_machine("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.key == "h100-80gb"
    assert known_machine("Voodoo 2") is None

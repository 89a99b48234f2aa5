"""``shardwright calibrate``: files of the machine at hand, which estimates take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from estimate_models import config_of

from shardwright.cli import main
from shardwright.errors import ConfigError
from shardwright.estimate.calibrate import command
from shardwright.estimate.calibrate.collectives import Link
from shardwright.estimate.calibrate.files import fabric_file
from shardwright.estimate.calibrate.measure import Sizes
from shardwright.estimate.hardware import load_machine

TINY = Sizes(((16, 32, 32), (64, 64, 64)), (1, 2, 32, 16), 2**16, 2, ("float32",))


def test_what_is_measured_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once, in the command; the link between ranks is another test's."""
    monkeypatch.setattr(command, "CPU", TINY)
    monkeypatch.setattr(command, "measure_local_ranks", lambda ranks, kind: Link(ranks, 40.0, 2.0, {}))
    path = tmp_path / "mine.yaml"
    done = CliRunner().invoke(main, ["calibrate", "--output", str(path), "--device", "cpu", "--ranks", "2"])
    assert done.exit_code == 0, done.output
    assert "16 x 32 x 32" in done.output
    machine = load_machine(str(path))
    measured = yaml.safe_load(path.read_text())
    assert machine.device.gpus_per_node == 2
    assert machine.inside.gb_per_s == 2.0
    assert machine.inside.latency_us == 40.0
    assert 0 < machine.efficiencies.matmul <= 1, "the best product is the peak"
    assert machine.efficiencies.memory == pytest.approx(1, abs=1e-3)  # of the peak, which is rounded
    small, large = machine.efficiencies.products or ()
    of = machine.efficiencies.of_product
    assert [of(small[0] / 2), of(small[0]), of(large[0]), of(2 * large[0])] == pytest.approx(
        [small[1], small[1], large[1], large[1]]
    )
    assert of((small[0] * large[0]) ** 0.5) == pytest.approx((small[1] * large[1]) ** 0.5)
    assert machine.device.peak("bfloat16") == measured["teraflops"]["float32"] * 1e12
    config_of("llama").save_pretrained(tmp_path / "model")
    words = [
        "estimate",
        str(tmp_path / "model"),
        "--gpus",
        "2",
        "--gpu",
        str(path),
        "--seq-len",
        "32",
        "--json",
        "tp=2",
    ]
    found = json.loads(CliRunner().invoke(main, words).output)
    assert found["gpu"] == "mine"
    assert found["speed"]["tensor_parallel_seconds"] > 0
    again = CliRunner().invoke(main, ["calibrate", "--output", str(path), "--device", "cpu"])
    assert "exists" in again.output


def test_peaks_of_a_datasheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "CPU", TINY)
    path = tmp_path / "mine.yaml"
    command.run(path, device="cpu", ranks=1, like="h200", fabric=None)
    machine, h200 = load_machine(str(path)), load_machine("h200")
    assert machine.device.teraflops == h200.device.teraflops
    assert machine.inside == h200.inside
    assert 0 < machine.efficiencies.matmul < 1
    assert 0 < machine.efficiencies.memory < 1


def test_collectives_of_real_ranks() -> None:
    from shardwright.estimate.calibrate import collectives

    link = collectives.measure_local_ranks(2, "cpu")
    assert link.ranks == 2
    assert link.latency_us > 0 < link.gb_per_s
    assert set(link.seconds) == set(collectives.KINDS)
    assert fabric_file(link, "mine", "today")["efficiency"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [({"device": "cuda"}, "sees no GPU"), ({"like": "h1000"}, "no device 'h1000'"), ({"output": "x"}, "end in .yaml")],
)
def test_what_cannot_be_measured(tmp_path: Path, words: dict[str, str], message: str) -> None:
    said = {"device": "cpu", "ranks": 1, "like": None, "fabric": None} | words
    output = tmp_path / str(said.pop("output", "mine.yaml"))
    with pytest.raises(ConfigError, match=message):
        command.run(output, **said)  # type: ignore[arg-type]

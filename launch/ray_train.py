"""Train with Ray Train, one worker for each rank.

    python launch/ray_train.py run.yaml --workers 16 --gpus [KEY=VALUE]...
    python launch/ray_train.py run.yaml --workers 16 --gpus --check      shardwright launch-check, instead

A worker that dies ends the others; Ray starts them anew, and they go on from the newest checkpoint
(``checkpoint.every``).
The files that the config names, and ``output.dir``, are read and written on the workers' machines: put them on a disk
that all of them see, and use full paths.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import click
import ray.train
from ray.train.backend import BackendConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from shardwright.launch_check.start import start as start_check
from shardwright.train.start import start


def work(job: dict[str, object]) -> None:
    """What one worker does: it takes its place from Ray, in the words of torchrun, and trains."""
    context = ray.train.get_context()
    mine = (ray.util.get_node_ip_address(), free_port()) if context.get_world_rank() == 0 else None
    address, port = broadcast_from_rank_zero(mine)
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    os.chdir(str(job["folder"]))
    if job["check"]:
        start_check((str(job["config"]), *job["overrides"]), timeout=120.0)
    else:
        start(Path(str(job["config"])), (*job["overrides"], "checkpoint.resume=true"))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


@click.command()
@click.argument("config", type=click.Path(exists=True, resolve_path=True))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--workers", default=1, help="How many ranks.")
@click.option("--gpus", is_flag=True, help="Give each a GPU.")
@click.option("--restarts", default=3, help="How often they are started anew.")
@click.option("--check", is_flag=True, help="Look at the ranks and their links only.")
def main(config: str, overrides: tuple[str, ...], workers: int, gpus: bool, restarts: int, check: bool) -> None:
    """Train as the YAML file CONFIG says, on a Ray cluster (that of RAY_ADDRESS, else one of this machine)."""
    trainer = DataParallelTrainer(
        work,
        train_loop_config={"config": config, "overrides": overrides, "folder": os.getcwd(), "check": check},
        backend_config=BackendConfig(),  # shardwright makes the process group itself
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=0 if check else restarts)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()

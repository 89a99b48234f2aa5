#!/usr/bin/env bash
# Train with torchrun on one machine or several. Start the same line on each; the first one is named by all:
#
#   launch/torchrun.sh 1 gpu localhost:29400 run.yaml          one machine, a rank for each of its GPUs
#   launch/torchrun.sh 4 8 head:29400 run.yaml [KEY=VALUE]...  four machines of eight ranks; head is one of them
#   launch/torchrun.sh 2:4 8 head:29400 run.yaml               two to four: whatever is there (dp_shard: -1)
#
# When a rank dies, all are started anew, three times at most, and go on from the newest checkpoint (checkpoint.every).
set -eu
nodes=$1 ranks=$2 head=$3
shift 3
exec torchrun --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head" --rdzv-id=shardwright \
    -m shardwright.cli train "$@" checkpoint.resume=true

#!/usr/bin/env bash
# Train with Open MPI's launcher; MPI itself is not used. MASTER_ADDR is the first machine of the list:
#
#   mpirun -n 16 --map-by ppr:8:node --hostfile hosts -x MASTER_ADDR=head -x MASTER_PORT=29500 \
#       launch/mpi-rank.sh shardwright train run.yaml [KEY=VALUE]...
#
# Tells the command its place in the words of torchrun.
set -eu
export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
export LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK LOCAL_WORLD_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE
exec "$@"

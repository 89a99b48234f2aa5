"""The axes of a mesh, and what ranks along each have in common: one table, from which everything else follows.

=============== ========= ========= ================= ==================
axis            one model one batch shards parameters averages gradients
=============== ========= ========= ================= ==================
``dp_replicate`` yes       no                          yes
``dp_shard``     yes       no        yes               yes
``cp``           yes       yes       yes               yes
``tp``           yes       yes       by style
=============== ========= ========= ================= ==================

Ranks that share a batch each work on a part of it or of the model: they must be given the same one.

Experts see the same ranks in another way. What ``dp_shard x cp x tp`` numbers is folded anew, into ``efsdp x ep``:
every rank of an ``ep`` group holds experts of its own, and FSDP2 shards them over ``efsdp``. Neighbouring ranks share
an ``ep`` group. It is a view of ranks that are there already, and no further factor of the world size.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        name: in a mesh made by :func:`shardwright.make_mesh`.
        one_batch: whether the ranks along it are given the same batch.
        shards_parameters: whether FSDP2 shards parameters along it.
        averages_gradients: whether FSDP2 averages gradients along it.
    """

    name: str
    one_batch: bool
    shards_parameters: bool
    averages_gradients: bool


# From the outermost to the innermost: neighbouring ranks share a tp group.
AXES = (
    Axis("dp_replicate", one_batch=False, shards_parameters=False, averages_gradients=True),
    Axis("dp_shard", one_batch=False, shards_parameters=True, averages_gradients=True),
    Axis("cp", one_batch=True, shards_parameters=True, averages_gradients=True),
    Axis("tp", one_batch=True, shards_parameters=False, averages_gradients=False),
)
NAMES = tuple(axis.name for axis in AXES)

# Name of a flattened axis -> the axes it is made of. The first three names are those of NeMo Automodel's meshes.
DATA = "dp"
SHARDED = "dp_shard_cp"
AVERAGED = "dp_cp"
FLATTENED = {
    DATA: tuple(axis.name for axis in AXES if not axis.one_batch),
    SHARDED: tuple(axis.name for axis in AXES if axis.shards_parameters),
    AVERAGED: tuple(axis.name for axis in AXES if axis.averages_gradients),
}
# The view for experts, and the axes that it folds anew.
EXPERT_SHARDS = "efsdp"
EXPERTS = "ep"
FOLDED = (*FLATTENED[SHARDED], "tp")
# Nobody asks for this one, but DTensor finds it: a norm over all shards is then one all-reduce instead of two.
EVERY_SHARD = ("dp_shard_cp_tp", FOLDED)

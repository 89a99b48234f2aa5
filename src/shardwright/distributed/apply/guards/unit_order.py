"""Data-parallel ranks that run FSDP2's units in orders that do not go together: an error on every rank, not a hang.

All ranks go through the units in one order, in which any rank may leave units out (:mod:`..skipped_units`). A rank that
runs a unit again, or one that stands in front of the last, leaves that order. It knows so before it gathers anything,
and the others may not: they wait in the gather of another unit. So it meets them in the store of the process group.

- All ranks come: from then on, this unit at this place belongs to the order. A loop over layers meets in its first
  forward only, and ranks may then take fewer turns than the longest that all have taken together.
- All come, with different units: every rank raises.
- A rank does not come, and has gone further in the order: it will not come. Its main thread may wait in a collective
  for ever, so a thread of its own answers. That thread writes the error to the log, and the main thread raises it as
  soon as it is free.

The thread looks for a question once in a few seconds, as torch's own monitor of NCCL does.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.errors import PlanError

logger = logging.getLogger(__name__)

_PATIENCE = 1.0  # seconds after which a rank asks where those are that have not come
_LOOK = 2.0  # seconds between two looks for such a question
_FAREWELL = 10.0  # seconds in which all ranks hear of an error, before the first one raises it
_SHOWN = 4  # ranks that an error names one by one


class UnitOrder:
    """Where this rank is in the order of all ranks.

    Args:
        ranks: the data-parallel ranks that go through the units together.
        rank: of this process among all.
        store: where they meet; None where nothing is exchanged.
    """

    def __init__(self, ranks: Sequence[int], rank: int, store: Any) -> None:
        self._ranks, self._rank, self._store = list(ranks), rank, store
        self._prefix = f"shardwright/units/{'-'.join(map(str, _ends(self._ranks)))}"
        if store is not None:
            self._prefix += f"/{store.add(f'{self._prefix}/{rank}', 1)}"
        self._place = (0, 0)  # forwards that have ended, and units behind this rank in the one that runs
        self._doing = "has not begun"
        self._turn = 0  # meetings held
        self._meets = False
        self._error: str | None = None

    @classmethod
    def watching(cls, model: nn.Module, mesh: DeviceMesh) -> UnitOrder:
        """For the ranks of ``mesh``; a thread answers for this rank as long as there is ``model``."""
        ranks = mesh.mesh.flatten().tolist()
        alone = len(ranks) == 1 or any(dist.get_backend(group) == "fake" for group in mesh.get_all_groups())
        order = cls(ranks, dist.get_rank(), None if alone else _store())
        if order._store is not None:
            ended = threading.Event()
            thread = threading.Thread(target=order._listen, args=(ended,), name="unit order", daemon=True)
            thread.start()
            # At the exit of the process, too: a thread that is inside of the store then would end it with SIGABRT.
            weakref.finalize(model, _end, thread, ended)
        return order

    def __deepcopy__(self, memo: dict[int, Any]) -> UnitOrder:
        return self  # the copy's forwards are forwards of the same ranks

    def comes_to(self, name: str, passed: int) -> None:
        """This rank runs the unit called ``name``, and has left ``passed`` units out before it."""
        self.check()
        forwards, units = self._place
        self._place, self._doing = (forwards, units + passed + 1), f"has gone on to {name!r}"

    def ends(self) -> None:
        """A forward of the model has ended."""
        self._place, self._doing = (self._place[0] + 1, 0), "has ended the forward"

    def leaves(self, name: str) -> None:
        """This rank runs the unit called ``name`` where the order has none.

        Raises:
            PlanError: other ranks do not run it here.
        """
        self.check()
        if self._store is None:
            return
        here, turn = f"{self._place} {name}", self._key(self._turn)
        self._meets = True
        self._store.set(f"{turn}/at/{self._rank}", name)
        self._store.add(f"{turn}/{here}", 1)
        if self._store.add(f"{turn}/all", 1) == len(self._ranks):
            alike = self._store.add(f"{turn}/{here}", 0) == len(self._ranks)
            self._store.set(f"{turn}/met", "alike" if alike else "")
        if not self._all_come(turn) or not self._store.get(f"{turn}/met"):
            self._part(turn)
        self._turn, self._meets = self._turn + 1, False

    def check(self) -> None:
        """Raise what was found about this rank while it did something else."""
        if self._error is not None:
            raise PlanError(self._error)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Inside, a collective that fails because other ranks have left says why they have."""
        try:
            yield
        except RuntimeError as error:
            if self._error is None:
                raise
            raise PlanError(self._error) from error

    def _key(self, turn: int) -> str:
        return f"{self._prefix}/{turn}"

    def _all_come(self, turn: str) -> bool:
        begun, asked = time.monotonic(), False
        while not self._store.check([f"{turn}/met"]):
            waited = time.monotonic() - begun
            if waited > _PATIENCE and not asked:
                self._store.set(f"{turn}/asked", " ".join(map(str, self._place)))
                asked = True
            if asked and self._store.check([f"{turn}/gone"]):
                return False
            time.sleep(min(max(waited / 10, 0.001), 0.1))
        return True

    def _part(self, turn: str) -> None:
        """Let every rank know of the error, then raise it."""
        time.sleep(_LOOK)  # others may have something to add
        error = self._store.compare_set(f"{turn}/error", "", self._describe(turn)).decode()
        away = [rank for rank in self._ranks if not self._store.check([f"{turn}/at/{rank}"])]
        begun = time.monotonic()
        while time.monotonic() - begun < _FAREWELL and away:
            away = [rank for rank in away if not self._store.check([f"{turn}/heard/{rank}"])]
            time.sleep(0.1)
        self._error = error
        raise PlanError(error)

    def _describe(self, turn: str) -> str:
        came = [rank for rank in self._ranks if self._store.check([f"{turn}/at/{rank}"])]
        units = {rank: self._store.get(f"{turn}/at/{rank}").decode() for rank in came}
        where = [f"rank {rank} runs {name!r} once more or out of turn" for rank, name in units.items()]
        for rank in self._ranks:
            if rank not in units and self._store.check([f"{turn}/doing/{rank}"]):
                where.append(f"rank {rank} {self._store.get(f'{turn}/doing/{rank}').decode()}")
        more = f" and {len(where) - 2 * _SHOWN} more" if len(where) > 2 * _SHOWN else ""
        shown = where if not more else where[:_SHOWN] + where[-_SHOWN:]
        return (
            f"Data-parallel ranks run the units of FSDP2 in orders that do not go together: in forward "
            f"{self._place[0] + 1} of the model, {', '.join(shown)}{more}. A unit's weights are gathered from all of "
            "these ranks at once. Any rank may leave units out; one that runs again, or in another order, must do so "
            "on all. Let the ranks agree on the order and on the number of turns (draw them with the same seed, or "
            "take the largest of all ranks), or let all of them take the longest way once, in their first forward: "
            "what all have run can be left out afterwards."
        )

    def _listen(self, ended: threading.Event) -> None:
        with suppress(RuntimeError):  # the store is gone: the run has ended
            while not ended.wait(_LOOK) and not self._hears():
                pass

    def _hears(self) -> bool:
        """Answer the question of a rank that waits for this one; whether there was an error."""
        turn = self._key(self._turn)
        if self._meets or not self._store.check([f"{turn}/asked"]):
            return False
        forwards, units = map(int, self._store.get(f"{turn}/asked").decode().split())
        if self._place > (forwards, units) and turn == self._key(self._turn) and not self._meets:
            self._store.set(f"{turn}/doing/{self._rank}", self._doing)
            self._store.set(f"{turn}/gone", "yes")
        if not self._store.check([f"{turn}/error"]):
            return False
        self._error = self._store.get(f"{turn}/error").decode()
        logger.error("%s", self._error)
        self._store.set(f"{turn}/heard/{self._rank}", "yes")
        return True


def _ends(ranks: list[int]) -> list[int]:
    """What tells these ranks from those of other groups of one mesh."""
    return [ranks[0], ranks[-1], len(ranks)]


def _store() -> Any:
    return dist.group.WORLD.get_group_store() if dist.group.WORLD is not None else None


def _end(thread: threading.Thread, ended: threading.Event) -> None:
    ended.set()
    if thread is not threading.current_thread():
        thread.join(timeout=1)

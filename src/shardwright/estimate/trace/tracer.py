"""``Tracer``: traces of one model, each made once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch.distributed as dist

from shardwright.distributed.replay.record import CODE_ERRORS
from shardwright.errors import ConfigError
from shardwright.estimate.subject import Subject
from shardwright.estimate.trace.formula import formula_parts
from shardwright.estimate.trace.run import traced_step
from shardwright.estimate.trace.short import shorten
from shardwright.estimate.trace.whole import Part, whole_step
from shardwright.estimate.workload import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """The parts of one forward and backward.

    Attributes:
        why_not: why the model could not be traced, so that the parts come from a formula; empty where it could.
    """

    parts: tuple[Part, ...]
    why_not: str = ""


@dataclass
class Tracer:
    """Traces, kept by what they depend on."""

    _made: dict[str, Traced] = field(default_factory=dict)

    def trace(self, subject: Subject, workload: Workload) -> Traced:
        """A forward and backward of a micro-batch on one rank.

        Raises:
            ConfigError: this process is a rank of a group already, and the trace needs one of its own.
        """
        if subject.config.tp * subject.config.cp * subject.config.ep > 1 and dist.is_initialized():
            raise ConfigError(
                "torch.distributed is initialised in this process, and an estimate with tp, cp or ep above 1 makes "
                "a group of its own. Ask for it in another process: shardwright estimate on the command line."
            )
        key = _key(subject, workload)
        if key not in self._made:
            self._made[key] = _traced(subject, workload)
        return self._made[key]


def _key(subject: Subject, workload: Workload) -> str:
    """Everything of a config that a trace depends on, as text; the degrees of data parallelism are not among it."""
    config, decided = subject.config, subject.decided
    work = (workload.batch_size, workload.seq_len, workload.loss)
    tensor = (config.tp, config.cp, config.context_method, config.ep, config.sequence_parallel, config.plan)
    blocks = (decided.recomputed, decided.activation_checkpointing, decided.compiled, decided.tiles)
    return repr((work, tensor, blocks, subject.cast, subject.output))


def _traced(subject: Subject, workload: Workload) -> Traced:
    try:
        short = shorten(subject.reading, subject.decided, subject.cast)
        segments = traced_step(short, workload, subject.config, output=subject.output)
        return Traced(tuple(whole_step(short, segments)))
    except CODE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        logger.debug("%s cannot be traced: %s", type(subject.reading.model).__name__, reason)
        return Traced(tuple(formula_parts(subject, workload.tokens)), reason)

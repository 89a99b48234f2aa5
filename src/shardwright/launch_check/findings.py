"""What looks wrong with a set of ranks, from what they say of themselves. Each finding is one sentence or two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from shardwright.launch_check.facts import RankFacts, by_group

_SLOW = 2.0  # times as long as the median rank, or group, takes
_LATE = 60.0  # seconds after the first rank
_CLOCKS = 1.0  # seconds between two clocks
_SHOWN = 8  # ranks that are named, of many


def findings(ranks: Sequence[RankFacts]) -> list[str]:
    """All that looks wrong; ``ranks`` are in their order."""
    looks = (_versions, _devices, _hosts, _tensor_parallel, _slow_ranks, _slow_groups, _clocks, _late, _settings)
    return [found for look in looks for found in look(ranks)]


def _versions(ranks: Sequence[RankFacts]) -> Iterator[str]:
    for name in ranks[0].versions:
        told = _told(ranks, lambda one, name=name: one.versions[name])  # type: ignore[misc]
        if told:
            yield f"Not all ranks have the same {name}: {told}. Install one version everywhere."


def _devices(ranks: Sequence[RankFacts]) -> Iterator[str]:
    told = _told(ranks, lambda one: one.device.partition(" (")[0])
    if told:
        yield f"Not all ranks have the same device: {told}. The slowest sets the pace of all."


def _hosts(ranks: Sequence[RankFacts]) -> Iterator[str]:
    counts = Counter(one.host for one in ranks)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{host} has {count}" for host, count in counts.items())
        yield f"Hosts have different numbers of ranks: {told}. Is a device missing, or a host given too few?"


def _tensor_parallel(ranks: Sequence[RankFacts]) -> Iterator[str]:
    if "tp" not in ranks[0].groups:
        return
    crossing = [group for group in by_group(ranks, "tp") if len({one.host for one in group}) > 1]
    if not crossing:
        return
    group, here = crossing[0], min(Counter(one.host for one in ranks).values())
    size = len(group)
    what = (
        f"Lower tp: a host has {here} ranks"
        if size > here
        else "Number the ranks host by host (srun --distribution=block, mpirun --map-by ppr:N:node)"
    )
    yield (
        f"tp crosses hosts: in {len(crossing)} of its groups, the first with "
        f"{' and '.join(f'rank {one.rank} on {one.host}' for one in _one_per_host(group))}. Each block sends its "
        f"activations along tp, so that belongs inside of a host. {what}."
    )


def _one_per_host(group: Sequence[RankFacts]) -> list[RankFacts]:
    return list({one.host: one for one in reversed(group)}.values())[::-1]


def _slow_ranks(ranks: Sequence[RankFacts]) -> Iterator[str]:
    usual = median_low(one.work for one in ranks)
    slow = [one for one in ranks if one.work > _SLOW * usual]
    if slow:
        worst = max(slow, key=lambda one: one.work)
        yield (
            f"{_named(slow)} compute slowly: a product of matrices takes rank {worst.rank} on {worst.host} "
            f"{worst.work * 1e3:.1f} ms, and {usual * 1e3:.1f} ms on the median rank. Look for another program on the "
            "device, a lowered clock, or too few cores."
        )


def _slow_groups(ranks: Sequence[RankFacts]) -> Iterator[str]:
    for name in ranks[0].groups:
        taken = [(max(one.measured[name].seconds for one in group), group) for group in by_group(ranks, name)]
        usual = median_low(seconds for seconds, _ in taken)
        seconds, group = max(taken, key=lambda pair: pair[0])
        if seconds > _SLOW * usual:
            yield (
                f"A {name} group has a slow link: {_named(group)} on {', '.join(dict.fromkeys(x.host for x in group))} "
                f"take {seconds * 1e3:.1f} ms for an all-reduce, the median group {usual * 1e3:.1f} ms."
            )


def _clocks(ranks: Sequence[RankFacts]) -> Iterator[str]:
    first, last = min(ranks, key=lambda one: one.ahead), max(ranks, key=lambda one: one.ahead)
    if last.ahead - first.ahead > _CLOCKS:
        yield (
            f"Clocks differ by {last.ahead - first.ahead:.1f} s: that of rank {last.rank} on {last.host} is ahead of "
            f"rank {first.rank}'s on {first.host}. Logs cannot be put in order, and credentials may not hold. Is the "
            "time service running?"
        )


def _late(ranks: Sequence[RankFacts]) -> Iterator[str]:
    came = {one.rank: one.came - one.ahead for one in ranks}
    last = max(ranks, key=lambda one: came[one.rank])
    late = came[last.rank] - min(came.values())
    if late > _LATE:
        yield (
            f"Rank {last.rank} on {last.host} came {late:.0f} s after the first. Was it started late, or are its "
            "packages on a slow disk?"
        )


@dataclass(frozen=True)
class _Setting:
    """An environment variable that harms.

    Attributes:
        harms: whether this value does.
        why: what it does; the sentence begins with the name and the value.
        across: whether only between hosts.
    """

    harms: Callable[[str], bool]
    why: str
    across: bool = False


def _on(value: str) -> bool:
    return value.lower() not in ("", "0", "false", "off")


def _given(value: str) -> bool:
    return value != ""


# From NCCL's user guide (environment variables; those for debugging are not for production), CUDA's programming guide
# and, for the number of connections, Megatron-LM's notes on FSDP2.
_HARMFUL = {
    "NCCL_P2P_DISABLE": _Setting(_on, "keeps GPUs of one host from writing into each other's memory"),
    "NCCL_SHM_DISABLE": _Setting(_on, "sends through the network what could go through the host's memory"),
    "NCCL_IB_DISABLE": _Setting(_on, "sends through TCP what could go through InfiniBand or RoCE", across=True),
    "NCCL_NET_GDR_LEVEL": _Setting(
        lambda value: value in ("LOC", "0"), "copies what goes to the network through the host's memory", across=True
    ),
    "NCCL_SOCKET_IFNAME": _Setting(
        lambda value: value.lstrip("=") == "lo", "looks for other hosts on the loopback interface", across=True
    ),
    "NCCL_ALGO": _Setting(_given, "takes the choice of the algorithm from NCCL, for every size"),
    "NCCL_PROTO": _Setting(
        _given, "takes the choice of the protocol from NCCL, and may corrupt data where LL128 is not safe"
    ),
    "NCCL_DEBUG": _Setting(lambda value: value.upper() in ("INFO", "TRACE"), "writes a log of every communicator"),
    "NCCL_BLOCKING_WAIT": _Setting(_on, "stops the host until a collective has ended"),
    "TORCH_NCCL_BLOCKING_WAIT": _Setting(_on, "stops the host until a collective has ended"),
    "TORCH_DISTRIBUTED_DEBUG": _Setting(
        lambda value: value.upper() == "DETAIL", "compares every collective on all ranks first"
    ),
    "CUDA_LAUNCH_BLOCKING": _Setting(_on, "waits for every kernel, so that nothing overlaps"),
    "CUDA_DEVICE_MAX_CONNECTIONS": _Setting(
        lambda value: value == "1", "keeps FSDP2's gathers from overlapping with products"
    ),
}
# Where a host's own name of a device, or a file, may well be another.
_MAY_DIFFER = ("IFNAME", "HCA", "FILE", "HOSTID", "_CPU_AFFINITY")


def _settings(ranks: Sequence[RankFacts]) -> Iterator[str]:
    if ranks[0].kind != "cuda":
        return
    several = len({one.host for one in ranks}) > 1
    for name, setting in _HARMFUL.items():
        harmed = [one for one in ranks if name in one.settings and setting.harms(one.settings[name])]
        if harmed and (several or not setting.across):
            everyone = "every rank" if len(harmed) == len(ranks) else _named(harmed)
            yield f"{name}={harmed[0].settings[name]} on {everyone}: it {setting.why}. Unset it."
    names = sorted({name for one in ranks for name in one.settings})
    for name in names:
        told = _told(ranks, lambda one, name=name: one.settings.get(name, "not set"))  # type: ignore[misc]
        if told and not any(part in name for part in _MAY_DIFFER):
            yield f"{name} differs: {told}. NCCL expects the same on all ranks."


def _told(ranks: Sequence[RankFacts], value: Callable[[RankFacts], str]) -> str:
    """Every value with the ranks that have it; nothing where all have the same."""
    having: Mapping[str, list[RankFacts]] = {}
    for one in ranks:
        having.setdefault(value(one), []).append(one)  # type: ignore[attr-defined]
    return "; ".join(f"{text} on {_named(some)}" for text, some in having.items()) if len(having) > 1 else ""


def _named(ranks: Sequence[RankFacts]) -> str:
    numbers = ", ".join(str(one.rank) for one in ranks[:_SHOWN])
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' * (len(ranks) > 1)} {numbers}{more}"

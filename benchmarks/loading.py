"""How long does a checkpoint of a few GB take to load onto two ranks, how much memory does a rank need, what is read?

The folder is written once, into the page cache of the machine, and lies there for all contenders alike. Each contender
has two ranks that stay alive; loads take turns. Bytes are counted where they are read by calls (``rchar`` in
``/proc/self/io``) and where files are mapped into memory (``RssFile``); memory is that of anonymous pages, which mapped
files do not add to, and of all.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from harness.contenders import ACCELERATE, OURS, TRANSFORMERS, Contender, Peer
from harness.layouts import Layout
from harness.results import Results, Table, arguments
from harness.shapes import write_checkpoint
from harness.statistics import ratio, ratio_text, spread

# A Llama of 1.2 billion parameters: 2.4 GB in bfloat16.
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
QUICK = {**SIZES, "num_hidden_layers": 2}
# Layout, dtype of the loaded weights, contenders. In the dtype of the files, mapped files can be used as they are.
CASES = (
    (Layout(tp=2), "bfloat16", (OURS, TRANSFORMERS)),
    (Layout(tp=2), "float32", (OURS, TRANSFORMERS)),
    (Layout(dp=2), "float32", (OURS, TRANSFORMERS)),
    (
        Layout(dp=2),
        "bfloat16",
        (OURS, TRANSFORMERS, ACCELERATE),
    ),  # accelerate takes 3.7 shards a rank: float32 would not fit
)
Case = tuple[Layout, str, tuple[Peer, ...]]
GOAL_TIME = 0.7
PER_RANK = ("anonymous", "resident", "read", "mapped", "shard")  # bytes
FLOOR = "values in memory of their own, no model"
ONCE = (ACCELERATE,)  # rank 0 loads everything and hands it out: so slow that one round has to do
STAGES = (
    "load_pretrained",
    "build_on_meta",
    "plan_load",
    "parallelize",
    "plan_and_resolve",  # in parallelize
    "apply_tensor_parallel",  # in parallelize
    "shard_blocks",  # in parallelize
    "shard_root",  # in parallelize
    "to_empty",
    "fill_from_folder",
    "fill_the_rest",
)


class Loads:
    """The loads of one case; what every one of them took, by contender and by rank."""

    def __init__(self, case: Case, folder: Path, contenders: dict[Peer, Contender]) -> None:
        self.layout, self.dtype, self.peers = case
        self.title = f"{self.layout.title}, {self.dtype}"
        self.folder = folder
        self.contenders = contenders
        self.found: dict[Peer, list[Any]] = {peer: [] for peer in self.peers}
        self.floors: list[Any] = []

    def asked(self, peer: Peer, folder: Path) -> dict[str, Any]:
        return {"peer": peer.name, "folder": str(folder), "layout": vars(self.layout), "dtype": self.dtype}

    def warm_up(self, peer: Peer) -> dict[str, str]:
        answers = self.contenders[peer].call("harness.loads:warm_up", **self.asked(peer, self.folder / "small"))
        versions: dict[str, str] = answers[0]
        return versions

    def load(self, peer: Peer) -> float:
        answers = self.contenders[peer].call("harness.loads:load", **self.asked(peer, self.folder))
        self.found[peer].append(answers)
        return max(answer["seconds"] for answer in answers)

    def floor(self) -> float:
        file = str(self.folder / "model.safetensors")
        answers = self.contenders[OURS].call("harness.loads:floor", file=file, dtype=self.dtype)
        self.floors.append({what: max(answer[what] for answer in answers) for what in answers[0]})
        seconds: float = self.floors[-1]["seconds"]
        return seconds

    def profile(self) -> dict[str, float]:
        asked = self.asked(OURS, self.folder) | {"functions": STAGES}
        seconds: dict[str, float] = self.contenders[OURS].call("harness.loads:profile", **asked)[0]
        return seconds

    def most(self, peer: Peer) -> dict[str, float]:
        """The largest of every number of bytes, over ranks and rounds."""
        each = [answer for answers in self.found[peer] for answer in answers]
        return {what: max(answer[what] for answer in each) for what in PER_RANK}

    def times(self, peer: Peer, what: str) -> list[float]:
        """Of every round, that of the rank that took longest: ``written``, ``processor``."""
        return [max(answer[what] for answer in answers) for answers in self.found[peer]]


def run(loads: Loads, rounds: int, results: Results) -> None:
    able = []
    for peer in loads.peers:
        with results.failures_of(f"{peer.title}, {loads.title}"):
            results.versions[peer.title] = loads.warm_up(peer)
            able.append(peer)
    loads.floor()  # memory that this machine has not used for a while is slow to get: not for the first contender only
    loads.floors.clear()
    seconds = take_turns(loads, able, rounds, results)
    able = [peer for peer in able if seconds[peer]]
    results.tables.append(table_of(loads, able, seconds))
    if OURS in able and len(able) > 1:
        judge(loads, able, seconds, results)


def take_turns(loads: Loads, able: list[Peer], rounds: int, results: Results) -> dict[Any, list[float]]:
    """Seconds of every round, by contender; who fails takes part no more."""
    seconds: dict[Any, list[float]] = {FLOOR: [], **{peer: [] for peer in able}}
    for turn in range(rounds):
        for who in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
            if who == FLOOR:
                seconds[who].append(loads.floor())
            elif len(seconds[who]) == turn and not (turn and who in ONCE):
                with results.failures_of(f"{who.title}, {loads.title}"):
                    seconds[who].append(loads.load(who))
    return seconds


def table_of(loads: Loads, able: list[Peer], seconds: dict[Any, list[float]]) -> Table:
    size = gigabytes(sum(file.stat().st_size for file in loads.folder.glob("*.safetensors")))
    sizes = [f"{what} GB" for what in PER_RANK]
    columns = ["contender", "median s", "spread", "ours / theirs", "processor s", "s until written", "ours / theirs"]
    columns += [*sizes, "dtype"]
    table = Table(f"{loads.title}: a checkpoint of {size} GB; sizes per rank, the largest", columns)
    for peer in able:
        written, most = loads.times(peer, "written"), loads.most(peer)
        row = [peer.title, f"{median(seconds[peer]):.2f}", spread(seconds[peer])]
        row += [against(seconds[OURS], seconds[peer]) if OURS in able else ""]
        row += [f"{median(loads.times(peer, 'processor')):.2f}"]
        row += [f"{median(written):.2f}", against(loads.times(OURS, "written"), written) if OURS in able else ""]
        row += [*(gigabytes(most[what]) for what in PER_RANK), loads.found[peer][0][0]["dtype"]]
        table.rows.append(row)
    floor = seconds[FLOOR]
    row = [FLOOR, f"{median(floor):.2f}", spread(floor), against(seconds[OURS], floor) if OURS in able else ""]
    row += [f"{median(floor['processor'] for floor in loads.floors):.2f}"]
    table.rows.append([*row, *[""] * (len(PER_RANK) + 2), loads.dtype])
    return table


def against(mine: list[float], theirs: list[float]) -> str:
    """The ratio of the rounds that both had."""
    return ratio_text(mine[: len(theirs)], theirs)


def judge(loads: Loads, able: list[Peer], seconds: dict[Any, list[float]], results: Results) -> None:
    """Time against the best peer; memory and bytes against every one."""
    peers = [peer for peer in able if peer != OURS]
    best = min(peers, key=lambda peer: median(seconds[peer]))
    value = median(ratio(seconds[OURS][: len(seconds[best])], seconds[best]))
    text = f"{loads.title}: time <= {GOAL_TIME} of the best ({best.title})"
    results.goal(text, f"{value:.2f}", value <= GOAL_TIME)
    if value > GOAL_TIME and best not in ONCE:
        results.notes.append(obstacle(loads, best, seconds))
        results.tables.append(profile_of(loads))
    most = {peer: loads.most(peer) for peer in able}
    for text, mine, theirs in (
        ("less memory than every peer", most[OURS]["resident"], [most[peer]["resident"] for peer in peers]),
        ("fewer bytes read or mapped than every peer", touched(most[OURS]), [touched(most[peer]) for peer in peers]),
    ):
        measured = f"{gigabytes(mine)} GB; theirs {', '.join(map(gigabytes, theirs))} GB"
        results.goal(f"{loads.title}: {text}", measured, mine < min(theirs))


def obstacle(loads: Loads, best: Peer, seconds: dict[Any, list[float]]) -> str:
    """What stands in the way of the goal for the time, in measured seconds."""
    new, again = (median(floor[what] for floor in loads.floors) for what in ("new memory", "memory in use"))
    least = median(ratio(seconds[FLOOR], seconds[best]))
    written = median(ratio(loads.times(OURS, "written"), loads.times(best, "written")))
    ours, theirs = loads.most(OURS), loads.most(best)
    mine, peers = (median(loads.times(peer, "processor")) for peer in (OURS, best))
    floor = median(each["processor"] for each in loads.floors)
    return (
        f"{loads.title}, what stands in the way: a rank's half of the file in memory of its own, without any model, "
        f"takes {new:.2f} s, of which {again:.2f} s are left where the memory was in use before, so the rest is the "
        f"kernel's for new pages. With one look at the values that is {least:.2f} of the time of {best.title}; in "
        f"seconds of the processor {floor:.2f}, theirs {peers:.2f} (ratio {floor / peers:.2f}), ours {mine:.2f}. Their "
        f"ranks have {gigabytes(theirs['anonymous'])} GB of their own and {gigabytes(theirs['mapped'])} GB of the "
        f"files mapped; ours have {gigabytes(ours['anonymous'])} GB of their own. Until every weight was written once "
        f"(what is mapped becomes memory of its own then) the ratio is {written:.2f}. The profile shows our time."
    )


def profile_of(loads: Loads) -> Table:
    rows: list[list[Any]] = [[name, f"{seconds:.2f}"] for name, seconds in loads.profile().items() if seconds]
    title = (
        f"{loads.title}: where Shardwright's time goes, rank 0, one load under cProfile, which slows what calls much"
    )
    return Table(title, ["function, with what it calls", "processor s"], rows)


def touched(most: dict[str, float]) -> float:
    return most["read"] + most["mapped"]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def main() -> None:
    options = arguments(__doc__).parse_args()
    results = Results(
        "loading",
        "Loading a checkpoint of a few GB on two ranks",
        "Two gloo ranks per contender, alive side by side; loads take turns, files in the page cache; imports are not "
        "counted. A load ends when every weight of the rank has been looked at once: mapped files are read no earlier. "
        "`processor s`: of the rank that took most, which a busy machine does not change as much. "
        "`until written`: when every weight has also been changed once in place, as an optimizer's first step does. "
        "`read`: bytes of read calls. `mapped`: file pages that came into the rank's memory, increases added up. "
        "`anonymous`, `resident`: growth of the rank's own memory and of all its pages, at their highest, sampled "
        f"every 5 ms. `{FLOOR}`: each rank reads half of the file into new memory and looks at it, no library at all.",
    )
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as scratch, ExitStack() as stack:
        contenders = {peer: stack.enter_context(Contender(peer, 2)) for peer in (OURS, TRANSFORMERS, ACCELERATE)}
        for peer, contender in contenders.items():
            with results.failures_of(peer.title):
                contender.start()  # they import while the checkpoint is written
        folder = write_checkpoint(Path(scratch) / "llama", "llama", "bfloat16", **(QUICK if options.quick else SIZES))
        write_checkpoint(folder / "small", "llama", "bfloat16", num_hidden_layers=1)
        for case in CASES:
            run(Loads(case, folder, contenders), 1 if options.quick else 3, results)
            results.save()
    results.write()


if __name__ == "__main__":
    main()

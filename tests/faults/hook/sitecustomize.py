"""In every Python process of a run that the matrix disturbs: what is to happen, where, and to whom.

Python imports this module before anything else. It reads the plan that :mod:`matrix` has left in the environment, waits
until this process gets to the point in question, and sends the signal (or fills the disk) from there: so a fault comes
where it should, on a machine of any speed.
"""

import json
import os
import resource
import signal
import sys

PLAN = json.loads(os.environ.get("SHARDWRIGHT_FAULT", "null"))
ROOM = 2000  # bytes that a file may have on a full disk


def victims():
    """The process ids that this process disturbs; none where another one does it."""
    rank, launcher = os.environ.get("RANK"), os.getppid()
    who = PLAN["victim"]
    if who == "the process":
        return [os.getpid()]
    if who == "launcher":
        return [launcher] if rank == "0" else []
    if who == "both":
        return [launcher, os.getpid()] if rank == "1" else []
    if who == "a node's ranks":
        return [os.getpid()] if os.environ.get("GROUP_RANK") == "1" else []
    return [os.getpid()] if rank == {"a rank": "1", "rank 0": "0"}[who] else []


def strike():
    chosen = victims()
    if not chosen:
        return
    with open(os.path.join(PLAN["folder"], f"struck-{os.getpid()}"), "w") as file:
        json.dump(chosen, file)
    if PLAN["fault"] == "full disk":
        for pid in chosen:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM, ROOM))
        return
    for pid in chosen:
        os.kill(pid, signal.Signals[PLAN["fault"]])


def once(function):
    left = [function]

    def call():
        if left:
            left.pop()()

    return call


def before(module, name, action):
    """Call ``action`` before the function ``name`` of a module that is imported already."""
    real = getattr(sys.modules[module], name)

    def call(*args, **kwargs):
        action()
        return real(*args, **kwargs)

    setattr(sys.modules[module], name, call)


def install():
    from shardwright.train.watchdog import Watchdog

    begin, action, steps = Watchdog.begin, once(strike), [0]
    prefixes = {
        "import": "importing",
        "model build": "building",
        "resume": "resuming",
        "evaluation": "evaluating",
    }

    def watched(self, name, step=False):
        begin(self, name, step)
        phase = PLAN["phase"]
        if name == "writing to output.dir":  # all modules are there, and no step was taken
            if phase == "checkpoint":
                before("shardwright.checkpoint.store", "write_tensors", action)
            if phase == "final save":
                before("shardwright.checkpoint.save", "_write_files", action)
        steps[0] += name.startswith("in step")
        if phase in prefixes and name.startswith(prefixes[phase]):
            action()
        if (phase == "first step" and steps[0] == 1) or (phase == "step" and steps[0] == 3):
            action()

    Watchdog.begin = watched
    if PLAN["phase"] == "export":
        import shardwright.checkpoint.save  # noqa: F401

        before("shardwright.checkpoint.save", "_write_files", action)


if PLAN is not None and (PLAN["phase"] != "export" or "export" in sys.orig_argv):
    install()

"""The errors Shardwright raises. All derive from :class:`ShardwrightError`, so one ``except`` catches them."""


class ShardwrightError(Exception):
    """Base of every error that Shardwright raises on purpose.

    Attributes:
        exit_code: of the command line, when it ends with this error.
    """

    exit_code = 1


class ConfigError(ShardwrightError, ValueError):
    """A configuration (degrees, keys, values, files) that cannot work."""


class PlanError(ShardwrightError, AssertionError, ValueError):
    """A plan that does not fit the model or the mesh.

    It is an ``AssertionError`` as well because code written for the original module catches that.
    """


class UnsupportedError(ShardwrightError, NotImplementedError):
    """Something Shardwright knows about and does not do; the message names it."""


class MissingPackageError(UnsupportedError, AssertionError, ValueError, ImportError):
    """A package that what was asked for needs, and that is not installed.

    It is an ``AssertionError`` as well because code written for the original module catches that.
    """


class RunError(ShardwrightError, RuntimeError):
    """A run that started and could not go on: a rank that died, a loss that is no number."""


class ParityError(ShardwrightError, AssertionError):
    """A sharded model that does not compute what the same model computes in one process."""


class CheckpointError(ShardwrightError, ValueError):
    """A checkpoint that is damaged, does not fit the model, or could not be read or written."""


class PreemptedError(RunError):
    """A run that SIGTERM ended after it had saved a checkpoint. The command's exit code is 75: try again later."""

    exit_code = 75


class StoppedError(RunError):
    """A command that a signal has ended."""


_NO_ROOM = ("can't allocate memory", "can't start new thread", "Too many open files", "out of memory")


def from_system(error: BaseException) -> RunError | None:
    """What the operating system refused, as one of our errors; None for an error that is not the system's.

    A full disk, a file that may not be written, too little memory, too many open files: nothing that a traceback
    explains.
    """
    if isinstance(error, OSError):
        where = "".join(f" ({name!r})" for name in (error.filename, error.filename2) if name is not None)
        return RunError(f"The system refused: {error.strerror or error}{where}.")
    if isinstance(error, MemoryError):
        return RunError("There is not enough memory: this machine has no more, or a limit (ulimit -v) is too low.")
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError | ImportError) and any(sign in text for sign in _NO_ROOM):
        return RunError(f"The system refused: {text[:300]}")
    if isinstance(error, ImportError) and ".so" in text:  # a library of compiled code that does not load
        return RunError(f"A library cannot be loaded: {text[:300]}. Is a limit (ulimit) too low, or one missing?")
    return None


def sizes_that_work(count: int, size: int) -> str:
    """For a refusal: the numbers of ranks that divide ``count``, and the largest of them up to ``size``."""
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    largest = max(n for n in sizes if n <= size)
    return f"Sizes that work: {', '.join(map(str, sizes))}; the largest up to {size} is {largest}."

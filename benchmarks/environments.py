"""Makes the peers' virtual environments below ``build/benchmarks``, from the package index, each with its own pins.

An environment is made once; change a requirement here and it is made anew. One that cannot be made is reported, and its
peer is listed in the results as one that could not run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys

from harness.contenders import BUILD

TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "transformers": (TORCH, "transformers==5.23.0", "accelerate>=1.10"),
    "automodel": (TORCH, "nemo-automodel==0.7.0"),
}
TIME_LIMIT = 1800.0


def make(name: str, requirements: tuple[str, ...]) -> str:
    """Make one environment; the error in a line, or nothing."""
    folder = BUILD / name
    done = folder / ".requirements"
    if done.is_file() and done.read_text().splitlines() == list(requirements):
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    commands = ([sys.executable, "-m", "venv", str(folder)], [python, "-m", "pip", "install", "--quiet", *requirements])
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIME_LIMIT)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
            return f"{name}: {(lines or error.stderr.splitlines() or ['no message'])[-1]}"
        except subprocess.TimeoutExpired:
            return f"{name}: not installed within {TIME_LIMIT:g} s"
    done.write_text("\n".join(requirements) + "\n")
    return ""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, requirements in REQUIREMENTS.items():
        print(f"{name}: {', '.join(requirements)}", flush=True)
        error = make(name, requirements)
        print(error or f"{name}: ready")


if __name__ == "__main__":
    main()

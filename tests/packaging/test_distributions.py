"""The wheel and the source archive: what is in them, and that what they install works without the checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import yaml

import shardwright

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, the wheel made from the source archive, out of nothing but what git knows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment with the wheel; what it depends on is read from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", *built.glob("*.whl"))
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_index_would_take_them(built: Path) -> None:
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_what_is_in_them(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert "shardwright/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in names} == {"shardwright", f"shardwright-{shardwright.__version__}.dist-info"}
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        files = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/shardwright/py.typed"} <= files


def test_the_installed_command_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    command = installed.with_name("shardwright")
    assert run(command, "--version", cwd=tmp_path, env=clean()).split()[-1] == shardwright.__version__
    where = "import shardwright; print(shardwright.__file__)"
    assert run(installed, "-c", where, cwd=tmp_path, env=clean()).startswith(str(installed.parents[1]))
    plan = run(command, "plan", "qwen3", "--tp", "2", cwd=tmp_path, env=clean())
    assert "q_proj" in plan


def test_what_is_imported_is_depended_on() -> None:
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    extras = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    named = {_normal(re.split(r"[<>=!~\[; ]", text)[0]) for text in [*PROJECT["dependencies"], *extras]}
    owners = packages_distributions()
    others = imported - sys.stdlib_module_names - {"shardwright"}
    assert {name for name in others if not {_normal(owner) for owner in owners.get(name, [name])} & named} <= {
        "nvfsdp"  # the old name of megatron-fsdp, looked for and never needed
    }


def test_metadata_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == shardwright.__version__
    assert citation["license"] == PROJECT["license"]
    assert f"## [{shardwright.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("file", [".github/workflows/ci.yml", ".gitlab-ci.yml"])
def test_forges_run_what_ci_runs(file: str) -> None:
    jobs = yaml.safe_load((ROOT / file).read_text())
    steps = jobs["jobs"]["ci"]["steps"] if "jobs" in jobs else [{"run": line} for line in jobs["ci"]["script"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_public_names_show() -> None:
    assert set(shardwright.__all__) < set(dir(shardwright))
    assert all(hasattr(shardwright, name) for name in dir(shardwright))
    assert shardwright.verify.verify.__module__ == "shardwright.verify.public"
    assert distribution("shardwright").metadata["Name"] == "shardwright"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""What is in the wheel: every file of the packages, under ragkv, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import ragkv

ROOT = Path(__file__).resolve().parents[2]
INTERNAL = Path("benchmarks/internal")  # ours alone
PACKAGES = ("benchmarks", "config", "connectors", "kvstore", "policies")
DIST_INFO = f"ragkv-{ragkv.__version__}.dist-info"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with probes: data that must be packed, and waste that must not."""
    tree = tmp_path_factory.mktemp("tree")
    waste = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for folder in ("src", *PACKAGES):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=waste)
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tree)
    for probe in ("config/probe/deep/Dockerfile", "connectors/__pycache__/probe.pyc", "kvstore/.probe"):
        (tree / probe).parent.mkdir(parents=True, exist_ok=True)
        (tree / probe).write_text("probe")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    (file,) = out.glob("*.whl")
    return zipfile.Path(file)


def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def test_the_packages_are_relative_links() -> None:
    links = {link.name: link.readlink() for link in (ROOT / "src/ragkv").iterdir() if link.is_symlink()}
    assert links == {package: Path("../..") / package for package in PACKAGES}


def test_the_wheel_holds_the_tree(tree: Path, wheel: zipfile.Path) -> None:
    expected = {"ragkv/__init__.py", "ragkv/py.typed", "ragkv/config/probe/deep/Dockerfile"}
    expected |= {f"ragkv/{file.name}" for file in (tree / "src/ragkv").glob("*.py")}
    expected |= {f"ragkv/cli/{file.name}" for file in (tree / "src/ragkv/cli").glob("*.py")}
    for package in PACKAGES:
        for file in (tree / package).rglob("*"):
            path = file.relative_to(tree)
            waste = any(part == "__pycache__" or part.startswith(".") for part in path.parts)
            if file.is_file() and not waste and INTERNAL not in path.parents:
                expected.add(f"ragkv/{path.as_posix()}")
    assert {name for name in names(wheel) if not name.startswith(DIST_INFO)} == expected


def test_the_licence_goes_along(wheel: zipfile.Path) -> None:
    assert f"{DIST_INFO}/licenses/LICENSE" in names(wheel)


def test_entry_points(wheel: zipfile.Path) -> None:
    points = PathDistribution(wheel / DIST_INFO).entry_points
    assert {(point.group, point.name, point.value) for point in points} == {
        ("console_scripts", "ragkv", "ragkv.cli:main"),
        ("vllm.general_plugins", "ragkv", "ragkv.connectors.vllm:register"),
    }

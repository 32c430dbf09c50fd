"""What is in the wheel: every file of the packages, under ragkv, and nothing else. The source distribution is the
repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import ragkv

ROOT = Path(__file__).resolve().parents[2]
INTERNAL = Path("benchmarks/internal")  # ours alone
PACKAGES = ("benchmarks", "config", "connectors", "kvstore", "policies")
BESIDE = ("docs", "examples", "scripts", "tests")  # what else is in a source distribution, of folders and files
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "mkdocs.yml")
BUILD_FILES = ("pyproject.toml", "setup.py")
LEFT = ("build/", "src/ragkv.egg-info/")  # by builds
GENERATED = ("PKG-INFO", "setup.cfg")  # by setuptools
DIST_INFO = f"ragkv-{ragkv.__version__}.dist-info"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with probes: data that must be packed, and waste that must not."""
    tree = tmp_path_factory.mktemp("tree")
    waste = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for folder in ("src", *PACKAGES, *BESIDE):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=waste)
    for file in (*FILES, *BUILD_FILES):
        shutil.copy(ROOT / file, tree)
    for probe in ("config/probe/deep/Dockerfile", "connectors/__pycache__/probe.pyc", "kvstore/.probe"):
        (tree / probe).parent.mkdir(parents=True, exist_ok=True)
        (tree / probe).write_text("probe")
    return tree


def build(kind: str, tree: Path, out: Path) -> Path:
    """The file that a build makes of a tree; `kind`: wheel or sdist."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(tree)]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    return zipfile.Path(build("wheel", tree, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that unpacking the source distribution gives."""
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    return out / f"ragkv-{ragkv.__version__}"


def files_of(tree: Path) -> set[str]:
    """All files of a tree but waste and what builds leave there. Links are files, and not followed."""
    found = set()
    for folder, inner, files in os.walk(tree):
        links = [name for name in inner if Path(folder, name).is_symlink()]
        found |= {Path(folder, name).relative_to(tree) for name in (*files, *links)}
    waste = {path for path in found if any(part == "__pycache__" or part.startswith(".") for part in path.parts)}
    return {path.as_posix() for path in found - waste if not path.as_posix().startswith(LEFT)}


def names(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def test_the_packages_are_relative_links() -> None:
    links = {link.name: link.readlink() for link in (ROOT / "src/ragkv").iterdir() if link.is_symlink()}
    assert links == {package: Path("../..") / package for package in PACKAGES}


def test_the_wheel_holds_the_tree(tree: Path, wheel: zipfile.Path) -> None:
    expected = {"ragkv/__init__.py", "ragkv/py.typed", "ragkv/config/probe/deep/Dockerfile"}
    expected |= {f"ragkv/{file.name}" for file in (tree / "src/ragkv").glob("*.py")}
    for folder in ("cli", "testing"):
        expected |= {f"ragkv/{folder}/{file.name}" for file in (tree / "src/ragkv" / folder).glob("*.py")}
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


def test_the_source_distribution_is_the_repository(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {Path(*Path(each.name).parts[1:]).as_posix(): each for each in archive if not each.isdir()}
    packed = {name for name in members if not name.startswith("src/ragkv.egg-info/")}
    assert packed == files_of(tree) | set(GENERATED)
    links = {name: each.linkname for name, each in members.items() if each.issym()}
    assert links == {f"src/ragkv/{package}": f"../../{package}" for package in PACKAGES}


def test_the_source_distribution_gives_the_same_wheel(unpacked: Path, wheel: zipfile.Path, tmp_path: Path) -> None:
    assert names(zipfile.Path(build("wheel", unpacked, tmp_path))) == names(wheel)


def test_the_source_distribution_can_be_tested(unpacked: Path) -> None:
    few = ("tests/unit/test_docs.py", "tests/unit/test_breaker.py", "tests/unit/test_policies_golden.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *few],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout

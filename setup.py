"""The source distribution keeps the symbolic links of src/ragkv. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class SourceDistribution(sdist):
    """Replaces setuptools' copies of linked folders by the links, as they are in the repository."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        for link in Path("src/ragkv").iterdir():
            if link.is_symlink():
                copy = base_dir / link
                shutil.rmtree(copy)
                copy.symlink_to(link.readlink())


setup(cmdclass={"sdist": SourceDistribution})

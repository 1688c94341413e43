"""From what a test calls its driver to the driver's file."""

from __future__ import annotations

from pathlib import Path

from pytest_kdriver.errors import BuildError, ImageError
from pytest_kdriver.image.cargo import Cargo, find_image


class ImageFinder:
    """Finds, and builds where needed, the images of a project.

    ``root`` is what paths are relative to in the end, ``manifest`` the cargo workspace of the drivers
    (None: there is none).
    """

    def __init__(self, root: Path, manifest: Path | None, *, profile: str = "dev") -> None:
        self._root = root
        self._cargo = Cargo(manifest, profile=profile) if manifest else None

    def find(self, name: str, *, beside: Path | None = None) -> Path:
        """The image that ``name`` means: a cargo package, or a path to a .sys, .dll or package folder.

        A path is looked for below the folder ``beside``, then below the root. Raises ``ImageError``, or
        ``BuildError`` with cargo's output.
        """
        if not is_path(name):
            return self._package(name)
        tried = [folder / name for folder in (beside, self._root) if folder is not None]
        for path in tried:
            if path.exists():
                return find_image(path)
        raise ImageError(f"there is no {' and no '.join(map(str, dict.fromkeys(tried)))}")

    def _package(self, name: str) -> Path:
        if self._cargo is None:
            raise BuildError(
                f"driver {name!r} is no path, and there is no cargo workspace to build it from: "
                f"set manifest in kdriver.toml or [tool.kdriver] (looked in {self._root})"
            )
        return self._cargo.build(name)


def is_path(name: str) -> bool:
    """Whether a driver's name is a path: it has a slash, or ends as an image does."""
    return "/" in name or name.lower().endswith((".sys", ".dll"))

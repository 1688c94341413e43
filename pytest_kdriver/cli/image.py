"""``kdriver image``: the disk images that virtual machines start from."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_kdriver.config import find_root
from pytest_kdriver.errors import TargetError
from pytest_kdriver.targets.disk_images import DiskImage, Phase, ensure, list_images, remove
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.recipe import find_recipe, find_recipes
from pytest_kdriver.targets.runs import Run, collect_garbage

TICK = 1.0
"""Seconds between two looks at the clock on a terminal."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "image",
        help="make the disk images of virtual machines, list and remove them",
        description="The disk images that virtual machines start from. A run makes what it needs by itself.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="make an image, and print its folder")
    build.add_argument("name", metavar="NAME")
    build.set_defaults(call=_build)
    listing = actions.add_parser(
        "list", help="list the images that can be made, and those that are"
    )
    listing.set_defaults(call=_list)
    info = actions.add_parser("info", help="tell what is known of an image")
    info.add_argument("name", metavar="NAME")
    info.set_defaults(call=_info)
    removal = actions.add_parser("remove", help="remove an image that was made")
    removal.add_argument("name", metavar="NAME", help="its name, or its folder's as list shows it")
    removal.set_defaults(call=_remove)


def _build(options: argparse.Namespace) -> int:
    recipe = find_recipe(options.name, find_root(Path.cwd()))
    collect_garbage(REMOVERS)
    run = Run()
    try:
        with _Clock().showing() as clock:
            image = ensure(recipe, run, clock.begin)
    finally:
        run.close(REMOVERS)
    print(image.folder)
    return 0


def _list(options: argparse.Namespace) -> int:  # noqa: ARG001 -- the actions' shape
    images = list_images()
    for recipe in find_recipes(find_root(Path.cwd())):
        print(f"{recipe.name}: {recipe.description}")
        print(f"    recipe {recipe.folder}")
        for image in images:
            if image.name == recipe.name:
                current = image.folder.name == f"{recipe.name}-{recipe.key()}"
                print(f"    {_line(image)}{'' if current else ', of another state of the recipe'}")
    known = {recipe.name for recipe in find_recipes(find_root(Path.cwd()))}
    for image in images:
        if image.name not in known:
            print(f"{image.name}: its recipe is not here\n    {_line(image)}")
    return 0


def _line(image: DiskImage) -> str:
    return f"{image.folder.name}, {image.size >> 20} MiB, made {image.made}"


def _info(options: argparse.Namespace) -> int:
    found = [i for i in list_images() if options.name in {i.name, i.folder.name}]
    for image in found:
        print(f"{image.folder}")
        print(f"    made    {image.made}")
        print(f"    disk    {image.size >> 20} MiB, SHA-256 {image.sha256}")
        if not image.is_unchanged:
            print(f"    CHANGED since it was made: kdriver image remove {image.folder.name}")
        for key, value in image.target.items():
            print(f"    {key} = {value}")
    if not found:
        recipe = find_recipe(options.name, find_root(Path.cwd()))
        print(
            f"{recipe.name}: {recipe.description}\n    not made yet: kdriver image build {recipe.name}"
        )
        print(f"    making it takes {recipe.room >> 20} MiB; {recipe.kept >> 20} MiB stay")
    return 0


def _remove(options: argparse.Namespace) -> int:
    removed = remove(options.name)
    for folder in removed:
        print(f"removed {folder}")
    if not removed:
        raise TargetError(f"there is no disk image {options.name!r}; kdriver image list shows them")
    return 0


class _Clock:
    """Shows which phase goes on, and for how long: on a terminal in one line, else in one for each phase."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._done = threading.Event()
        self._phase: Phase | None = None
        self._terminal = sys.stderr.isatty()

    def begin(self, phase: Phase) -> None:
        """A phase begins."""
        if self._terminal:
            self._end_line()
        else:
            print(f"kdriver: {phase.elapsed:4.0f} s  {phase.name}", file=sys.stderr, flush=True)
        self._phase = phase

    @contextmanager
    def showing(self) -> Iterator[_Clock]:
        """Show it, as long as this lasts."""
        thread = threading.Thread(target=self._tick, name="kdriver-clock")
        if self._terminal:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()
            if self._terminal:
                thread.join()
            self._end()

    def _tick(self) -> None:
        while not self._done.wait(TICK):
            self._show()

    def _show(self) -> None:
        if (phase := self._phase) is not None:
            took = time.monotonic() - self._begin - phase.elapsed
            print(
                f"\r\33[Kkdriver: {phase.name}, {took:.0f} s", end="", file=sys.stderr, flush=True
            )

    def _end_line(self) -> None:
        if self._phase is not None:
            self._show()
            print(file=sys.stderr)

    def _end(self) -> None:
        if self._phase is None:
            return
        if self._terminal:
            self._end_line()
        took = time.monotonic() - self._begin
        print(f"kdriver: {took:4.0f} s in all", file=sys.stderr, flush=True)

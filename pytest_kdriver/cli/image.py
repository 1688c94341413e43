"""``kdriver image``: the disk images that virtual machines start from."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.errors import ConfigError, TargetError
from pytest_kdriver.targets.disk_images import (
    DiskImage,
    Phase,
    ensure,
    is_current,
    list_images,
    remove,
)
from pytest_kdriver.targets.image_archive import export_image, import_image
from pytest_kdriver.targets.leftovers import REMOVERS
from pytest_kdriver.targets.libvirt import require_libvirt
from pytest_kdriver.targets.recipe import BUILD, Recipe, find_recipe, find_recipes
from pytest_kdriver.targets.runs import Run, collect_garbage
from pytest_kdriver.targets.windows.passwords import password_file
from pytest_kdriver.vm_config import DEFAULT_URI

PRODUCT_KEY_VARIABLE: Final = "KDRIVER_PRODUCT_KEY"

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
    build = actions.add_parser(
        "build",
        help="make an image, and print its folder",
        description="Make an image, and print its folder. A Windows is installed from an ISO of yours, which "
        "takes an hour or so without anybody; a product key, where it needs one, comes from a file, or from "
        "the environment, KDRIVER_PRODUCT_KEY.",
    )
    build.add_argument("name", metavar="NAME")
    build.add_argument("--iso", type=Path, metavar="FILE", help="the ISO of a Windows")
    build.add_argument(
        "--virtio-win", type=Path, metavar="FILE", help="virtio's drivers for Windows, an ISO"
    )
    build.add_argument("--product-key-file", type=Path, metavar="FILE")
    build.add_argument(
        "--timeout", type=_minutes, metavar="MINUTES", help="how long it may take; 240"
    )
    build.set_defaults(call=_build)
    export = actions.add_parser(
        "export", help="write an image to a file, for another machine; without its password"
    )
    export.add_argument("name", metavar="NAME", help="its name, or its folder's as list shows it")
    export.add_argument("file", type=Path, metavar="FILE")
    export.set_defaults(call=_export)
    importing = actions.add_parser("import", help="take in an image that export wrote")
    importing.add_argument("file", type=Path, metavar="FILE")
    importing.set_defaults(call=_import)
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
            if options.iso is None:
                image = ensure(recipe, run, clock.begin)
            else:
                image = _install(recipe, options, run, clock.begin)
    finally:
        run.close(REMOVERS)
    print(image.folder)
    return 0


def _install(
    recipe: Recipe, options: argparse.Namespace, run: Run, progress: Callable[[Phase], None]
) -> DiskImage:
    """Make the image of a Windows."""
    if recipe.windows is None:
        raise ConfigError(f"{recipe.name} takes no --iso: it is made by {recipe.folder / BUILD}")
    require_libvirt()
    from pytest_kdriver.targets.windows.images import Source, build_image, picture
    from pytest_kdriver.targets.windows.installation import Limits

    config = load_config(find_root(Path.cwd())).target(recipe.name)
    source = Source(
        iso=options.iso,
        virtio_win=options.virtio_win,
        product_key=_product_key(options.product_key_file),
        uri=str(config.vm.get("uri", DEFAULT_URI)),
    )
    limits = Limits() if options.timeout is None else Limits(whole=60 * options.timeout)
    print(f"kdriver: its screen, each minute: {picture(recipe)}", file=sys.stderr, flush=True)
    return build_image(recipe, source, run, progress, limits=limits)


def _product_key(file: Path | None) -> str | None:
    """The product key from the file, else from the environment. Raises ``ConfigError``, which has it not."""
    from pytest_kdriver.targets.windows.images import read_product_key

    if file is not None:
        try:
            return read_product_key(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{file}, the product key's file, can't be read") from None
    text = os.environ.get(PRODUCT_KEY_VARIABLE)
    return read_product_key(text, PRODUCT_KEY_VARIABLE) if text else None


def _minutes(text: str) -> float:
    """Of a command line. Raises ``ArgumentTypeError``."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return minutes


def _export(options: argparse.Namespace) -> int:
    image = _newest(options.name)
    export_image(image, options.file)
    print(options.file)
    if password_file(image.folder.name).exists():
        print(
            f"kdriver: its password stays in {password_file(image.folder.name)}; whoever reaches its WinRM "
            f"elsewhere gives it by KDRIVER_PASSWORD_... (see docs/windows-images.md)",
            file=sys.stderr,
        )
    return 0


def _import(options: argparse.Namespace) -> int:
    collect_garbage(REMOVERS)
    run = Run()
    try:
        image = import_image(options.file, run)
    finally:
        run.close(REMOVERS)
    print(image.folder)
    return 0


def _newest(name: str) -> DiskImage:
    """The image called so, the one made last; or the one in the folder of that name."""
    found = [image for image in list_images() if name in {image.name, image.folder.name}]
    if not found:
        raise TargetError(f"there is no disk image {name!r}; kdriver image list shows them")
    return max(found, key=lambda image: image.made)


def _list(options: argparse.Namespace) -> int:  # noqa: ARG001 -- the actions' shape
    images = list_images()
    for recipe in find_recipes(find_root(Path.cwd())):
        print(f"{recipe.name}: {recipe.description}")
        print(f"    recipe {recipe.folder}")
        for image in images:
            if image.name == recipe.name:
                other = "" if is_current(image, recipe) else ", of another state of the recipe"
                print(f"    {_line(image)}{other}")
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
        command = f"kdriver image build {recipe.name}{' --iso FILE' if recipe.windows else ''}"
        print(f"{recipe.name}: {recipe.description}\n    not made yet: {command}")
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

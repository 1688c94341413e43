"""``kdriver vm``: virtual machines that stay, to try things out in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pytest_kdriver.config import find_root, load_config
from pytest_kdriver.errors import AgentError, ConfigError, TargetError
from pytest_kdriver.session import make_target
from pytest_kdriver.targets.libvirt import require_libvirt

if TYPE_CHECKING:
    from pytest_kdriver.guest.agent import Agent
    from pytest_kdriver.targets.libvirt.kept import KeptVm

_HOUR = 3600.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "vm",
        help="start a virtual machine that stays, look at it, stop it",
        description="Start the machine of a target, which stays until it is stopped; reach it, or one that "
        "--kdriver-keep kept. NAME is the target's, or the machine's as kdriver vm status shows it.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    start = actions.add_parser("start", help="start the machine of a target")
    start.add_argument("name", metavar="NAME")
    start.set_defaults(call=_start)
    status = actions.add_parser("status", help="list the machines that there are")
    status.set_defaults(call=_status)
    stop = actions.add_parser("stop", help="end a machine, and remove what was made for it")
    stop.add_argument("name", metavar="NAME")
    stop.set_defaults(call=_stop)
    run = actions.add_parser(
        "run",
        help="run a program in a machine",
        description="Run a program to its end, an hour at most, without input, and show what it wrote. The "
        "exit code is the program's, 255 for all above, or 1 where the guest does not tell: of a Unix "
        "program Wine knows neither code, nor end, nor output.",
    )
    run.add_argument("name", metavar="NAME")
    run.add_argument("command", nargs="+", metavar="PROGRAM", help="and its arguments, behind --")
    run.set_defaults(call=_run)
    shell = actions.add_parser(
        "shell",
        help="type commands for the machine's cmd.exe",
        description="Run each line by a cmd.exe of its own: a cd, or a set, is over with its line. The exit "
        "code is the last command's.",
    )
    shell.add_argument("name", metavar="NAME")
    shell.set_defaults(call=_shell)
    screenshot = actions.add_parser("screenshot", help="take a picture of a machine's screen")
    screenshot.add_argument("name", metavar="NAME")
    screenshot.add_argument("file", nargs="?", type=Path, metavar="FILE.png")
    screenshot.set_defaults(call=_screenshot)


def _start(options: argparse.Namespace) -> int:
    config = load_config(find_root(Path.cwd()))
    target_config = config.target(options.name)
    if target_config.kind != "libvirt":
        raise ConfigError(
            f"target {options.name!r} is no virtual machine: its kind is {target_config.kind}"
        )
    target = make_target(target_config)
    try:
        _say(f"{options.name}: {target.describe()}")
        _tell_others(options.name)
        target.start()
        print(target.keep())
    finally:
        target.close()
    return 0


def _tell_others(name: str) -> None:
    """Say of which machines this one will not be the only one: the target's name won't do for it."""
    from pytest_kdriver.targets.libvirt.kept import kept_vms

    others = [vm.domain for vm in kept_vms() if vm.target == name]
    if others:
        _say(f"{', '.join(others)} goes on; this starts another one, to be called by its own name")


def _status(options: argparse.Namespace) -> int:  # noqa: ARG001 -- the actions' shape
    require_libvirt()
    from pytest_kdriver.targets.libvirt.kept import kept_vms

    vms = kept_vms()
    for vm in vms:
        try:
            state = vm.state()
        except TargetError as error:
            state = str(error)
        print(f"{vm.domain}  target {vm.target}  {vm.uri}  {state}")
    if not vms:
        _say("there is none; kdriver vm start NAME starts one")
    return 0


def _stop(options: argparse.Namespace) -> int:
    vm = _find(options.name)
    try:
        vm.remove()
    except OSError as error:
        raise TargetError(f"{vm.domain} stays: {error}") from error
    _say(f"{vm.domain} is gone")
    return 0


def _run(options: argparse.Namespace) -> int:
    agent = _find(options.name).connect()
    try:
        return _run_in(agent, options.command)
    finally:
        agent.close()


def _shell(options: argparse.Namespace) -> int:
    vm = _find(options.name)
    agent = vm.connect()
    code = 0
    try:
        _say(f"{vm.domain}: each line is one cmd.exe; exit, or Ctrl-D, ends")
        while (line := _read_line(f"{vm.target}> ")) not in {None, "exit"}:
            if line:
                try:
                    code = _run_in(agent, ["cmd.exe", "/c", line])
                except AgentError as error:
                    _say(str(error))
                    code = 1
    finally:
        agent.close()
    return code


def _screenshot(options: argparse.Namespace) -> int:
    vm = _find(options.name)
    file = options.file or Path(f"{vm.domain}.png")
    vm.screenshot(file)
    print(file)
    return 0


def _find(name: str) -> KeptVm:
    require_libvirt()
    from pytest_kdriver.targets.libvirt.kept import find_kept

    return find_kept(name)


def _run_in(agent: Agent, command: Sequence[str]) -> int:
    """Run a program to its end, and show what it says; its exit code, 1 where the guest does not tell."""
    try:
        done = agent.run(command, time_limit=_HOUR)
    except KeyboardInterrupt:
        _say(f"{command[0]} goes on in the machine, for an hour at most")
        raise
    _show(sys.stdout, done.stdout)
    _show(sys.stderr, done.stderr)
    if done.truncated:
        _say(f"{command[0]} wrote more than is kept; the rest is lost")
    if done.timed_out:
        _say(f"{command[0]} was ended after an hour")
    elif done.exit_code is None:
        _say(f"{command[0]} was started; of a Unix program Wine tells no end, and no exit code")
    return 1 if done.exit_code is None else min(done.exit_code, 255)


def _show(stream: TextIO, output: bytes) -> None:
    """Write what a program wrote; byte for byte where no terminal is to show it."""
    if stream.isatty():
        stream.write(output.decode("utf-8", "backslashreplace"))
    else:
        stream.flush()
        stream.buffer.write(output)
    stream.flush()


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _say(text: str) -> None:
    print(f"kdriver: {text}", file=sys.stderr, flush=True)

"""The pytest plugin: options, markers, fixtures, hooks. It calls down, and decides nothing.

Whoever has it installed and does not use it pays for this file alone: everything else is imported when
a target is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from pytest_kdriver.config import Isolation
    from pytest_kdriver.driver import Driver
    from pytest_kdriver.errors import KdriverError
    from pytest_kdriver.handle import TargetHandle
    from pytest_kdriver.marker import DriverMark
    from pytest_kdriver.session import Session
    from pytest_kdriver.targets.target import Target

_SESSION = pytest.StashKey["Session"]()
_MARK = pytest.StashKey["DriverMark | None"]()
_DRIVER = pytest.StashKey["Driver"]()
_VERDICT = pytest.StashKey["KdriverError"]()
_USAGE = pytest.StashKey[str]()
_REFUSED = pytest.StashKey[str]()
_FAILED = pytest.StashKey[bool]()
_KEPT = "kdriver_kept"

_NOT_COLLECTED = (
    "which target? Name kdriver or kdriver_target as an argument of the test, or of a fixture that it "
    "names: getfixturevalue, and methods of a unittest.TestCase, come too late to choose one"
)
_HOW_TO_RUN = "no target was chosen: run with --kdriver-vm wine, or set vm in kdriver.toml"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options ``--kdriver-*``."""
    group = parser.getgroup("kdriver", "Windows kernel drivers")
    group.addoption(
        "--kdriver-vm",
        action="append",
        default=[],
        metavar="NAME",
        help="run tests that need a target on target NAME; may be repeated. "
        "'wine' is built in, others come from kdriver.toml",
    )
    group.addoption(
        "--kdriver-isolation",
        choices=("test", "module", "session", "none"),
        help="when a target is put back into its first state (default: module where it can be)",
    )
    group.addoption(
        "--kdriver-artifacts",
        metavar="DIR",
        help="keep here what is seen of failed tests: the kernel log, and of a virtual machine its screen, "
        "its domain's XML and log",
    )
    group.addoption(
        "--kdriver-dumps",
        action="store_true",
        help="let a Windows that crashes write its minidump and start again, and keep it with the artifacts",
    )
    group.addoption(
        "--kdriver-keep",
        action="store_true",
        help="keep the virtual machine of the first test that fails on it, and tell how to reach it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the markers."""
    config.addinivalue_line(
        "markers",
        "kdriver(name, *, parameters={}, service=None, leaks='forbid', breakpoints='forbid', tags=(), "
        "requires=(), timeout=30): the driver that the fixture kdriver is: a cargo package, or a path to a "
        ".sys; the values of its service's Parameters key; its service's name; whether leaks fail the test, "
        "and breakpoints that a kernel's debugger sees; the pool tags that count; capabilities that the "
        "target needs; seconds for each call",
    )
    config.addinivalue_line(
        "markers",
        "kdriver_isolation(when): put the target back before each 'test', 'module', 'session', or 'none'",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what is still open, whatever ended the run."""
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.close()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the targets that were asked for on the command line."""
    if not config.option.kdriver_vm:
        return None
    session = _session(config)
    with _usage_errors():
        names = list(dict.fromkeys(_chosen(config)))
        targets = [f"{name} ({session.describe(name)})" for name in names]
    return (
        f"kdriver: {', '.join(targets)}; isolation {config.option.kdriver_isolation or 'default'}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that needs a target one test for each target."""
    if "kdriver_target" in metafunc.fixturenames:
        try:
            with _usage_errors():
                names = list(dict.fromkeys(_chosen(metafunc.config)))
        except pytest.UsageError as error:
            # Raised here it would be one module's error, with a traceback. It ends the run instead.
            metafunc.config.stash[_USAGE] = str(error)
            return
        if names:
            metafunc.parametrize("kdriver_target", names, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Replace each item's ``kdriver`` marks, its parents' among them, by one that has all arguments."""
    for item in items:
        if _USAGE in config.stash and "kdriver_target" in getattr(item, "fixturenames", ()):
            _refuse(item, pytest.UsageError(config.stash[_USAGE]))
        try:
            _marked_isolation(item)
            if item.get_closest_marker("kdriver") is not None:
                item.stash[_MARK] = _merge_marks(item)
        except pytest.UsageError as error:
            _refuse(item, error)
    marked = [item for item in items if _MARK in item.stash]
    for item in marked:
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if mark.name != "kdriver"]
    for item in marked:
        merged = item.stash[_MARK]
        if merged is not None:
            item.add_marker(pytest.mark.kdriver(**_fields(merged)), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have the item's target ready before any of its fixtures runs, unless the item is skipped."""
    if _REFUSED in item.stash:
        pytest.fail(item.stash[_REFUSED], pytrace=False)
    if "kdriver_target" not in getattr(item, "fixturenames", ()):
        return
    name = _target_of(item)
    if name is None:
        pytest.skip(_HOW_TO_RUN)
    session = _session(item.config)
    with _plain_failures():
        target = session.target(name)
        mark = item.stash.get(_MARK, None)
        isolation, needs = _isolation(item)
        needed = (*(mark.requires if mark else ()), *needs)
        _skip_without(needed, target)
        from pytest_kdriver.session import default_isolation

        module = item.nodeid.partition("::")[0]
        session.begin_test(item.path.parent)
        session.prepare(name, isolation or default_isolation(target), module)
        _skip_without(needed, target)  # what a guest can't tell is known when it is up


def _skip_without(needed: Iterable[str], target: Target) -> None:
    for capability in needed:
        if capability not in target.capabilities:
            pytest.skip(f"target {target.name!r} has no capability {capability!r}")


@pytest.fixture(scope="session")
def kdriver_target(request: pytest.FixtureRequest) -> Iterator[TargetHandle]:
    """The target of this test, chosen by ``--kdriver-vm``: more drivers, programs, files, registry."""
    name = getattr(request, "param", None)
    if name is None:
        pytest.fail(_NOT_COLLECTED, pytrace=False)
    session = _session(request.config)
    with _plain_failures():
        handle = session.handle(name)
    yield handle
    try:
        with _plain_failures():
            session.see_through(name)
    finally:
        session.close_target(name)


@pytest.fixture
def kdriver(request: pytest.FixtureRequest, kdriver_target: TargetHandle) -> Iterator[Driver]:
    """The driver that ``@pytest.mark.kdriver(...)`` names, built, not started yet.

    When the test's body is over the driver is stopped, unregistered and judged: a leak fails the test.
    """
    mark = request.node.stash.get(_MARK, None)
    if mark is None:
        pytest.fail(
            'which driver? Mark the test with @pytest.mark.kdriver("NAME"), NAME being a cargo package '
            "or a path to a .sys file",
            pytrace=False,
        )
    with _plain_failures():
        driver = kdriver_target.make_driver(
            mark.path or mark.name,
            service=mark.service,
            parameters=mark.parameters,
            leaks=mark.leaks,
            breakpoints=mark.breakpoints,
            tags=mark.tags,
            timeout=mark.timeout,
        )
    request.node.stash[_DRIVER] = driver
    yield driver
    with _plain_failures():
        driver.finish()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Judge the driver behind the test's body, while its result is still open."""
    if "kdriver_target" not in pyfuncitem.fixturenames:
        return (yield)
    try:
        result = yield
    except (KeyboardInterrupt, pytest.exit.Exception):
        if _DRIVER in pyfuncitem.stash:
            pyfuncitem.stash[_DRIVER].abandon()
        raise
    except BaseException as error:
        verdict = _verdict(pyfuncitem)
        if verdict is not None and isinstance(error, pytest.skip.Exception):
            raise verdict from None  # a skip must not hide it
        if verdict is not None and f"besides: {verdict}" not in getattr(error, "__notes__", ()):
            error.add_note(f"besides: {verdict}")
        _cut_traceback(pyfuncitem.config, error)
        raise
    verdict = _verdict(pyfuncitem)
    if verdict is not None:
        raise verdict
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell what was seen of the driver, where a test failed; then begin anew for its fixtures."""
    report = yield
    verdict = item.stash.get(_VERDICT, None)
    if report.failed and call.excinfo is not None and call.excinfo.value is verdict:
        report.longrepr = call.excinfo.getrepr(style="value")  # no line of the test's did it
    if report.failed and "kdriver_target" in getattr(item, "fixturenames", ()):
        _tell(item, report)
    driver = item.stash.get(_DRIVER, None)
    if driver is not None:
        if call.when == "call":
            driver.resume()
        elif call.when == "teardown":
            del item.stash[_DRIVER]
    if item.config.option.kdriver_keep:
        _keep(item, report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how to reach the virtual machines that were kept."""
    reports = (r for kind in terminalreporter.stats.values() for r in kind)
    kept = {
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == _KEPT
    }
    if kept:
        terminalreporter.section("kept")
        for told in sorted(kept):
            terminalreporter.write_line(told)


def _session(config: pytest.Config) -> Session:
    if _SESSION not in config.stash:
        from pytest_kdriver.config import find_root, load_config
        from pytest_kdriver.session import Session

        with _usage_errors():
            settings = load_config(find_root(config.rootpath))
            artifacts = config.option.kdriver_artifacts
            _show_what_is_told(config)
            config.stash[_SESSION] = Session(
                settings,
                artifacts=Path(artifacts).absolute() if artifacts else None,
                dumps=config.option.kdriver_dumps,
            )
    return config.stash[_SESSION]


def _show_what_is_told(config: pytest.Config) -> None:
    """Have what targets tell shown at once, also while a test's output is captured."""
    from pytest_kdriver.telling import show_by

    capture = config.pluginmanager.getplugin("capturemanager")

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
            print(line, file=sys.stderr, flush=True)

    show_by(show)


def _chosen(config: pytest.Config) -> Sequence[str]:
    """The names of the targets of this run; a ``ConfigError`` for one that there is not."""
    settings = _session(config).config
    names: Sequence[str] = config.option.kdriver_vm or settings.vm
    for name in names:
        settings.target(name)
    return names


def _target_of(item: pytest.Item) -> str | None:
    """The name of the item's target; None for a test that needs none, and where none was chosen."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("kdriver_target") if callspec is not None else None


def _merge_marks(item: pytest.Item) -> DriverMark | None:
    from pytest_kdriver.marker import merge

    outermost_first = reversed(list(item.iter_markers("kdriver")))
    with _usage_errors(item):
        return merge((mark.args, mark.kwargs) for mark in outermost_first)


def _fields(mark: DriverMark) -> dict[str, Any]:
    return {name: getattr(mark, name) for name in mark.__dataclass_fields__}


def _isolation(item: pytest.Item) -> tuple[Isolation | None, tuple[str, ...]]:
    """The isolation that somebody chose, None for nobody, and the capabilities that it needs."""
    chosen = (
        _marked_isolation(item)
        or item.config.option.kdriver_isolation
        or _session(item.config).config.isolation
    )
    return chosen, ("snapshots",) if chosen in ("test", "module") else ()


def _marked_isolation(item: pytest.Item) -> Isolation | None:
    mark = item.get_closest_marker("kdriver_isolation")
    if mark is None:
        return None
    from pytest_kdriver.marker import isolation

    with _usage_errors(item):
        return isolation((mark.args, mark.kwargs))


def _refuse(item: pytest.Item, error: pytest.UsageError) -> None:
    """End the run; a worker of pytest-xdist, which can't, fails the item when its turn comes."""
    if not hasattr(item.config, "workerinput"):
        raise error
    item.stash[_REFUSED] = str(error)


def _verdict(item: pytest.Function) -> KdriverError | None:
    """What is wrong with the test's drivers that it does not know; None for nothing."""
    from pytest_kdriver.driver import raise_first
    from pytest_kdriver.errors import KdriverError

    current = _session(item.config).current
    errors, current.untold = current.untold, []
    driver = item.stash.get(_DRIVER, None)
    try:
        try:
            if driver is not None:
                driver.finish()
        except KdriverError as error:
            errors.append(error)
        raise_first(errors)
    except KdriverError as verdict:
        item.stash[_VERDICT] = verdict
        return verdict
    return None


def _tell(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what was seen of a failed test's drivers into its report, and what there is into the artifacts."""
    session = item.config.stash.get(_SESSION, None)
    if session is None:
        return
    drivers, told = session.current.drivers, []
    if drivers:
        from pytest_kdriver.report.sections import sections

        told = sections(drivers)
        report.sections += told
    name = _target_of(item)
    if session.artifacts is None or name is None:
        return
    from pytest_kdriver.report.artifacts import keep, stem_of

    stem = stem_of(session.artifacts, f"{item.nodeid}.{report.when}")
    try:
        if drivers:
            keep(stem, drivers, told)
    except OSError as error:
        report.sections.append(("Artifacts", f"could not be written: {error}"))
        return
    missing = session.collect(name, stem)
    if missing:
        report.sections.append(("Artifacts", "could not be had:\n" + "\n".join(missing)))


def _keep(item: pytest.Item, report: pytest.TestReport) -> None:
    """Keep the target's guest behind a failed test, once its fixtures are done."""
    session = item.config.stash.get(_SESSION, None)
    name = _target_of(item)
    if session is None or name is None:
        return
    if report.failed:
        item.stash[_FAILED] = True
        session.want_kept(
            name
        )  # behind the last test its fixture closes the target before we are asked
    if report.when != "teardown" or _FAILED not in item.stash:
        return
    from pytest_kdriver.errors import KdriverError

    try:
        told = session.keep(name)
    except (KdriverError, OSError) as error:
        told = f"the guest of {item.nodeid} could not be kept: {error}"
    if told is not None:
        report.user_properties.append((_KEPT, told))


@contextmanager
def _usage_errors(item: pytest.Item | None = None) -> Iterator[None]:
    """A config, or an item's mark, that can't be ends the run with a sentence."""
    try:
        yield
    except Exception as error:
        from pytest_kdriver.errors import KdriverError

        if not isinstance(error, KdriverError):
            raise
        where = f"{item.nodeid}: " if item is not None else ""
        raise pytest.UsageError(f"{where}{error}") from None


@contextmanager
def _plain_failures() -> Iterator[None]:
    """What goes wrong outside of the test's own code is told without a traceback of ours."""
    from pytest_kdriver.errors import KdriverError

    try:
        yield
    except (KdriverError, OSError) as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    __tracebackhide__ = True
    raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None


def _cut_traceback(config: pytest.Config, error: BaseException) -> None:
    """End the traceback of one of our errors where the test called us."""
    from pytest_kdriver.errors import KdriverError

    if not isinstance(error, KdriverError) or config.option.fulltrace:
        return
    last_own = None
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package != "pytest_kdriver" and package not in sys.stdlib_module_names:
            last_own = trace
        trace = trace.tb_next
    if last_own is not None:
        last_own.tb_next = None

"""The pytest plugin, as a user meets it: whole runs, with real drivers, in Wine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_kdriver.image.cargo import Cargo
from tests.conftest import Run, Verdicts, failure

HELLO = """
import pytest

@pytest.mark.kdriver("hello")
def test_hello(kdriver):
    with kdriver.running():
        kdriver.dbgprint.expect("Hello, world!")
    assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
"""


def add_to_config(project: pytest.Pytester, text: str) -> None:
    path = project.path / "kdriver.toml"
    path.write_text(path.read_text() + text)


class TestChoosing:
    def test_without_a_target_tests_that_need_one_are_skipped_and_say_how_to_run_them(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        project.makepyfile(
            HELLO + "\ndef test_with_a_target(kdriver_target): pass\ndef test_without(): pass\n"
        )
        result = run("-rs")
        assert verdicts(result) == {
            "test_hello": "SKIPPED",
            "test_with_a_target": "SKIPPED",
            "test_without": "PASSED",
        }
        result.stdout.fnmatch_lines(["SKIPPED*2*run with --kdriver-vm wine*vm in kdriver.toml*"])

    def test_ids_name_the_target_and_a_run_goes_target_by_target(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        add_to_config(project, '[targets.second]\nkind = "wine"\n')
        seen = project.path / "seen"
        project.makepyfile(test_one=HELLO)
        project.makepyfile(
            test_two="""
            import pytest

            @pytest.mark.parametrize("number", [1, 2])
            def test_own_prefix(kdriver_target, number):
                name = kdriver_target.name
                if number == 1:
                    kdriver_target.put(name.encode(), "C:\\\\whose.txt")
                assert kdriver_target.get("C:\\\\whose.txt") == name.encode()

            def test_without_a_target():
                pass
            """
        )
        result = run("--kdriver-vm", "second", "--kdriver-vm", "wine", "--kdriver-vm", "second")
        assert list(verdicts(result).items()) == [
            (name, "PASSED")
            for name in (
                "test_hello[second]",
                "test_own_prefix[second-1]",
                "test_own_prefix[second-2]",
                "test_hello[wine]",
                "test_own_prefix[wine-1]",
                "test_own_prefix[wine-2]",
                "test_without_a_target",
            )
        ]
        result.stdout.re_match_lines([r"kdriver: second \(Wine \d.*\), wine \(Wine \d.*\)"])
        assert not seen.exists()

    @pytest.mark.parametrize(
        ("setting", "ids"),
        [
            ('vm = "wine"\n', ["wine"]),
            ('vm = ["second", "wine"]\n[targets.second]\nkind = "wine"\n', ["second", "wine"]),
        ],
    )
    def test_the_config_s_vm_counts_where_the_command_line_names_none(
        self, project: pytest.Pytester, run: Run, setting: str, ids: list[str]
    ) -> None:
        add_to_config(project, setting)
        project.makepyfile(test_it=HELLO)
        result = run("--collect-only", "-qq")
        assert [line for line in result.outlines if "::" in line] == [
            f"test_it.py::test_hello[{name}]" for name in ids
        ]

    def test_tool_kdriver_counts_like_kdriver_toml(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        (project.path / "kdriver.toml").rename(project.path / "old.toml")
        project.makepyprojecttoml('[tool.kdriver]\nvm = "wine"\n')
        project.makepyfile(test_it=HELLO)
        assert "test_it.py::test_hello[wine]" in run("--collect-only", "-qq").outlines

    def test_the_command_line_wins_over_the_config(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        add_to_config(project, 'vm = "wine"\n[targets.second]\nkind = "wine"\n')
        project.makepyfile(test_it=HELLO)
        result = run("--collect-only", "-qq", "--kdriver-vm", "second")
        assert [line for line in result.outlines if "::" in line] == [
            "test_it.py::test_hello[second]"
        ]


class TestUsage:
    @pytest.mark.parametrize(
        ("mark", "sentence"),
        [
            ('kdriver("hello", "more")', "one positional argument, the driver's name"),
            ('kdriver("hello", leak="allow")', "kdriver has no argument 'leak'*leaks"),
            ('kdriver("hello", leaks="maybe")', "leaks is 'maybe'; allowed: 'forbid' or 'allow'"),
            ('kdriver("hello", timeout=0)', "timeout is 0; allowed: seconds, more than 0"),
            ('kdriver("hello", requires="snapshot")', "requires is*'snapshot'*snapshots"),
            ('kdriver("hello", tags="five5")', "tags is 'five5'*one to four"),
            ('kdriver("hello", parameters=["A"])', "parameters is*a dict of names"),
            ('kdriver("hello", parameters={"A": 1 << 64})', "parameters is*REG_QWORD"),
            ('kdriver("hello", parameters={"A": True})', "parameters is*True"),
            ('kdriver("hello", service="a/b")', "'a/b' can't be a service's name"),
            ("kdriver(7)", "name is 7; allowed: a cargo package, or a path"),
            ('kdriver_isolation("modul")', "kdriver_isolation*'test', 'module', 'session', 'none'"),
        ],
    )
    def test_a_bad_marker_ends_the_run_with_a_sentence_that_names_the_test(
        self, project: pytest.Pytester, mark: str, sentence: str
    ) -> None:
        add_to_config(project, 'vm = "wine"\n')
        project.makepyfile(
            test_it=f"import pytest\n@pytest.mark.{mark}\ndef test_it(kdriver): pass\n"
        )
        result = project.runpytest_inprocess()
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_it[[]wine]: *{sentence}*"])
        result.stderr.no_fnmatch_line("*Traceback*")

    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            (
                'vmm = "wine"',
                "kdriver: unknown key 'vmm' (did you mean 'vm'*allowed: vm, isolation*",
            ),
            (
                'vm = "win"',
                "kdriver: vm: no target 'win' (did you mean 'wine'*there are: *, wine, winevm",
            ),
            ('vm = "wine"\nisolation = "tests"', "isolation is 'tests'; allowed: test, module*"),
            ('vm = "wine"\ntimeout = -1', "timeout is -1; allowed: seconds, more than 0"),
            ('vm = "wine"\nmanifest = "no.toml"', "manifest 'no.toml': there is no */no.toml"),
            ('vm = "wine"\n[targets.a]\nkind = "vine"', "targets.a: kind is 'vine'; allowed: wine"),
            (
                'vm = "wine"\n[targets.a]\nkind = "wine"\nwin = "x"',
                "targets.a: unknown key 'win' (did you mean 'wine'*",
            ),
            (
                'vm = "wine"\n[targets.wine]\nwithout = ["pol"]',
                "targets.wine: without is 'pol'; allowed: kernel-log, pool*",
            ),
            ("vm = = 1", "*at line 1*"),
        ],
    )
    def test_a_bad_config_ends_the_run_with_which_where_and_what_is_allowed(
        self, project: pytest.Pytester, config: str, sentence: str
    ) -> None:
        path = project.path / "kdriver.toml"
        path.write_text(config)
        project.makepyfile(test_it=HELLO)
        result = project.runpytest_inprocess()
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        found = " ".join(result.errlines)
        pattern = re.escape(f"{sentence}").replace(r"\*", ".*")
        assert re.search(pattern, found), found
        assert f"{path}: " in found
        assert "Traceback" not in found
        assert "plugin.py" not in result.stdout.str()

    def test_a_target_that_there_is_not_is_told_with_those_that_there_are(
        self, project: pytest.Pytester
    ) -> None:
        project.makepyfile(test_it=HELLO)
        result = project.runpytest_inprocess("--kdriver-vm", "wind")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            ["ERROR: no target 'wind' (did you mean 'wine'*there are: *, wine, winevm"]
        )

    def test_a_project_that_uses_no_target_is_not_asked_for_its_config(
        self, project: pytest.Pytester
    ) -> None:
        (project.path / "kdriver.toml").write_text("nonsense")
        project.makepyfile("def test_it(): pass")
        project.runpytest_inprocess().assert_outcomes(passed=1)


class TestIsolation:
    @pytest.fixture
    def canary(self, project: pytest.Pytester) -> pytest.Pytester:
        """Two modules; a test that looks passes if what the first put into the guest is there."""
        looks = 'assert kdriver_target.get("C:\\\\canary.txt") == b"here"'
        project.makepyfile(
            test_one=f"""
            def test_puts(kdriver_target):
                kdriver_target.put(b"here", "C:\\\\canary.txt")

            def test_same_module(kdriver_target):
                {looks}
            """,
            test_two=f"""
            def test_other_module(kdriver_target):
                {looks}
            """,
        )
        return project

    @pytest.mark.parametrize(
        ("isolation", "found"),
        [
            ("test", ["PASSED", "FAILED", "FAILED"]),
            (None, ["PASSED", "PASSED", "FAILED"]),
            ("session", ["PASSED", "PASSED", "PASSED"]),
            ("none", ["PASSED", "PASSED", "PASSED"]),
        ],
    )
    def test_what_a_test_leaves_in_the_guest_lives_as_long_as_the_option_says(
        self,
        canary: pytest.Pytester,
        run: Run,
        verdicts: Verdicts,
        isolation: str | None,
        found: list[str],
    ) -> None:
        option = ["--kdriver-isolation", isolation] if isolation else []
        tests = ["test_puts[wine]", "test_same_module[wine]", "test_other_module[wine]"]
        result = verdicts(run("--kdriver-vm", "wine", *option))
        assert list(result.items()) == list(zip(tests, found, strict=True))

    def test_the_config_says_it_where_the_option_does_not(
        self, canary: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        add_to_config(canary, 'isolation = "test"\n')
        found = verdicts(run("--kdriver-vm", "wine"))
        assert found["test_same_module[wine]"] == "FAILED"
        found = verdicts(run("--kdriver-vm", "wine", "--kdriver-isolation", "none"))
        assert found["test_other_module[wine]"] == "PASSED"

    def test_a_marker_wins_and_a_module_sees_nothing_of_another_one(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        project.makeconftest(
            """
            import pytest
            from pytest_kdriver import AgentError

            def there(target):
                try:
                    return target.get("C:\\\\canary.txt") == b"here"
                except AgentError:
                    return False

            @pytest.fixture
            def canary(kdriver_target):
                before = there(kdriver_target)
                kdriver_target.put(b"here", "C:\\\\canary.txt")
                return before
            """
        )
        project.makepyfile(
            test_one="""
            import pytest
            def test_first(canary): assert not canary
            @pytest.mark.kdriver_isolation("test")
            def test_marked_test(canary): assert not canary
            def test_unmarked(canary): assert canary
            """,
            test_two="""
            import pytest
            @pytest.mark.kdriver_isolation("none")
            def test_marked_none_sees_the_other_module(canary): assert canary
            def test_unmarked_does_not(canary): assert not canary
            def test_and_then_sees_its_own_module(canary): assert canary
            """,
            test_three="""
            import pytest
            pytestmark = pytest.mark.kdriver_isolation("test")
            def test_marked_by_its_module(canary): assert not canary
            @pytest.mark.kdriver_isolation("session")
            def test_closest_wins(canary): assert canary
            """,
        )
        result = run("--kdriver-vm", "wine", "test_one.py", "test_two.py", "test_three.py")
        result.assert_outcomes(passed=8)


class TestMarker:
    def test_marks_are_merged_into_one_that_has_all_keywords(
        self, project: pytest.Pytester, run: Run, cargo: Cargo
    ) -> None:
        image = cargo.build("hello")
        folder = project.mkdir("inner")
        for place in (folder / "beside", project.mkdir("images")):
            place.mkdir(exist_ok=True)
            shutil.copy(image, place / f"{place.name}.sys")
        shutil.copy(image, folder / "both.sys")
        shutil.copy(cargo.build("refuses"), project.path / "both.sys")
        package = project.mkdir("made_package")
        shutil.copy(image, package / "packed.sys")
        (folder / "test_marks.py").write_text(
            """
import pytest

pytestmark = pytest.mark.kdriver("hello", timeout=20, tags="rust")

def arguments(request):
    (mark,) = request.node.iter_markers("kdriver")
    assert not mark.args
    return mark.kwargs

def test_from_its_module(kdriver, request):
    assert arguments(request) == dict(
        name="hello", path=None, parameters={}, service=None, leaks="forbid",
        breakpoints="forbid", tags=("rust",),
        requires=(), timeout=20.0)
    assert kdriver.name == kdriver.service == "hello"

@pytest.mark.kdriver(leaks="allow", timeout=10, parameters={"A": 1})
class TestClass:
    def test_closer_wins_and_the_rest_stays(self, kdriver, request):
        assert arguments(request) == dict(
            name="hello", path=None, parameters={"A": 1}, service=None, leaks="allow",
            breakpoints="forbid", tags=("rust",), requires=(), timeout=10.0)

    @pytest.mark.kdriver("refuses", parameters={"Status": 0xC00000A1}, service="other")
    def test_closest(self, kdriver, request):
        assert arguments(request)["parameters"] == {"Status": 0xC00000A1}
        assert (kdriver.name, kdriver.service) == ("refuses", "other")
        assert kdriver.start(check=False) == 0xC00000A1

@pytest.mark.kdriver("beside/beside.sys")
def test_a_path_beside_the_test_file(kdriver, request):
    assert arguments(request)["name"] == "beside"
    assert arguments(request)["path"] == "beside/beside.sys"
    assert kdriver.start() == 0

@pytest.mark.kdriver("images/images.sys")
def test_a_path_from_the_rootdir(kdriver):
    assert (kdriver.name, kdriver.start()) == ("images", 0)

@pytest.mark.kdriver("both.sys")
def test_a_path_that_is_beside_and_in_the_rootdir(kdriver):
    assert kdriver.start() == 0

@pytest.mark.kdriver("../made_package/")
def test_a_package_folder(kdriver):
    assert (kdriver.image.name, kdriver.start()) == ("packed.sys", 0)
"""
        )
        run("--kdriver-vm", "wine").assert_outcomes(passed=7)

    def test_drivers_are_selected_by_name_on_the_command_line(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        add_to_config(project, 'vm = "wine"\n')
        project.makepyfile(
            test_it="""
            import pytest
            @pytest.mark.kdriver("hello")
            def test_by_position(kdriver): pass
            @pytest.mark.kdriver(name="hello")
            def test_by_keyword(kdriver): pass
            @pytest.mark.kdriver("somewhere/hello.sys")
            def test_by_path(kdriver): pass
            @pytest.mark.kdriver("leaks", leaks="allow")
            def test_another(kdriver): pass
            """
        )

        def selected(expression: str) -> list[str]:
            lines = run("--collect-only", "-qq", "-m", expression).outlines
            return [line.partition("::")[2].partition("[")[0] for line in lines if "::" in line]

        assert selected("kdriver(name='hello')") == [
            "test_by_position",
            "test_by_keyword",
            "test_by_path",
        ]
        assert selected("kdriver(leaks='allow')") == ["test_another"]

    def test_what_a_test_requires_and_its_target_has_not_skips_it_with_the_reason(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        add_to_config(
            project, '[targets.poor]\nkind = "wine"\nwithout = ["snapshots", "programs"]\n'
        )
        project.makepyfile(
            test_it="""
            import pytest
            @pytest.mark.kdriver("hello", requires=("kernel-log", "snapshots"))
            def test_requires(kdriver): pass
            @pytest.mark.kdriver_isolation("test")
            def test_needs_a_revert(kdriver_target): pass
            @pytest.mark.skip(reason="not today")
            def test_skipped_anyway(kdriver_target): pass
            def test_requires_nothing(kdriver_target):
                from pytest_kdriver import CapabilityError
                with pytest.raises(CapabilityError, match="no capability 'programs'"):
                    kdriver_target.run(["cmd"])
            """
        )
        result = run("--kdriver-vm", "poor", "-rs")
        assert verdicts(result) == {
            "test_requires[poor]": "SKIPPED",
            "test_needs_a_revert[poor]": "SKIPPED",
            "test_skipped_anyway[poor]": "SKIPPED",
            "test_requires_nothing[poor]": "PASSED",
        }
        result.stdout.fnmatch_lines(["SKIPPED*2*target 'poor' has no capability 'snapshots'"])
        result.stdout.fnmatch_lines(["SKIPPED*not today"])

    def test_a_target_that_is_asked_for_too_late_says_so(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        project.makepyfile("def test_it(request): request.getfixturevalue('kdriver_target')")
        result = run("--kdriver-vm", "wine")
        result.assert_outcomes(failed=1)
        assert "Name kdriver or kdriver_target as an argument" in failure(result, "test_it")

    def test_without_a_mark_the_fixture_says_what_to_write(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        project.makepyfile("def test_it(kdriver): pass")
        result = run("--kdriver-vm", "wine")
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(
            ['which driver? Mark the test with @pytest.mark.kdriver("NAME")*']
        )


class TestVerdict:
    def test_the_pool_is_judged_behind_the_body_and_still_in_its_call_phase(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        project.makepyfile(
            """
            import pytest
            from pytest_kdriver import PoolError

            leaks = pytest.mark.kdriver("leaks", parameters={"Blocks": 3, "Bytes": 100})

            @leaks
            def test_leak(kdriver):
                with kdriver.running():
                    pass

            @leaks
            def test_leak_of_a_driver_that_is_left_running(kdriver):
                kdriver.start()

            @leaks
            @pytest.mark.xfail(raises=PoolError, strict=True)
            def test_xfail(kdriver):
                kdriver.start()

            @leaks
            @pytest.mark.kdriver(leaks="allow")
            def test_allowed(kdriver):
                kdriver.start()

            @leaks
            @pytest.mark.kdriver(tags=("abcd",))
            def test_other_tags(kdriver):
                kdriver.start()

            @leaks
            def test_body(kdriver):
                with kdriver.running():
                    assert 1 == 2

            @pytest.mark.kdriver("leaks", leaks="allow", parameters={"Blocks": 0, "Fault": "double-free"})
            def test_double_free(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("leaks", leaks="allow", parameters={"Blocks": 0, "Fault": "wrong-tag"})
            def test_wrong_tag(kdriver):
                kdriver.start()

            @pytest.fixture
            def leaves_something(kdriver):
                kdriver.start()
                kdriver.stop()
                yield kdriver
                kdriver.stop()  # it is stopped already: no mistake
                kdriver.start()

            @pytest.mark.kdriver("leaks", parameters={"Where": "init"}, leaks="allow")
            def test_fixture_allowed(leaves_something):
                assert not leaves_something.loaded

            @leaks
            @pytest.mark.kdriver(parameters={"Blocks": 0, "Where": "cleanup"})
            def test_clean(kdriver):
                kdriver.start()
            """
        )
        result = run("--kdriver-vm", "wine")
        assert verdicts(result) == {
            "test_leak[wine]": "FAILED",
            "test_leak_of_a_driver_that_is_left_running[wine]": "FAILED",
            "test_xfail[wine]": "XFAIL",
            "test_allowed[wine]": "PASSED",
            "test_other_tags[wine]": "PASSED",
            "test_body[wine]": "FAILED",
            "test_double_free[wine]": "FAILED",
            "test_wrong_tag[wine]": "FAILED",
            "test_fixture_allowed[wine]": "PASSED",
            "test_clean[wine]": "PASSED",
        }
        leak = failure(result, "test_leak[wine]")
        assert "leaks on wine: 3 blocks, 300 bytes leaked:" in leak
        place = r"from \S+/leaks/src/lib\.rs:\d+ in leaks::"
        assert re.search(rf"3 blocks +300 bytes  tag 'leak'  NonPagedPoolNx  {place}Plan::", leak)
        assert "plugin.py" not in leak
        assert "driver.py" not in leak
        body = failure(result, "test_body[wine]")
        assert "assert 1 == 2" in body
        assert re.search(r"-+ Pool -+\n3 blocks, 300 bytes leaked:", body)
        twice = failure(result, "test_double_free[wine]")
        assert re.search(f"freed twice, the second time {place}.*; it was allocated {place}", twice)
        wrong = failure(result, "test_wrong_tag[wine]")
        assert re.search(f"with tag 'leak' freed with tag 'Wrng' {place}", wrong)

    def test_what_fixtures_do_behind_the_body_is_judged_at_teardown(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        project.makepyfile(
            """
            import pytest

            @pytest.fixture
            def starts_again(kdriver):
                yield
                kdriver.start()

            @pytest.fixture
            def looks(kdriver):
                yield
                with kdriver.running():
                    kdriver.dbgprint.expect("Hello, world!")

            @pytest.mark.kdriver("leaks")
            def test_leak_at_teardown(starts_again): pass

            @pytest.mark.kdriver("panics")
            def test_crash_at_teardown(starts_again): pass

            @pytest.mark.kdriver("hello")
            def test_clean(looks, kdriver):
                assert kdriver.start() == 0
            """
        )
        result = run("--kdriver-vm", "wine")
        assert verdicts(result) == {
            "test_leak_at_teardown[wine]": "PASSED, ERROR",
            "test_crash_at_teardown[wine]": "PASSED, ERROR",
            "test_clean[wine]": "PASSED",
        }
        assert "1 block, 64 bytes leaked" in failure(result, "test_leak_at_teardown[wine]")

    def test_nothing_is_swallowed_behind_an_error_that_the_test_catches(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        project.makepyfile(
            """
            import pytest

            @pytest.mark.kdriver("panics", parameters={"Where": "cleanup"})
            def test_crash_in_the_stop(kdriver):
                with pytest.raises(ValueError):
                    with kdriver.running():
                        raise ValueError

            def test_leak_of_another(kdriver_target):
                with pytest.raises(ValueError):
                    with kdriver_target.driver("leaks") as leaks:
                        leaks.start()
                        raise ValueError

            @pytest.mark.kdriver("leaks")
            def test_skip(kdriver):
                kdriver.start()
                pytest.skip("half way")

            @pytest.mark.kdriver("panics", parameters={"Where": "cleanup"})
            def test_both_are_told(kdriver):
                with kdriver.running():
                    raise ValueError

            @pytest.fixture
            def looks_back(kdriver):
                yield
                assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]

            @pytest.mark.kdriver("hello")
            def test_what_was_seen_can_still_be_seen(looks_back, kdriver):
                kdriver.start()
            """
        )
        result = run("--kdriver-vm", "wine")
        assert verdicts(result) == {
            "test_crash_in_the_stop[wine]": "FAILED",
            "test_leak_of_another[wine]": "FAILED",
            "test_skip[wine]": "FAILED",
            "test_both_are_told[wine]": "FAILED",
            "test_what_was_seen_can_still_be_seen[wine]": "PASSED",
        }
        assert "bug check 0x52555354" in failure(result, "test_crash_in_the_stop[wine]")
        assert "1 block, 64 bytes leaked" in failure(result, "test_leak_of_another[wine]")
        assert "DbgPrint" in failure(result, "test_leak_of_another[wine]")
        assert "1 block, 64 bytes leaked" in failure(result, "test_skip[wine]")
        both = failure(result, "test_both_are_told[wine]")
        assert "raise ValueError" in both
        assert "besides: panics on wine: bug check 0x52555354" in both

    def test_a_half_done_install_is_no_obstacle_to_the_next_test(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        project.makepyfile(
            """
            import pytest

            @pytest.mark.kdriver("hello", parameters={"x" * 20000: 1})
            def test_a_name_too_long(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("hello")
            def test_next(kdriver):
                kdriver.start()
            """
        )
        result = run("--kdriver-vm", "wine")
        assert verdicts(result) == {
            "test_a_name_too_long[wine]": "FAILED",
            "test_next[wine]": "PASSED",
        }
        assert "installing it: set_value" in failure(result, "test_a_name_too_long[wine]")

    def test_an_artifacts_path_that_is_no_folder_ends_the_run_with_a_sentence(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        project.makepyfile(HELLO)
        (project.path / "taken").write_text("")
        result = run("--kdriver-vm", "wine", "--kdriver-artifacts=taken")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert "artifacts: " in result.stderr.str()
        assert "Traceback" not in result.stderr.str()

    def test_a_config_above_the_tests_counts(self, project: pytest.Pytester, run: Run) -> None:
        add_to_config(project, 'vm = "wine"')
        tests = project.mkdir("tests")
        (tests / "test_it.py").write_text(HELLO)
        project.chdir()
        os.chdir(tests)
        run().assert_outcomes(passed=1)

    def test_crashes(self, project: pytest.Pytester, run: Run, verdicts: Verdicts) -> None:
        project.makepyfile(
            """
            import os, signal, pytest
            from pathlib import Path
            from pytest_kdriver import DriverCrashed, NoSuchLine

            def kill_process_of(driver):
                for maps in Path("/proc").glob("[0-9]*/maps"):
                    try:
                        # what stands in kdriver is the image of the driver under test
                        if f"/{driver}.sys" in maps.read_text() and own(maps.parent):
                            os.kill(int(maps.parent.name), signal.SIGKILL)
                    except OSError:
                        pass

            def own(process):
                mark = f"/runs/{os.getpid()}-".encode()
                return mark in (process / "environ").read_bytes()

            def wait_for_death(kdriver):
                with pytest.raises(DriverCrashed):
                    kdriver.dbgprint.wait_for("what it never says", timeout=20)

            @pytest.mark.kdriver("panics")
            def test_crash_raises_from_the_call(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("panics", parameters={"How": "bug-check"})
            def test_caught(kdriver):
                with pytest.raises(DriverCrashed) as crash:
                    kdriver.start()
                assert crash.value.code == 0xE2E2
                assert crash.value.parameters == (1, 2, 3, 4)
                with pytest.raises(NoSuchLine):  # and it is not raised again
                    kdriver.dbgprint.expect("never", timeout=0)

            @pytest.mark.kdriver("hello")
            def test_next_one_runs(kdriver):
                with kdriver.running(): pass

            @pytest.mark.kdriver("panics", parameters={"Where": "cleanup"})
            def test_crash_at_the_end_of_the_body(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("hello")
            def test_dies_and_nobody_calls(kdriver):
                kdriver.start()
                kill_process_of("hello")

            @pytest.mark.kdriver("hello")
            def test_dies_and_the_next_call_says_so(kdriver):
                kdriver.start()
                kill_process_of("hello")
                with pytest.raises(DriverCrashed, match="the process that ran the driver ended"):
                    kdriver.stop()
                assert kdriver.start() == 0

            @pytest.mark.kdriver("hello")
            def test_dies_and_a_wait_says_so(kdriver):
                kdriver.start()
                kill_process_of("hello")
                wait_for_death(kdriver)

            @pytest.mark.kdriver("hello", leaks="allow")
            def test_another_one_crashes_and_the_test_knows(kdriver, kdriver_target):
                with kdriver.running():
                    with kdriver_target.driver("panics") as panics:
                        with pytest.raises(DriverCrashed):
                            panics.start()

            @pytest.mark.kdriver("panics")
            @pytest.mark.xfail(raises=DriverCrashed, strict=True)
            def test_xfail(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("missing")
            def test_missing_export(kdriver):
                with pytest.raises(DriverCrashed, match="KdriverNoSuchExport"):
                    kdriver.start()

            @pytest.mark.kdriver("hello")
            def test_last_one_runs(kdriver):
                with kdriver.running(): pass
            """
        )
        result = run("--kdriver-vm", "wine")
        assert verdicts(result) == {
            "test_crash_raises_from_the_call[wine]": "FAILED",
            "test_caught[wine]": "PASSED",
            "test_next_one_runs[wine]": "PASSED",
            "test_crash_at_the_end_of_the_body[wine]": "FAILED",
            "test_dies_and_nobody_calls[wine]": "FAILED",
            "test_dies_and_the_next_call_says_so[wine]": "PASSED",
            "test_dies_and_a_wait_says_so[wine]": "PASSED",
            "test_another_one_crashes_and_the_test_knows[wine]": "PASSED",
            "test_xfail[wine]": "XFAIL",
            "test_missing_export[wine]": "PASSED",
            "test_last_one_runs[wine]": "PASSED",
        }
        told = failure(result, "test_crash_raises_from_the_call[wine]")
        assert "DriverCrashed: panics on wine: bug check 0x52555354" in told
        assert re.search(r"panicked at panics[/\\]src[/\\]lib.rs:\d+", told)
        assert ">       kdriver.start()" in told
        assert "pytest_kdriver/driver.py" not in told
        assert re.search(r"-+ DbgPrint -+\nabout to panic\n", told)
        assert re.search(r"-+ Kernel -+\n +\d\.\d{3}  panics: DriverEntry is called", told)
        assert "the process that ran the driver ended" in failure(
            result, "test_dies_and_nobody_calls[wine]"
        )

    def test_nothing_passes_by_blindness(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        add_to_config(
            project,
            '[targets.deaf]\nkind = "wine"\nwithout = ["kernel-log"]\n'
            '[targets.blind]\nkind = "wine"\nwithout = ["pool"]\n',
        )
        project.makepyfile(
            """
            import pytest
            from pytest_kdriver import CapabilityError

            @pytest.mark.kdriver("hello")
            def test_views(kdriver, kdriver_target):
                with kdriver.running():
                    if kdriver_target.name == "deaf":
                        with pytest.raises(CapabilityError, match="no capability 'kernel-log'"):
                            kdriver.dbgprint
                        assert not kdriver.pool.in_use
                    else:
                        with pytest.raises(CapabilityError, match="no capability 'pool'"):
                            kdriver.pool
                        kdriver.dbgprint.expect("Hello, world!")

            @pytest.mark.kdriver("leaks", leaks="allow")
            def test_allowed(kdriver):
                kdriver.start()

            @pytest.mark.kdriver("hello")
            def test_not_started(kdriver):
                pass
            """
        )
        result = run("--kdriver-vm", "deaf", "--kdriver-vm", "blind")
        assert verdicts(result) == {
            "test_views[deaf]": "PASSED",
            "test_allowed[deaf]": "PASSED",
            "test_not_started[deaf]": "PASSED",
            "test_views[blind]": "FAILED",
            "test_allowed[blind]": "PASSED",
            "test_not_started[blind]": "PASSED",
        }
        assert "whether it leaks can't be seen on target 'blind'" in failure(
            result, "test_views[blind]"
        )


class TestReport:
    def test_a_failed_test_s_sections_are_kept_in_the_artifacts_folder(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        project.makepyfile(
            test_it="""
            import pytest
            @pytest.mark.kdriver("hello")
            def test_fails(kdriver):
                with kdriver.running():
                    assert kdriver.dbgprint.lines == ["Good day!"]
            @pytest.mark.kdriver("hello")
            def test_passes(kdriver):
                kdriver.start()
            """
        )
        result = run("--kdriver-vm", "wine", "--kdriver-artifacts", "kept")
        result.assert_outcomes(failed=1, passed=1)
        (kept,) = (project.path / "kept").glob("*.txt")
        assert "test_fails[wine]" in kept.name
        text = kept.read_text()
        told = failure(result, "test_fails[wine]")
        for title in ("DbgPrint", "Pool", "Kernel"):
            section = re.search(rf"=== {title} ===\n(.*?)\n\n", text, re.DOTALL)
            assert section is not None
            assert section[1] in told
            assert re.search(rf"^-+ {title} -+$", told, re.MULTILINE)
        assert "hello left nothing behind" in text
        assert "hello: DriverEntry returned STATUS_SUCCESS" in text
        log = kept.with_name(f"{kept.stem}.kernel.log").read_text()
        assert log.rstrip() in text

    def test_what_a_target_tells_is_shown_while_it_is_told(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        project.makepyfile(
            """
            from pytest_kdriver.telling import tell

            def test_passes(kdriver_target):
                print("its own")
                tell("half an hour to go")
            """
        )
        result = run("--kdriver-vm", "wine")
        result.assert_outcomes(passed=1)
        assert "kdriver: half an hour to go" in result.stderr.str()
        assert "its own" not in result.stdout.str() + result.stderr.str()

    def test_dumps_have_to_be_put_somewhere(self, project: pytest.Pytester, run: Run) -> None:
        result = run("--kdriver-vm", "wine", "--kdriver-dumps")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines("*dumps need a folder: give --kdriver-artifacts DIR, too")

    def test_a_build_error_shows_cargo_s_output_and_no_traceback(
        self, project: pytest.Pytester, run: Run
    ) -> None:
        package = project.mkdir("broken")
        (package / "Cargo.toml").write_text(
            '[package]\nname = "broken"\nversion = "0.1.0"\nedition = "2021"\n[workspace]\n'
            '[lib]\ncrate-type = ["cdylib"]\n'
        )
        (package / "src").mkdir()
        (package / "src" / "lib.rs").write_text("#![no_std]\nthis is no Rust\n")
        (project.path / "kdriver.toml").write_text('manifest = "broken/Cargo.toml"\n')
        project.makepyfile(
            test_it="""
            import pytest
            @pytest.mark.kdriver("broken")
            def test_broken(kdriver): pass
            @pytest.mark.kdriver("absent")
            def test_absent(kdriver): pass
            @pytest.mark.kdriver("./absent.sys")
            def test_no_file(kdriver): pass
            """
        )
        result = run("--kdriver-vm", "wine")
        result.assert_outcomes(errors=3)
        broken = failure(result, "test_broken[wine]")
        assert "BuildError: package 'broken' does not build" in broken
        assert re.search(r"error: expected .*\n +--> \S*src/lib.rs:2:", broken)
        absent = failure(result, "test_absent[wine]")
        assert re.search(r"BuildError: no package 'absent' in \S+; there are: broken", absent)
        assert "ImageError: there is no " in failure(result, "test_no_file[wine]")
        assert ".py:" not in broken + absent

    def test_a_target_that_can_t_be_had_is_one_sentence_for_each_of_its_tests(
        self, project: pytest.Pytester, run: Run, verdicts: Verdicts
    ) -> None:
        add_to_config(project, '[targets.gone]\nkind = "wine"\nwine = "/nonexistent/wine"\n')
        project.makepyfile(test_it=HELLO + "\ndef test_second(kdriver_target): pass\n")
        result = run("--kdriver-vm", "gone", "--kdriver-vm", "wine")
        assert verdicts(result) == {
            "test_hello[gone]": "ERROR",
            "test_second[gone]": "ERROR",
            "test_hello[wine]": "PASSED",
            "test_second[wine]": "PASSED",
        }
        for name in ("test_hello[gone]", "test_second[gone]"):
            told = failure(result, name).strip()
            assert "there is no Wine '/nonexistent/wine'" in told
            assert "\n" not in told
        assert "Traceback" not in result.stdout.str() + result.stderr.str()


class TestTogether:
    def test_reruns(self, project: pytest.Pytester, run: Run, verdicts: Verdicts) -> None:
        project.makepyfile(
            """
            import pytest
            tries = []
            @pytest.mark.kdriver("leaks", parameters={"Blocks": 1})
            @pytest.mark.flaky(reruns=1)
            def test_always_leaks(kdriver):
                kdriver.start()
            @pytest.mark.kdriver("hello")
            @pytest.mark.flaky(reruns=2)
            def test_third_time(kdriver):
                tries.append(1)
                with kdriver.running(): pass
                assert kdriver.dbgprint.lines == ["Hello, world!", "Bye bye!"]
                assert len(tries) == 3
            """
        )
        assert verdicts(run("--kdriver-vm", "wine")) == {
            "test_always_leaks[wine]": "RERUN, FAILED",
            "test_third_time[wine]": "RERUN, RERUN, PASSED",
        }

    def test_workers_have_targets_of_their_own(
        self,
        project: pytest.Pytester,
        run: Run,
        verdicts: Verdicts,
        left_behind: Callable[[], list[str]],
    ) -> None:
        body = (
            HELLO
            + "\n@pytest.mark.kdriver('chatty', parameters={'Lines': 30000})\n"
            + (
                "def test_many_lines(kdriver):\n"
                "    kdriver.start()\n"
                "    assert [int(line.split()[0]) for line in kdriver.dbgprint.lines] == "
                "list(range(1, 30001))\n"
            )
        )
        project.makepyfile(test_one=body, test_two=body)
        artifacts = (
            "--kdriver-artifacts",
            "kept",
        )  # the same for both: they must not collide there
        result = run("--kdriver-vm", "wine", "-n", "2", "--dist", "loadfile", *artifacts)
        result.assert_outcomes(passed=4)
        assert set(re.findall(r"\[(gw\d)\] \[", result.stdout.str())) == {"gw0", "gw1"}
        assert left_behind() == []

    @pytest.mark.parametrize(
        ("config", "mark", "sentence"),
        [
            ("", "leak='allow'", "kdriver has no argument 'leak'"),
            ("vm = 'none'", "", "vm: no target 'none'"),
        ],
    )
    def test_workers_fail_the_tests_of_what_can_t_be(
        self, project: pytest.Pytester, run: Run, config: str, mark: str, sentence: str
    ) -> None:
        add_to_config(project, config or 'vm = "wine"')
        project.makepyfile(
            f"""
            import pytest
            @pytest.mark.kdriver("hello", {mark})
            def test_bad(kdriver): pass
            def test_good(): pass
            """
        )
        result = run("-n", "2")
        result.assert_outcomes(errors=1, passed=1)
        assert sentence in result.stdout.str()
        assert "INTERNALERROR" not in result.stdout.str()

    def test_two_runs_at_once_and_nothing_is_left(
        self, project: pytest.Pytester, left_behind: Callable[[], list[str]]
    ) -> None:
        project.makepyfile(HELLO)
        command = [sys.executable, "-m", "pytest", "-q", "--kdriver-vm", "wine", "-W", "error"]
        runs = [
            subprocess.Popen(
                [*command, "-p", "no:cacheprovider"],
                cwd=project.path,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in runs:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
        assert left_behind() == []


ARRIVED = """
        import signal, threading, pytest
        from pytest_kdriver.targets.runs import runs_directory

        def arrived():
            print("arrived", flush=True)
"""
MOMENTS = {
    "while a driver is loaded": """
        @pytest.mark.kdriver("hello")
        def test_it(kdriver):
            kdriver.start()
            arrived()
            signal.pause()
    """,
    "while DriverEntry hangs": """
        @pytest.mark.kdriver("stubborn", parameters={"How": "slow-init"})
        def test_it(kdriver):
            threading.Thread(target=tell, args=(kdriver,), daemon=True).start()
            kdriver.start()

        def tell(kdriver):
            kdriver.dbgprint.expect("slow", timeout=60)
            arrived()
    """,
    "while Wine starts": """
        def tell():
            while not list(runs_directory().glob("*/prefix-1")):
                pass
            arrived()

        threading.Thread(target=tell, daemon=True).start()

        def test_it(kdriver_target):
            signal.pause()
    """,
}


class TestEnding:
    """What a run that is interrupted, or killed, leaves behind."""

    @pytest.fixture
    def begin(self, project: pytest.Pytester) -> Callable[[str], subprocess.Popen[str]]:
        def begin(moment: str) -> subprocess.Popen[str]:
            project.makepyfile(test_it=ARRIVED + MOMENTS[moment])
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-s", "--kdriver-vm", "wine", "test_it.py"],
                cwd=project.path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if "arrived" in line:
                    return process
            pytest.fail("it ended before")

        return begin

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_ctrl_c_leaves_nothing(
        self,
        begin: Callable[[str], subprocess.Popen[str]],
        left_behind: Callable[[], list[str]],
        moment: str,
    ) -> None:
        process = begin(moment)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of the job
        output, _ = process.communicate(timeout=60)
        assert process.returncode == pytest.ExitCode.INTERRUPTED, output
        assert "KeyboardInterrupt" in output
        assert left_behind() == []

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_what_sigkill_leaves_is_removed_by_gc(
        self,
        begin: Callable[[str], subprocess.Popen[str]],
        left_behind: Callable[[], list[str]],
        moment: str,
    ) -> None:
        process = begin(moment)
        process.kill()
        process.communicate(timeout=60)
        assert left_behind() != []
        done = subprocess.run(
            [str(Path(sys.executable).with_name("kdriver")), "gc"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.startswith("removed ")
        assert left_behind() == []

    def test_what_sigkill_leaves_is_removed_by_the_next_run(
        self,
        begin: Callable[[str], subprocess.Popen[str]],
        project: pytest.Pytester,
        run: Run,
        left_behind: Callable[[], list[str]],
    ) -> None:
        process = begin("while a driver is loaded")
        process.kill()
        process.communicate(timeout=60)
        project.makepyfile(test_next=HELLO)
        run("--kdriver-vm", "wine", "test_next.py").assert_outcomes(passed=1)
        assert left_behind() == []

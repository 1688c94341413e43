"""``python -m fuzz [TARGET ...]``: try inputs, and write what was done to ``bench/fuzz.json``.

A tenth of the inputs has the structure of real ones, by hypothesis; the others are atheris', which looks for
new code, or where that is not to be had real ones that were changed by chance. The exit code is 1 where an
input showed a mistake; ``python -m fuzz TARGET --input FILE`` tries that one again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from fuzz.targets import TARGETS

RESULTS: Final = Path(__file__).parents[1] / "bench" / "fuzz.json"
FOUND: Final = Path("fuzz-found")
_COUNTS: Final = ("inputs", "seconds")
_MOSTS: Final = ("slowest_ms", "most_memory_kib", "peak_rss_mib")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the parsers.")
    parser.add_argument("target", nargs="*", choices=[*TARGETS, []], help="only these")
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, metavar="FILE", help="try this one alone")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.input is not None:
        for name in names:
            TARGETS[name].check(options.input.read_bytes())
        return 0
    findings = [finding for name in names if (finding := _fuzz(name, options.count, options.seed))]
    return 1 if findings else 0


def _fuzz(name: str, count: int, seed: int) -> str | None:
    """Fuzz one target, and record it; the finding, if there is one."""
    told: dict[str, object] = {
        "seed": seed,
        "commit": _commit(),
        "python": platform.python_version(),
    }
    totals: dict[str, float] = {}
    engines: dict[str, int] = {}
    finding: str | None = None
    other = "atheris" if importlib.util.find_spec("atheris") else "mutation"
    for engine, wanted in (("hypothesis", count // 10), (other, count - count // 10)):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result"
            command = [sys.executable, "-m", "fuzz.engines", name, engine, str(wanted), str(seed)]
            ended = subprocess.run([*command, str(result)], check=False)
            done = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
            finding = done.get("finding") or (
                f"exit code {ended.returncode}" if ended.returncode else None
            )
            if finding is not None:
                FOUND.mkdir(exist_ok=True)
                for file in (result.with_suffix(".input"), *Path(folder).glob("crash-*")):
                    if file.exists():
                        shutil.copy(file, FOUND / f"{name}-{file.name}")
                        print(f"{name}: {finding}: see {FOUND / f'{name}-{file.name}'}")
        engines[_named(engine)] = int(done.get("inputs", 0))
        for key in _COUNTS:
            totals[key] = round(totals.get(key, 0) + done.get(key, 0), 1)
        for key in _MOSTS:
            totals[key] = max(totals.get(key, 0), done.get(key, 0))
        if finding is not None:
            break
    told |= {**totals, "inputs": int(totals["inputs"]), "engines": engines, "finding": finding}
    print(f"{name}: {json.dumps(told)}", flush=True)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {name: told}, indent=2) + "\n", encoding="utf-8")
    return finding


def _named(engine: str) -> str:
    return engine if engine == "mutation" else f"{engine} {importlib.metadata.version(engine)}"


def _commit() -> str:
    """The commit that is fuzzed, with a + where the parsers were changed since."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "pytest_kdriver/kernel", "fuzz")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


if __name__ == "__main__":
    sys.exit(main())

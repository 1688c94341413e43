"""``python -m fuzz [TARGET ...]``: try inputs, and write what was done to ``bench/fuzz.json``.

A twentieth of the inputs has the structure of real ones, by hypothesis; the others are atheris', which looks
for new code, or where that is not to be had real ones that were changed by chance. The exit code is 1 where
an input showed a mistake; ``python -m fuzz TARGET --input FILE`` tries that one again. Ctrl-C ends it, and
what was tried until then is recorded.
"""

from __future__ import annotations

import argparse
import hashlib
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
_SUMS: Final = ("seconds",)
_PEAKS: Final = ("slowest_ms", "most_memory_kib", "peak_rss_mib")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzz the parsers.")
    parser.add_argument("target", nargs="*", choices=[*TARGETS, []], help="only these")
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, metavar="FILE", help="try this one alone")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    found = False
    if options.input is not None:
        for name in names:
            TARGETS[name].check(options.input.read_bytes())
        return 0
    for name in names:
        told = _fuzz(name, options.count, options.seed)
        print(f"{name}: {json.dumps(told)}", flush=True)
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        text = json.dumps(dict(sorted((known | {name: told}).items())), indent=2)
        RESULTS.write_text(text + "\n", encoding="utf-8")
        if told["stopped"]:
            return 130
        found = found or told["finding"] is not None
    return 1 if found else 0


def _fuzz(name: str, count: int, seed: int) -> dict[str, object]:
    """Fuzz one target; what is to be recorded of it."""
    sums = dict.fromkeys(_SUMS, 0.0)
    peaks = dict.fromkeys(_PEAKS, 0.0)
    engines: dict[str, int] = {}
    finding: str | None = None
    stopped = False
    structured = count // 20
    other = "atheris" if importlib.util.find_spec("atheris") else "mutation"
    for engine, wanted in (("hypothesis", structured), (other, count - structured)):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result"
            command = [sys.executable, "-m", "fuzz.engines", name, engine, str(wanted), str(seed)]
            code = 0
            try:
                code = subprocess.run([*command, str(result)], check=False).returncode
            except KeyboardInterrupt:
                stopped = True
            done = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
            if code:
                finding = done.get("finding") or f"exit code {code}"
                _keep(name, finding, result.with_suffix(".input"))
        engines[_named(engine)] = int(done.get("inputs", 0))
        sums = {key: round(value + done.get(key, 0), 1) for key, value in sums.items()}
        peaks = {key: max(value, done.get(key, 0)) for key, value in peaks.items()}
        if stopped or finding is not None:
            break
    return {
        "inputs": sum(engines.values()),
        "engines": engines,
        "seed": seed,
        "commit": _commit(),
        "python": platform.python_version(),
        **sums,
        **peaks,
        "finding": finding,
        "stopped": stopped,
    }


def _keep(name: str, finding: str, file: Path) -> None:
    """Keep the input that showed ``finding``, and say where."""
    print(f"{name}: {finding}")
    if file.exists():
        FOUND.mkdir(exist_ok=True)
        kept = FOUND / f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
        shutil.copy(file, kept)
        print(f"python -m fuzz {name} --input {kept}")


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

"""What makes inputs: one engine, in a process of its own, for one target.

``python -m fuzz.engines TARGET ENGINE COUNT SEED RESULT``: after ``COUNT`` inputs, or at the first that shows
a mistake, the file ``RESULT`` has what was done. The input that shows it lies beside that, as ``.input``.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fuzz.targets import Target

MOST_SECONDS: Final = 5.0
"""Of the processor's, for one input."""
MOST_MEMORY: Final = 32 << 20
"""Bytes, for one input; each thousandth is looked at."""
MOST_ADDRESS_SPACE: Final = 4 << 30

_SAMPLED: Final = 1000
_BATCH: Final = 2000
_TELL_EACH: Final = 2.0


class Tally:
    """Tries inputs, and counts; the process ends when it has tried enough."""

    def __init__(self, target: Target, count: int, result: Path) -> None:
        self._target = target
        self._count = count
        self._result = result
        self._began = self._told = time.monotonic()
        self._slowest = 0.0
        self._most_memory = 0
        self.tried = 0

    def check(self, data: bytes) -> None:
        """Try ``data``. Raises what it shows."""
        try:
            self._check(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._result.with_suffix(".input").write_bytes(data)
            self.tell(f"{type(error).__name__}: {error}")
            raise
        if time.monotonic() >= self._told + _TELL_EACH:
            self.tell()
        if self.tried >= self._count:
            self.tell()
            os._exit(0)  # atheris has no other way back

    def tell(self, finding: str | None = None) -> None:
        """Write what was done so far."""
        self._told = time.monotonic()
        told = {
            "inputs": self.tried,
            "seconds": round(time.monotonic() - self._began, 1),
            "slowest_ms": round(1000 * self._slowest, 1),
            "most_memory_kib": self._most_memory >> 10,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "finding": finding,
        }
        self._result.write_text(json.dumps(told), encoding="utf-8")

    def _check(self, data: bytes) -> None:
        self.tried += 1
        sampled = self.tried % _SAMPLED == 0
        if sampled:
            tracemalloc.start()
        began = time.thread_time()
        self._target.check(data)
        took = time.thread_time() - began
        if sampled:
            self._most_memory = max(self._most_memory, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert self._most_memory <= MOST_MEMORY, f"{self._most_memory} bytes of memory"
        else:
            self._slowest = max(self._slowest, took)
            assert took <= MOST_SECONDS, f"{took} s of a processor's time"


def run_hypothesis(tally: Tally, target: Target, count: int, seed: int) -> None:
    """Inputs of the target's own structure."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    batch = 0
    while tally.tried < count:
        test = given(target.inputs)(tally.check)
        limits = settings(
            max_examples=_BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seeded(seed * 1_000_000 + batch)(limits(test))()
        batch += 1


def run_atheris(tally: Tally, target: Target, seed: int, folder: Path) -> None:
    """Inputs that reach new code: libFuzzer's, by the coverage of the parsers."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(data)
    # A seed of 0 would be one by chance; a timeout is the tally's, in the processor's time.
    options = [
        f"-seed={seed or 1}",
        f"-max_len={target.longest}",
        "-rss_limit_mb=0",
        "-timeout=600",
    ]
    arguments = ["fuzz", *options, f"-artifact_prefix={folder}/", "-verbosity=0", str(corpus)]
    atheris.Setup(arguments, tally.check)
    atheris.Fuzz()


def run_mutation(tally: Tally, target: Target, seed: int) -> None:
    """Seeds that are changed by chance: where there is no atheris."""
    chance = random.Random(seed)
    seeds = target.seeds()
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(4):
                case 0:
                    data[at : at + 1] = chance.randbytes(1)
                case 1:
                    data[at:at] = chance.randbytes(chance.randrange(9))
                case 2:
                    del data[at : at + chance.randrange(64)]
                case _:
                    piece = chance.choice(seeds)
                    begin = chance.randrange(len(piece) + 1)
                    data[at:at] = piece[begin : begin + chance.randrange(256)]
        tally.check(bytes(data[: target.longest]))


def main(arguments: list[str]) -> None:
    name, engine, count, seed, result = arguments
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESS_SPACE, MOST_ADDRESS_SPACE))
    if engine == "atheris":
        import atheris

        instrumented: Any = atheris.instrument_imports(include=["pytest_kdriver.kernel"])
        with instrumented:
            from fuzz.targets import TARGETS
    else:
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    file = Path(result)
    tally = Tally(target, int(count), file)
    match engine:
        case "hypothesis":
            run_hypothesis(tally, target, int(count), int(seed))
        case "atheris":
            run_atheris(tally, target, int(seed), file.parent)
        case "mutation":
            run_mutation(tally, target, int(seed))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The kernel's pool counters for the kernel log: before a driver's load, and when it is gone again."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final

from pytest_kdriver.errors import AgentError, KernelLogError, TargetError
from pytest_kdriver.guest.agent import Agent
from pytest_kdriver.kernel.events import Moment, PoolTags, PoolTagUse
from pytest_kdriver.kernel.pool_tags import SYSTEM_POOL_TAG_INFORMATION, decode
from pytest_kdriver.targets.loader import Surroundings

SETTLED: Final = 3
"""The counters have settled when they are the same so often in a row."""

INTERVAL: Final = 0.1
"""Seconds between two looks. What a driver frees by a work item or a thread is free by then."""

SETTLE_TIMEOUT: Final = 1.0
"""Seconds after which counters that still change are taken as they are."""


def tells_pool(agent: Agent) -> bool:
    """Whether a guest's kernel tells its counters."""
    try:
        decode(agent.system_information(SYSTEM_POOL_TAG_INFORMATION), ())
    except (AgentError, KernelLogError):
        return False
    return True


class PoolSampling:
    """Samples the counters of one generation of a guest."""

    def __init__(self, target: Surroundings) -> None:
        self._target = target
        self._last: dict[str, tuple[PoolTagUse, ...]] = {}

    def sample(self, service: str, tags: Collection[str], moment: Moment) -> None:
        """Have the log hold the counters of ``tags``, once they have settled. Raises ``TargetError``.

        Where they are what they were at the driver's last sample, there is nothing to wait for. Of those that
        do not settle the lowest are taken: what others hold for a moment is not the driver's.
        """
        deadline = time.monotonic() + SETTLE_TIMEOUT
        last = self._last.get(service)
        looks = [self._look(tags)]
        while not (settled := looks[-1] == last or _are_the_same(looks[-SETTLED:])):
            if time.monotonic() >= deadline:
                break
            time.sleep(INTERVAL)
            looks.append(self._look(tags))
        uses = self._last[service] = looks[-1] if settled else _lowest(looks)
        self._target.log.append([PoolTags(time.monotonic(), service, moment, uses, settled)])

    def _look(self, tags: Collection[str]) -> tuple[PoolTagUse, ...]:
        target = self._target
        with target.agent_errors("pool counters"):
            try:
                return decode(target.agent.system_information(SYSTEM_POOL_TAG_INFORMATION), tags)
            except TimeoutError as error:
                target.break_down("its agent does not answer")
                raise TargetError(f"pool counters: {error}", target=target.name) from error
            except (AgentError, KernelLogError) as error:
                told = f"its kernel does not tell the pool's counters: {error}"
                raise TargetError(told, target=target.name) from error


def _are_the_same(looks: Sequence[tuple[PoolTagUse, ...]]) -> bool:
    return len(looks) == SETTLED and len(set(looks)) == 1


def _lowest(looks: Sequence[tuple[PoolTagUse, ...]]) -> tuple[PoolTagUse, ...]:
    """Of each tag and pool type the use with the fewest blocks. What the first look lacks had none."""
    return tuple(
        min((use for uses in looks for use in uses if _key(use) == _key(first)), key=_blocks)
        for first in looks[0]
    )


def _key(use: PoolTagUse) -> tuple[bytes, str]:
    return use.tag, use.pool_type


def _blocks(use: PoolTagUse) -> int:
    return use.blocks

"""Where the stages of a curation run: in this process, or in workers on a Ray cluster. The ledger is the same file."""

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from firm_jax.curation.engine import Engine
from firm_jax.curation.ledger import Budget, Ledger
from firm_jax.errors import ConfigError

EMBEDDED, RAY = ENGINES = ("embedded", "ray")


def ray_engine() -> type:
    """RayEngine. ConfigError where Ray is not installed."""
    try:
        from firm_jax.curation.ray_engine import RayEngine
    except ImportError as error:
        raise ConfigError(f"engine='{RAY}': {error}, or leave engine={EMBEDDED!r}") from error
    return RayEngine


@contextlib.asynccontextmanager
async def engines(
    name: str,
    makers: Mapping[str, Callable[[], Any]],
    ledger,
    root,
    *,
    budget: Budget,
    concurrency: int,
    workers: int,
) -> AsyncIterator[Callable[..., Any]]:
    """What makes an engine of stages: `run`, `stop` and `totals` as Engine's. One of them may run at a time.

    makers: by role what makes its teacher; the same maker for two roles makes one. ledger: the file, which nobody else
    may have open meanwhile. workers: for RAY alone, with `concurrency` records each.
    """
    if name == RAY:
        yield functools.partial(
            ray_engine(),
            teachers=makers,
            ledger=ledger,
            root=root,
            budget=budget,
            workers=workers,
            concurrency=concurrency,
        )
        return
    made = {make: make() for make in dict.fromkeys(makers.values())}
    teachers = {role: made[make] for role, make in makers.items()}
    try:
        with contextlib.closing(Ledger(ledger, budget)) as book:
            yield functools.partial(Engine, teachers=teachers, ledger=book, root=root, concurrency=concurrency)
    finally:
        for teacher in made.values():
            await teacher.close()

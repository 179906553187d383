"""The benchmark as a job: `python main.py --config configs/bench.py:tiny_gen --workdir runs/bench`."""

import contextlib
import json

import jax

from firm_jax import storage
from firm_jax.critic.bench.compare import Entrant, compare
from firm_jax.critic.bench.records import Fields, read_bench
from firm_jax.critic.score import Critic
from firm_jax.devices import default_dtype
from firm_jax.errors import ConfigError
from firm_jax.mesh import make_mesh
from firm_jax.run import Stopped
from firm_jax.signals import StopSignals
from firm_jax.workdir import WorkdirLock, plain_config, prepare_workdir


def bench(config, workdir: str) -> None:
    """Measure the critics of `config.critics`; leaves `compare`'s files in the workdir.

    The same job started again judges nothing that is judged. Raises ConfigError, DataError and WeightsError before
    anything is judged, Stopped on SIGTERM and SIGINT.
    """
    if jax.process_count() > 1:
        raise ConfigError("a benchmark is measured by one process; start it without the others")
    fields = dict(config.fields)
    fields["human_id"] = fields["human_id"] or fields["id"]
    items = read_bench(config.data, config.task, Fields(**fields), config.max_bad_fraction)
    entrants = [Entrant(name, **settings) for name, settings in config.critics.items()]
    folder = prepare_workdir(workdir)

    def stop() -> None:
        raise Stopped(f"stopped on request; what was judged is in {folder}, and the same command goes on")

    with contextlib.ExitStack() as stack:
        lock = WorkdirLock(folder)
        lock.acquire()
        stack.callback(lock.release)
        stack.enter_context(StopSignals(stop))
        with storage.writing(folder / "config.json"):
            storage.replace(folder / "config.json", json.dumps(plain_config(config), indent=2))
        dtype, mesh = config.dtype or default_dtype(), make_mesh(**config.mesh)

        def load(entrant: Entrant) -> Critic:
            return Critic.from_pretrained(
                entrant.model, dtype=dtype, mesh=mesh, rubrics=entrant.rubrics, max_batch=config.batch_size
            )

        page = compare(
            folder,
            items,
            entrants,
            load,
            dtype=dtype,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
    print(page, end="")

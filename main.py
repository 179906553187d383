"""Runs a job: `python main.py --config configs/gen_qma.py:tiny --workdir runs/tiny [--config.key=value ...]`.

The same command started again in the same workdir continues the run. Exit codes: 0 done; 2 something to put right,
said in one message; 75 stopped by SIGTERM or Ctrl-C with everything saved, start again to continue: the RL job stops
between two parts of a phase, as it was at the start of its epoch, the benchmark at once, a critic's training between
two steps, other jobs at the end of their epoch, and all of them at once before they have begun; 76 another process of
the run is gone, start all again to continue. A second signal ends the process at once (143 or 130) and loses what was
done since the last checkpoint.

`python main.py --config configs/gen_qma.py --plan v5e:4x4` compiles the job for that TPU slice, `--plan h100:8` for
those GPUs, on any machine and without weights or a workdir, and prints what it needs of each and whether it fits.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from firm_jax import storage
from firm_jax.config import parse_flags
from firm_jax.devices import say_nothing_of_absent_devices, use_compilation_cache
from firm_jax.errors import ConfigError, FirmError
from firm_jax.gpus import claim_memory
from firm_jax.plan import plan
from firm_jax.processes import LOST_EXIT_CODE, SERVICE_SECONDS
from firm_jax.run import STOPPED_EXIT_CODE, Stopped

JOBS = {
    "rl": "firm_jax.rl.train:train",
    "critic_sft": "firm_jax.critic.sft:train",
    "critic_vision": "firm_jax.critic.vision:train_vision",
    "bench": "firm_jax.critic.bench.job:bench",
    "flow_matching": "firm_jax.generation.pretrain:train_flow_matching",
    "qwen_matching": "firm_jax.generation.pretrain_qwen:train_qwen_matching",
    "autoencoder": "firm_jax.generation.autoencoder:train_autoencoder",
    "curation": "firm_jax.curation.job:curate",
}
# Job -> its programs, from its config and a mesh: what `--plan` compiles.
PLANS = {"rl": "firm_jax.rl.programs:RLPrograms", "critic_sft": "firm_jax.critic.sft_programs:SFTPrograms"}

# What collective operations say when a partner is gone.
LOST_CONNECTION = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, path/to/file.py[:variant].")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder: everything that the run leaves goes there.")
_PLAN = flags.DEFINE_string(
    "plan", None, "A TPU slice or GPUs, such as v5e:4x4 or h100:8, to compile for instead of running."
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"unexpected arguments {argv[1:]}; values are set as --config.key=value")
    if not flags.FLAGS["verbosity"].present:  # what libraries tell of every checkpoint is for their authors
        absl_logging.set_verbosity(absl_logging.WARNING)
    config = _CONFIG.value
    if config.job not in JOBS:
        raise ConfigError(f"config.job is {config.job!r}; the jobs are {', '.join(JOBS)}")
    if _PLAN.value is not None:
        if config.job not in PLANS:
            raise ConfigError(f"there is no plan for jobs of the kind {config.job!r} yet, only for {', '.join(PLANS)}")
        jax.config.update("jax_platforms", "cpu")  # whatever chips this machine has are left alone
        jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here cannot run here
        plan(config, _PLAN.value, named(PLANS[config.job]))
        return
    if _WORKDIR.value is None:
        raise ConfigError("the flag --workdir is missing: the folder for everything that the run leaves")
    use_compilation_cache()
    claim_memory()
    split_cpu(config)
    join_processes(config)
    named(JOBS[config.job])(config, _WORKDIR.value)


def named(name: str) -> Callable:
    """What a name like `package.module:function` means. ConfigError where an extra has to be installed for it."""
    module, function = name.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        raise ConfigError(f"this job cannot be run: {error}") from error


def split_cpu(config) -> None:
    """Make `config.cpu_devices` devices of this machine's CPU, if it is to compute: one leaves cores idle.

    A number in XLA_FLAGS comes first.
    """
    if "cpu_devices" in config and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)


def join_processes(config) -> None:
    """Join the run's other processes when `config.distributed` or JAX_COORDINATOR_ADDRESS asks for it.

    On TPU pods, Slurm and Kubernetes JAX finds the rest by itself; elsewhere JAX_NUM_PROCESSES and JAX_PROCESS_ID tell.
    Never guessed: one process of a pod that trains alone would look like success.
    """
    if not config.get("distributed", False) and "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    try:
        number, index = (
            int(os.environ[name]) if name in os.environ else None for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=number, process_id=index, heartbeat_timeout_seconds=SERVICE_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join the other processes: {error}. Set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and "
            f"JAX_PROCESS_ID for every process, or config.distributed=False for a single one."
        ) from error


def command_line() -> None:
    """Run `main` and turn how it ends into an exit code; people get a message, bugs a traceback."""
    say_nothing_of_absent_devices()
    try:
        app.run(main, flags_parser=parse_flags)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        storage.leave(STOPPED_EXIT_CODE)
        sys.exit(STOPPED_EXIT_CODE)
    except FirmError as error:
        print(f"error: {error}", file=sys.stderr)
        storage.leave(2)
        sys.exit(2)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            storage.leave(1)
            raise
        if not any(sign in str(error) for sign in LOST_CONNECTION):
            traceback.print_exc()
        print(
            f"error: an operation of all processes has failed: {str(error).splitlines()[0]}\nMost likely another "
            "process of the run is gone, and its own messages say why. Checkpoints are whole: start the same command "
            "on every host again to continue.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST_EXIT_CODE)  # JAX's own ending would wait for the others, and abort
    except Exception:
        storage.leave(1)
        raise


if __name__ == "__main__":
    command_line()

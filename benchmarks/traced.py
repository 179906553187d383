"""`main.py`, but its profile holds no calls of Python: recording these takes longer than much of what is to be seen.

python -m benchmarks.traced --config configs/gen_qma.py:tiny --workdir runs/traced --config.profile.steps=1
"""

from functools import partial

import jax

import main

if __name__ == "__main__":
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace = partial(jax.profiler.start_trace, profiler_options=options)
    main.command_line()

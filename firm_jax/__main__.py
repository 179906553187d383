"""`python -m firm_jax COMMAND`, the same as `firm-jax COMMAND`."""

import sys

from firm_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())

"""From prompts to images: schedules, solvers, and the pipelines that use them."""

from firm_jax.generation.generator import Generator, check_size, initial_noise
from firm_jax.generation.text import Conditioning

__all__ = ["Conditioning", "Generator", "check_size", "initial_noise"]

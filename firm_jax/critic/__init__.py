"""Everything that judges: `Critic` reads images and rubrics and writes `Judgement`s."""

from firm_jax.critic.score import Critic, Judgement

__all__ = ["Critic", "Judgement"]

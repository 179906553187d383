"""Stand-ins for the RL job's networks: a generator that draws at once and a critic that reads pixels by a formula."""

import jax.numpy as jnp
import numpy as np

from firm_jax.critic import Judgement
from firm_jax.generation import Generator
from firm_jax.mesh import replicate


class FlatGenerator:
    """Draws pictures of 2 x 2 pixels: the prompt's length, the noise and the adapter decide their brightness."""

    params, vae_params, edits = np.float32(1), np.float32(0.03), False
    take = staticmethod(Generator.take)

    def __init__(self, mesh=None):
        self.mesh, self.programs, self.guided = mesh, 0, None

    def condition(self, prompts, settings, images=None, sizes=None):
        lengths = np.array([[len(prompt)] for prompt in prompts], np.float32)
        return replicate((lengths, lengths[:1] * 0 if settings.guidance > 1 else None), self.mesh)

    def latent_shape(self, height, width):
        return height, width, 3

    def sigmas(self, steps, height, width):
        return np.linspace(1, 0, steps + 1).astype(np.float32)

    def rollout(self, params, lora, noise, sigmas, conditioning, *, guidance, negative, solver, key):
        self.programs += 1  # Python runs only where a program is traced
        self.guided = negative is not None
        return params * noise + lora["shift"] + conditioning[:, None, None]

    def decode(self, vae_params, latents):
        return jnp.clip(vae_params * latents, 0, 1)

    def decode_on_host(self, latents):
        return np.array(self.decode(self.vae_params, jnp.asarray(latents)))


def judgement(criterion: str, score, expected=None, entropy=0.5, status="ok") -> Judgement:
    text = f"I saw {score}" if score is not None else "I do not know"
    return Judgement(criterion, score, expected, entropy if score is not None else None, text, status, "why", "a1b2")


class ScriptedCritic:
    """Scores are a smooth function of a picture's red, so that alike pictures are judged alike.

    fails(request) says which judgements cannot be read, perfect(prompt) which prompts' pictures are all flawless.
    """

    def __init__(self, fails=lambda request: False, perfect=lambda prompt: False):
        self.fails, self.perfect = fails, perfect
        self.pictures, self.sources = [], []

    def judge(self, requests, max_new_tokens, progress):
        return [self._judge(request) for request in progress(requests)]

    def _judge(self, request) -> Judgement:
        [*sources, picture], criterion = request["images"], request["criterion"]
        self.pictures.append(np.asarray(picture))
        self.sources.append([np.asarray(source) for source in sources])
        if self.fails(request):
            return judgement(criterion, None, status="no_score")
        expected = 3 + 2 * np.sin(np.asarray(picture, float)[..., 0].mean() / 4)
        if self.perfect(request["prompt"]):
            expected = 5.0
        score = round(expected)
        return judgement(criterion, (5, score, 5) if criterion == "quality" else score, float(expected))


def sometimes_nan(instruction, quality):
    """A user's reward that is undefined for some images."""
    return jnp.where(instruction > 0.6, jnp.nan, instruction * quality)


def beauty(beauty):
    """A user's reward that asks for what no rubric does."""
    return beauty

"""A generator with its LoRAs on both sides, of the same numbers: what rollout and update have in common."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.families import FAMILIES
from benchmarks.sizes import ATTENTION, Diffusion, parameters
from benchmarks.torch_side import autocast, compiled, device
from firm_jax import models
from firm_jax.generation import Generator
from firm_jax.generation.generator import pipeline_class
from firm_jax.interop.lora_formats import adapter_of, write_peft
from firm_jax.mesh import replicate
from firm_jax.models.lora import LoraConfig, init_lora

CURRENT, OLD = "current", "old"  # the policy that is trained, and the one that makes the rollouts


class Work:
    """What both sides are given, as host arrays, and the folders of their weights.

    conditioning: of a prompt for each image. adapters: two LoRAs as our trees, whose PEFT folders bear their names;
    they are large enough to change what the network says. shapes: our generator without weights. mesh: of ours. One
    folder may be given to several after each other: it holds the weights once, and the adapters of the last.
    """

    def __init__(self, size: Diffusion, folder: Path, mesh: Mesh):
        self.size, self.folder, self.mesh = size, folder, mesh
        self.configs, self.weights = size.pipeline(folder)
        self._made: dict[str, Generator] = {}
        self.key, self._rng = jax.random.key(0), np.random.default_rng(0)
        self.numbers = np.arange(size.images, dtype=np.uint32)
        self.settings = SimpleNamespace(
            steps=size.steps, solver="dpm2", guidance=1.0, height=size.height, width=size.width, batch_size=size.images
        )
        self.lora = LoraConfig(size.rank, 2.0 * size.rank, ATTENTION)
        self.shapes = self._abstract("float32")
        self.family = FAMILIES[self.configs["model_index"]["_class_name"]]
        self.conditioning = self.family.conditioning(self)
        tree = jax.eval_shape(partial(init_lora, config=self.lora), self.key, self.shapes.params)
        self.adapters = {name: jax.tree.map(self._adapter, tree) for name in (CURRENT, OLD)}
        for name, adapter in self.adapters.items():
            (folder / name).mkdir(exist_ok=True)
            write_peft(folder / name, adapter_of(adapter, self.shapes.weight_rules, self.lora), "")

    def normal(self, *shape: int) -> np.ndarray:
        return self._rng.normal(size=shape).astype(np.float32)

    def _adapter(self, leaf) -> np.ndarray:
        return self.normal(*leaf.shape) / self.size.rank

    def _abstract(self, dtype: str) -> Generator:
        return pipeline_class(self.configs["model_index"]).from_configs(self.configs, dtype, self.mesh)

    def latent_shape(self) -> tuple[int, int, int]:
        return self.shapes.latent_shape(self.size.height, self.size.width)

    def sigmas(self):
        return self.shapes.sigmas(self.size.steps, self.size.height, self.size.width)

    def described(self) -> dict:
        """What the work is, for the result's file."""
        size = {name: value for name, value in vars(self.size).items() if name != "model"}
        counts = {part: parameters(self.configs[part]) for part in ("transformer", "vae")}
        return size | {"parameters": counts, "lora_targets": list(self.lora.targets), "latents": self.latent_shape()}

    def generator(self, dtype: str) -> Generator:
        """Ours, with transformer and autoencoder; its text encoders are shapes, and not called."""
        if dtype not in self._made:
            made = self._abstract(dtype)
            made.params = nnx.state(models.from_pretrained(self.weights / "transformer", dtype=dtype, mesh=self.mesh))
            made.vae_params = nnx.state(models.from_pretrained(self.weights / "vae", dtype="float32", mesh=self.mesh))
            self._made[dtype] = made
        return self._made[dtype]

    def placed_conditioning(self, dtype: str):
        """As our text encoders leave it: floats in the dtype of their weights, whole on every device."""

        def cast(array):
            return array.astype(dtype) if array.dtype == np.float32 else array

        return replicate(jax.tree.map(cast, self.conditioning), self.mesh)


class TorchPolicy:
    """diffusers' transformer with PEFT's adapters, and the velocity of whichever policy is switched on.

    remat: "full" for gradient checkpointing.
    """

    def __init__(self, work: Work, dtype: str):
        import diffusers
        import peft
        import torch

        self.work, self.dtype = work, dtype
        held = getattr(diffusers, work.configs["transformer"]["_class_name"]).from_pretrained(
            work.weights / "transformer", torch_dtype=getattr(torch, dtype)
        )
        if work.size.remat == "full":
            held.enable_gradient_checkpointing()
        held.requires_grad_(False)
        # PEFT keeps adapters in float32 over whatever the base is held in.
        self.adapted = peft.PeftModel.from_pretrained(
            held.to(device()).eval(), work.folder / CURRENT, adapter_name=CURRENT, is_trainable=True
        )
        self.adapted.load_adapter(work.folder / OLD, adapter_name=OLD)
        self.given = work.family.torch_inputs(work, getattr(torch, dtype))

    def velocity(self, mode: str):
        """`(x [B, C, h, w], t [B]) -> v`, of all samples, each with its own conditioning."""
        network, family = compiled(self.adapted, mode), self.work.family

        def velocity(x, t):
            with autocast(self.dtype):
                return family.velocity(network, self.given, x.to(self.given["encoder_hidden_states"].dtype), t).float()

        return velocity


def torch_vae(work: Work):
    """diffusers' autoencoder, in float32 as the published training holds it."""
    import diffusers

    kind = getattr(diffusers, work.configs["vae"]["_class_name"])
    return kind.from_pretrained(work.weights / "vae").to(device()).eval()


def torch_dpm2(velocity, noise, sigmas: Sequence[float]):
    """DPM-Solver++ 2M on image predictions, in a loop of the host, as PyTorch's samplers have it; latents [B, C, h, w].

    The first step, the step after sigma 1 and the one to sigma 0 are of first order.
    """
    import torch

    def log_snr(sigma: float) -> float:
        return math.log((1 - sigma) / sigma)

    x, before, sigmas = noise, None, list(map(float, sigmas))
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        t = torch.full((len(x),), sigma, device=x.device)
        image = x - sigma * velocity(x, t)
        towards = image
        if step > 0 and sigmas[step - 1] < 1 and following > 0:
            length = log_snr(following) - log_snr(sigma)
            towards = image + length / (2 * (log_snr(sigma) - log_snr(sigmas[step - 1]))) * (image - before)
        x = following / sigma * x + (1 - following / sigma) * towards
        before = image
    return x

"""Learning with SD3: one DiffusionNFT update of a LoRA, from judged latents to the next adapters.

    python -m benchmarks.sd3_update --size small

At every timestep three forward passes (the policies current, old and reference) and one backward pass, then the clip
of the gradient's norm, AdamW and the averaged weights. Ours is the RL job's update. PyTorch's does the same in the
order of the published training: adapters switched between the passes, gradients accumulated over timesteps, everything
under autocast. Both begin with the same adapters and an empty AdamW every time.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax

from benchmarks.diffusion import CURRENT, OLD, TorchPolicy, Work
from benchmarks.harness import OURS, PYTORCH, Case, Options, Variant, main
from benchmarks.sizes import SD3, Diffusion
from benchmarks.torch_side import absent, channels_first, done, modes, tensor, variants
from firm_jax.generation import initial_noise
from firm_jax.interop.lora_formats import adapter_of
from firm_jax.mesh import on_mesh, shard_batch, to_host
from firm_jax.rl.nft import ema_decay
from firm_jax.rl.update import init_state, learning_flops, make_optimizer, make_update

# The paper's recipe, but for a learning rate of one step from nothing.
TRAIN = SimpleNamespace(
    learning_rate=3e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-4, max_grad_norm=1.0,
    beta=1.0, adv_clip=5.0, kl_weight=1e-4, ema=0.9,
)  # fmt: skip


class Samples:
    """Judged latents: x0 [b, h, w, C], the noise shares t [T, b] at which each is learned from, the optimality r [b],
    and the noise of each timestep [T, b, h, w, C]."""

    def __init__(self, work: Work):
        size, shape = work.size, work.latent_shape()
        self.x0 = work.normal(size.images, *shape)
        sigmas = np.asarray(work.sigmas())[:-1]
        self.t = np.stack([sigmas[(np.arange(size.images) + step) % len(sigmas)] for step in range(size.timesteps)])
        self.r = np.linspace(0, 1, size.images, dtype=np.float32)
        self.noise = np.stack(
            [initial_noise(jax.random.fold_in(work.key, step), work.numbers, shape) for step in range(size.timesteps)]
        )


def ours(work: Work, samples: Samples, dtype: str) -> Variant:
    generator, mesh = work.generator(dtype), work.mesh
    optimizer = make_optimizer(TRAIN)
    update = make_update(partial(generator.velocity, remat=work.size.remat), optimizer, TRAIN, work.lora.scale)
    with on_mesh(mesh):
        current, old = (generator.place_lora(work.adapters[name]) for name in (CURRENT, OLD))
        state = init_state(current, optimizer) | {"old": old}
    conditioning = work.placed_conditioning(dtype)
    by_sample = {
        "x0": samples.x0,
        "r": samples.r,
        "valid": np.ones(work.size.images, bool),
        "prompt": np.arange(work.size.images, dtype=np.int32),
        "sample": work.numbers,
    }
    batch = shard_batch({name: array[None] for name, array in by_sample.items()}, mesh, axis=1)
    batch |= {"t": shard_batch(samples.t[None], mesh, axis=2)}

    def run(_):
        with on_mesh(mesh):
            return jax.block_until_ready(update(generator.params, state, conditioning, batch, work.key))

    def outputs(result):
        after, metrics = to_host(result)
        trees = {
            "gradient": optax.tree.get(after["optimizer"], "mu"),
            "adapters": after["lora"],
            "average": after["ema"],
        }
        pairs = {what: adapter_of(tree, generator.weight_rules, work.lora).pairs for what, tree in trees.items()}
        return losses(metrics["loss/total"], metrics["policy/kl"]) | {
            what: flat([side for _, pair in sorted(found.items()) for side in pair]) for what, found in pairs.items()
        }

    return Variant(OURS, dtype, "jit", run, outputs)


def flat(arrays) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float32).reshape(-1) for array in arrays])


def losses(total, kl) -> dict[str, np.ndarray]:
    return {"loss": np.asarray(total, np.float32), "distance to the reference": np.asarray(kl, np.float32)}


class TorchUpdate:
    """The published training's step, written from its description."""

    def __init__(self, work: Work, samples: Samples, dtype: str):

        self.work, self.policy = work, TorchPolicy(work, dtype)
        self.x0, self.t, self.r = (tensor(array) for array in (channels_first(samples.x0), samples.t, samples.r))
        self.noise = tensor(channels_first(samples.noise))
        self.policy.adapted.set_adapter(CURRENT)
        named = self.policy.adapted.named_parameters()
        # By module, then A before B: as the outputs of ours are laid out.
        self.named = {name: parameter for name, parameter in sorted(named) if f".{CURRENT}." in name}
        self.trained = list(self.named.values())
        self.begun = [parameter.detach().clone() for parameter in self.trained]

    def prepare(self):
        """The adapters as they were, their averages, and an AdamW that has done no step."""
        import torch

        with torch.no_grad():
            for parameter, begun in zip(self.trained, self.begun, strict=True):
                parameter.copy_(begun)
                parameter.grad = None
        adamw = torch.optim.AdamW(
            self.trained, lr=TRAIN.learning_rate, betas=(TRAIN.b1, TRAIN.b2), eps=TRAIN.eps,
            weight_decay=TRAIN.weight_decay,
        )  # fmt: skip
        done()
        return adamw, [begun.clone() for begun in self.begun]

    def variant(self, mode: str, how: str, dtype: str) -> Variant:
        velocity = self.policy.velocity(mode)

        def run(given):
            result = self.step(velocity, *given)
            done()
            return result

        return Variant(PYTORCH, dtype, how, run, self.outputs, self.prepare)

    def step(self, velocity, adamw, averages):
        import torch

        timesteps, told = len(self.t), []
        for t, noise in zip(self.t, self.noise, strict=True):
            loss, kl = self.loss(velocity, t, noise)
            (loss / timesteps).backward()
            told.append((loss.detach(), kl))
        torch.nn.utils.clip_grad_norm_(self.trained, TRAIN.max_grad_norm)
        adamw.step()
        kept = float(ema_decay(1, TRAIN.ema))
        with torch.no_grad():
            for average, parameter in zip(averages, self.trained, strict=True):
                average.lerp_(parameter, 1 - kept)
        return adamw, averages, [torch.stack(values).mean() for values in zip(*told, strict=True)]

    def loss(self, velocity, t, noise):
        """The DiffusionNFT loss of all samples at one timestep each, and the distance to the reference."""
        import torch

        adapted, x0, share, dims = self.policy.adapted, self.x0, t[:, None, None, None], (1, 2, 3)
        x_t = (1 - share) * x0 + share * noise
        with torch.no_grad():
            adapted.set_adapter(OLD)
            v_old = velocity(x_t, t)
        adapted.set_adapter(CURRENT)
        v = velocity(x_t, t)
        with torch.no_grad(), adapted.disable_adapter():
            v_ref = velocity(x_t, t)

        def error(implicit):
            distance = x_t - share * implicit - x0
            return (distance**2).mean(dims) / distance.detach().abs().mean(dims).clamp(min=1e-5)

        beta = TRAIN.beta
        positive, negative = error(beta * v + (1 - beta) * v_old), error((1 + beta) * v_old - beta * v)
        policy = TRAIN.adv_clip * ((self.r * positive + (1 - self.r) * negative) / beta).mean()
        kl = ((v - v_ref) ** 2).mean()
        return policy + TRAIN.kl_weight * kl, kl.detach()

    def outputs(self, result) -> dict[str, np.ndarray]:
        import torch

        adamw, averages, (total, kl) = result
        # What feeds nothing, as the last block's text stream may, has no gradient here and one of zeros in ours.
        moments = [adamw.state[p]["exp_avg"] if p in adamw.state else torch.zeros_like(p) for p in self.trained]
        told = {"gradient": moments, "adapters": self.trained, "average": averages}
        return losses(total.item(), kl.item()) | {
            what: flat([values.detach().cpu() for values in found]) for what, found in told.items()
        }


def learning(question: str, size: Diffusion, options: Options, folder: Path) -> Case:
    """The update of one size, of any family."""
    work = Work(size, folder, options.mesh(size.images))
    samples = Samples(work)
    made, skipped = [ours(work, samples, dtype) for dtype in options.dtypes], {}
    if why := absent("diffusers", "peft"):
        skipped["PyTorch"] = why
    else:
        skipped = modes(options)[1]
        steps = {dtype: TorchUpdate(work, samples, dtype) for dtype in options.dtypes}
        made += [steps[dtype].variant(mode, how, dtype) for mode, how, dtype in variants(options)]
    settings = SimpleNamespace(timesteps=size.timesteps)
    flops = size.images * learning_flops(work.shapes, settings, (size.height, size.width), work.conditioning)
    name = f"{question} from {size.images} images of {size.height} x {size.width} at {size.timesteps} timesteps each"
    return Case(name, made, size.images * size.timesteps, "samples", flops, work.described(), skipped)


def cases(options: Options, folder: Path, size: Diffusion | None = None) -> Iterator[Case]:
    yield learning("SD3 update", size or SD3[options.size], options, folder)


if __name__ == "__main__":
    main("sd3_update", __doc__, cases)

"""Encoding prompts for SD3: two CLIP text encoders and T5, of a batch of prompts that are tokens already.

    python -m benchmarks.text_encoding --size small

Ours is the program that the jobs run for all three; PyTorch's are transformers' three models, one after the other.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.harness import OURS, PYTORCH, Case, Options, Variant, main
from benchmarks.sizes import SD3, Diffusion
from benchmarks.torch_side import absent, autocast, compiled, device, done, host, modes, tensor, variants
from firm_jax import models
from firm_jax.generation.text import CLIP_ENCODERS, T5_ENCODER, TextEncoders
from firm_jax.mesh import on_mesh, shard_batch, to_host

ENCODERS = (*CLIP_ENCODERS, T5_ENCODER)


class Prompts:
    """Random token ids [P, T] of each encoder, and the folder with the encoders.

    CLIP's end with the highest id, at which it takes its pooled vector.
    """

    def __init__(self, size: Diffusion, folder: Path):
        self.configs, self.folder = size.pipeline(folder, ENCODERS)
        self.width = self.configs["transformer"]["joint_attention_dim"]
        rng, clip_tokens = np.random.default_rng(0), self.configs["text_encoder"]["max_position_embeddings"]
        self.t5_tokens, self.ids = size.text_tokens - clip_tokens, {}
        for name in ENCODERS:
            length = self.t5_tokens if name == T5_ENCODER else clip_tokens
            last = self.configs[name]["vocab_size"] - 1
            self.ids[name] = rng.integers(3, last, (size.images, length), dtype=np.int32)
            if name != T5_ENCODER:
                self.ids[name][:, -1] = last


def ours(prompts: Prompts, dtype: str, options: Options) -> Variant:
    mesh = options.mesh(len(next(iter(prompts.ids.values()))))
    networks = {name: models.from_pretrained(prompts.folder / name, dtype=dtype, mesh=mesh) for name in ENCODERS}
    encoders = TextEncoders({}, networks, prompts.width, mesh)

    def run(_):
        with on_mesh(mesh):
            ids = shard_batch(prompts.ids, mesh)
            return to_host(encoders.encode_jitted(encoders.params, ids, prompts.t5_tokens))

    def outputs(encoded):
        return {"context": np.asarray(encoded.context, np.float32), "pooled": np.asarray(encoded.pooled, np.float32)}

    return Variant(OURS, dtype, "jit", run, outputs)


def pytorch(prompts: Prompts, options: Options) -> Iterator[Variant]:
    import torch
    import transformers

    ids = {name: tensor(tokens) for name, tokens in prompts.ids.items()}

    def load(name: str, dtype: str):
        kind = getattr(transformers, prompts.configs[name]["architectures"][0])
        return kind.from_pretrained(prompts.folder / name, dtype=getattr(torch, dtype)).to(device()).eval()

    loaded = {dtype: {name: load(name, dtype) for name in ENCODERS} for dtype in options.dtypes}

    def variant(mode: str, how: str, dtype: str) -> Variant:
        networks = {name: compiled(network, mode) for name, network in loaded[dtype].items()}

        @torch.no_grad()
        def run(_):
            with autocast(dtype):
                clip = [networks[name](ids[name], output_hidden_states=True) for name in CLIP_ENCODERS]
                t5 = networks[T5_ENCODER](ids[T5_ENCODER]).last_hidden_state
            context = torch.cat([one.hidden_states[-2] for one in clip], dim=-1)
            context = torch.nn.functional.pad(context, (0, prompts.width - context.shape[-1]))
            context, pooled = torch.cat([context, t5], dim=1), torch.cat([one.text_embeds for one in clip], dim=-1)
            done()
            return host(context), host(pooled)

        def outputs(encoded):
            return {"context": encoded[0], "pooled": encoded[1]}

        return Variant(PYTORCH, dtype, how, run, outputs)

    for given in variants(options):
        yield variant(*given)


def flops(prompts: Prompts) -> float:
    """Two operations for each weight of a kernel and token; attention, which adds little at these lengths, left out."""
    total = 0
    for name, ids in prompts.ids.items():
        network = models.network_class(prompts.configs[name]["architectures"][0])
        shapes = nnx.state(models.abstract(network, network.config_class.from_hf(prompts.configs[name])))
        kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "kernel" in str(path)]
        total += 2 * ids.size * sum(int(np.prod(leaf.shape)) for leaf in kernels)
    return total


def cases(options: Options, folder: Path, size: Diffusion | None = None) -> Iterator[Case]:
    size = size or SD3[options.size]
    prompts = Prompts(size, folder)
    made, skipped = [ours(prompts, dtype, options) for dtype in options.dtypes], {}
    if why := absent("transformers"):
        skipped["PyTorch"] = why
    else:
        skipped = modes(options)[1]
        made += pytorch(prompts, options)
    tokens = {name: ids.shape[1] for name, ids in prompts.ids.items()}
    name = f"SD3 text encoding of {size.images} prompts"
    yield Case(name, made, size.images, "prompts", flops(prompts), {"prompts": size.images, "tokens": tokens}, skipped)


if __name__ == "__main__":
    main("text_encoding", __doc__, cases)

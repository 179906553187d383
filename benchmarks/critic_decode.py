"""A critic's two halves: reading a question about a picture, and writing the answer, in batches of 1, 8 and 32.

    python -m benchmarks.critic_decode --size small

Ours is the decoder of the jobs and of the service: its programs and its host's part between them. PyTorch's is
transformers' model: a forward pass that fills the cache, and `generate` from that cache on. "torch.compile" is with
its static cache, whose steps `generate` compiles by itself. All questions are equally long, all pictures different, and
no token ends an answer. bfloat16 is that of the weights on both sides, as critics are served.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.critic_side import Questions, torch_critic
from benchmarks.harness import OURS, PYTORCH, Case, Options, Variant, main
from benchmarks.sizes import CRITIC, Critic, parameters
from benchmarks.torch_side import absent, compiled, device, done, host, modes
from firm_jax import models
from firm_jax.critic.decode import CHUNK
from firm_jax.mesh import on_mesh, to_host


class Ours:
    """Our decoder in one dtype, on as many devices as divide a batch."""

    def __init__(self, questions: Questions, dtype: str, mesh):
        self.questions, self.dtype, self.mesh = questions, dtype, mesh
        self.decoder = questions.decoder(dtype, mesh)

    def read(self, batch, tokens: int):
        with on_mesh(self.mesh):
            return jax.block_until_ready(self.decoder._prefill(batch, (), -(-tokens // CHUNK) * CHUNK)[0])

    def prefill(self, count: int, tokens: int) -> Variant:
        batch = self.questions.planned(self.decoder, count)

        def outputs(state):
            return {"logits": to_host(state["logits"])[rows(batch)]}

        return Variant(OURS, self.dtype, "jit", lambda _: self.read(batch, tokens), outputs)

    def decode(self, count: int, tokens: int) -> Variant:
        batch = self.questions.planned(self.decoder, count)

        def prepare():
            state = self.read(batch, tokens)
            return state, to_host(state["logits"])[rows(batch)]

        def run(given):
            with on_mesh(self.mesh):
                return given[1], self.decoder._decode(given[0], batch.own, tokens)

        def outputs(result):
            logits, written = result
            order = np.argsort(served(batch))
            return written_tokens(logits, [written[row].tokens for row in order], self.dtype)

        return Variant(OURS, self.dtype, "jit", run, outputs, prepare)


def served(batch) -> list[int]:
    """The numbers of a batch's questions, in the order of its rows."""
    return [index for own in batch.requests for index in own]


def rows(batch) -> np.ndarray:
    """Which rows of a batch are questions, in the order in which they were asked."""
    there = np.flatnonzero([row is not None for row in batch.own.rows])
    return there[np.argsort(served(batch))]


def written_tokens(logits, tokens, dtype: str) -> dict[str, np.ndarray]:
    """What is compared: the logits behind the question, and the answer's tokens. In bfloat16 the logits alone: where
    two tokens are nearly as likely rounding decides, and from there on the answers are different texts."""
    exact = {"tokens": np.asarray(tokens, np.int64)} if dtype == "float32" else {}
    return {"logits": np.asarray(logits, np.float32)} | exact


class Theirs:
    """transformers' model in one dtype."""

    def __init__(self, questions: Questions, dtype: str):
        self.questions, self.dtype = questions, dtype
        self.model = torch_critic(questions.folder, dtype)

    def prefill(self, mode: str, how: str, count: int, tokens: int) -> Variant:
        import torch

        network, inputs = compiled(self.model.forward, mode), self.questions.inputs(count, self.dtype)

        @torch.no_grad()
        def run(_):
            read = network(**inputs, use_cache=True, logits_to_keep=1)
            done()
            return read

        def outputs(read):
            return {"logits": host(read.logits[:, -1])}

        return Variant(PYTORCH, self.dtype, how, run, outputs)

    def decode(self, mode: str, how: str, count: int, tokens: int) -> Variant:
        import torch
        from transformers import CompileConfig, StaticCache

        model, inputs = self.model, self.questions.inputs(count, self.dtype)
        length = inputs["input_ids"].shape[1]
        if mode == "compile" and device().type == "cpu":  # where `generate` does not compile unless told
            model.generation_config.compile_config = CompileConfig(mode="default", fullgraph=False)
            model.generation_config.compile_config._compile_all_devices = True

        @torch.no_grad()
        def prepare():
            cache = StaticCache(model.config, max_cache_len=length + tokens) if mode == "compile" else None
            read = model(**inputs, use_cache=True, past_key_values=cache, logits_to_keep=1)
            done()
            return read.logits[:, -1], read.past_key_values

        def run(given):
            logits, cache = given
            ids = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=tokens - 1,
                do_sample=False,
            )
            done()
            return logits, written[:, length:]

        def outputs(result):
            return written_tokens(host(result[0]), result[1].cpu(), self.dtype)

        return Variant(PYTORCH, self.dtype, how, run, outputs, prepare)


def cases(options: Options, folder: Path, size: Critic | None = None) -> Iterator[Case]:
    size = size or CRITIC[options.size]
    questions = Questions(size, folder, max(size.batches))
    meshes = {count: options.mesh(count) for count in size.batches}
    ours = {mesh: [Ours(questions, dtype, mesh) for dtype in options.dtypes] for mesh in {*meshes.values()}}
    theirs = []
    skipped = modes(options)[1]
    if why := absent("transformers"):
        skipped = {"PyTorch": why}
    else:
        theirs = [Theirs(questions, dtype) for dtype in options.dtypes]
    length, config = len(questions.sequences[0]), questions.config
    patches = len(questions.sequences[0].images[0].patches)
    described = size.described() | {
        "parameters": parameters(models.read_config(questions.folder)),
        "question_tokens": length,
        "patches": patches,
    }
    for count in size.batches:
        prefilling = config.vision.forward_flops(patches) + config.text.forward_flops(length, 0, 1)
        decoding = size.tokens * config.text.forward_flops(1, length + size.tokens // 2, 1)
        for half, made, unit, flops in (
            ("prefill", count, "questions", count * prefilling),
            ("decode", count * size.tokens, "tokens", count * decoding),
        ):
            variants = [getattr(side, half)(count, size.tokens) for side in ours[meshes[count]]]
            variants += [
                getattr(side, half)(mode, "torch.compile" if mode == "compile" else mode, count, size.tokens)
                for side in theirs
                for mode in modes(options)[0]
            ]
            name = f"critic, {half} of {length if half == 'prefill' else size.tokens} tokens, batch {count}"
            yield Case(name, variants, made, unit, flops, described | {"batch": count}, skipped)


if __name__ == "__main__":
    main("critic_decode", __doc__, cases)

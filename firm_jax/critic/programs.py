"""Everything that judging compiles, at the shapes that a batch of images meets, over shapes in the place of arrays."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.abstract import batch, outputs
from firm_jax.critic.decode import CHUNK, Decoder, TokenRules, decode_chunk, embed, encode_images, keep_rows, prefill
from firm_jax.critic.processing import Processor
from firm_jax.critic.rubric import FOLDER, rubrics_from
from firm_jax.critic.score import banned_tokens, end_tokens, served_rubrics
from firm_jax.data.patches import ImageConfig, padded, smart_resize
from firm_jax.interop.hub import find_local
from firm_jax.plan import Program
from firm_jax.published import CRITICS, QWEN3_VL_DIGITS, QWEN3_VL_ENDS, QWEN3_VL_IMAGES, published

PROMPT_TOKENS = 128  # that a judged prompt is taken to have
CHAT_TOKENS = 16  # around an image and a text: turns, roles, the image's marks
CHARACTERS_A_TOKEN = 4  # of a rubric's English, where the critic's tokenizer is not at hand


class AbstractCritic:
    """The critic of a folder, or of a published config, with shapes in the place of weights.

    settings: `model`, `rubrics`, `batch_size` and `max_new_tokens` of a run's `config.critic`.
    """

    def __init__(self, settings, dtype: str, mesh: Mesh):
        self.settings, self.mesh = settings, mesh
        folder = find_local(settings.model)
        raw = models.read_config(folder) if folder else published(CRITICS, settings.model, "critic.model")
        model = models.from_config(raw, dtype, mesh, f"the config.json of {settings.model}")
        self.config = model.config
        self.processor = Processor(folder) if folder and (folder / "tokenizer.json").exists() else None
        if self.processor:
            self.images = self.processor.images
            rules = (end_tokens(folder, self.processor), banned_tokens(self.config, self.processor))
            rules = TokenRules(*rules, self.processor.digits)
        else:
            self.images = ImageConfig.from_json(QWEN3_VL_IMAGES, "Qwen3-VL's image processor")
            rules = TokenRules(QWEN3_VL_ENDS, banned_tokens(self.config), QWEN3_VL_DIGITS)
        self.rubrics = served_rubrics(folder, settings.rubrics) if folder else rubrics_from(settings.rubrics or FOLDER)
        self.decoder = Decoder(model, rules, mesh=mesh, max_batch=settings.batch_size)
        self.params = self.decoder.params

    def text_tokens(self, criteria: Sequence[str]) -> int:
        """Of the longest rubric with its prompt, by the tokenizer where there is one, else estimated."""
        texts = [self.rubrics[name].text for name in criteria]
        lengths = [
            len(self.processor.encode(text)) if self.processor else -(-len(text) // CHARACTERS_A_TOKEN)
            for text in texts
        ]
        return max(lengths) + PROMPT_TOKENS + CHAT_TOKENS

    def programs(self, images: int, size: tuple[int, int], criteria: Sequence[str]) -> Iterator[Program]:
        """Those that judge `images` images of `size` (height, width) by each of `criteria`."""
        decoder, mesh, limit = self.decoder, self.mesh, "critic.batch_size"
        weights = (decoder.graphdef, decoder.params)
        vision, text, merge = self.config.vision, self.config.text, decoder.merge
        requests = min(images * len(criteria), decoder.max_batch)
        batches = -(-images * len(criteria) // requests)
        limits = {"min_pixels": self.images.min_pixels, "max_pixels": self.images.max_pixels}
        height, width = smart_resize(*size, factor=vision.patch_size * merge, **limits)
        patches = height * width // vision.patch_size**2
        M, P = padded(-(-requests // len(criteria)), patches, decoder.multiple)
        B, T = padded(requests, patches // merge**2 + self.text_tokens(criteria), decoder.multiple)
        chunks = -(-self.settings.max_new_tokens // CHUNK)

        def program(name, function, arguments, *, beside=(), flops=0, calls=batches, **more):
            given = (*weights, *arguments)
            return Program(name, function, given, (arguments, beside), flops, calls, limit=limit, **more)

        table = {
            "patches": batch(mesh, (M, P, vision.patch_features), jnp.float32),
            "grids": batch(mesh, (M, 2), jnp.int32),
        }
        yield program("critic: vision", encode_images, (table,), flops=M * vision.forward_flops(P))
        features = outputs(mesh, partial(encode_images, weights[0]), weights[1], table)
        ids = batch(mesh, (B, T), jnp.int32)
        yield program("critic: splice", embed, (ids, ids, features))
        embeddings, deepstack = outputs(mesh, partial(embed, weights[0]), weights[1], ids, ids, features)
        positions, following = batch(mesh, (3, B, T), jnp.int32, axis=1), batch(mesh, (B,), jnp.int32)
        prompts, slots = (embeddings, deepstack, positions, ids, following), {"new_slots": chunks * CHUNK}
        yield program(
            "critic: prefill",
            prefill,
            prompts,
            beside=features,  # still held while the prompts are read
            flops=B * text.forward_flops(T, T, 1),
            keywords=slots,
        )
        state = outputs(mesh, partial(prefill, weights[0], **slots), weights[1], *prompts)
        yield program(
            "critic: decode",
            decode_chunk,
            (state,),
            flops=CHUNK * B * text.forward_flops(1, T + chunks * CHUNK, 1),
            calls=batches * chunks,
            keywords={"rules": decoder.rules, "steps": CHUNK},
            trips=CHUNK,
        )
        if decoder.multiple < B:
            rows = batch(mesh, (B // 2,), jnp.int32)
            yield Program("critic: drop ended", keep_rows, (state, rows), (state, rows), 0, batches, limit=limit)

"""Everything that judging compiles, at the shapes that a batch of images meets, over shapes in the place of arrays."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from firm_jax import models
from firm_jax.abstract import batch, outputs
from firm_jax.critic.decode import (
    CHUNK,
    Decoder,
    TokenRules,
    copy_prefixes,
    decode_chunk,
    embed,
    encode_images,
    keep_rows,
    prefill,
    read_prefixes,
)
from firm_jax.critic.prefixes import GROUP, PICTURE, plan_batches
from firm_jax.critic.processing import Processor, image_table, lay_out
from firm_jax.critic.processing import Sequence as Prompt
from firm_jax.critic.rubric import FOLDER, rubrics_from
from firm_jax.critic.score import banned_tokens, end_tokens, served_rubrics
from firm_jax.data.patches import ImageConfig, PatchedImage, smart_resize
from firm_jax.interop.hub import find_local
from firm_jax.plan import Program
from firm_jax.published import CRITICS, QWEN3_VL_DIGITS, QWEN3_VL_ENDS, QWEN3_VL_IMAGES, published

PROMPT_TOKENS = 128  # that a judged prompt is taken to have
OPENING_TOKENS, CLOSING_TOKENS = 3, 5  # of the chat, around images and text
STAGES = ((GROUP, "source "), (PICTURE, "picture "), (None, ""))  # levels of prefixes, and what is read behind them
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

    def prompts(self, images: int, size, criteria: Sequence[str], sources=(), candidates: int = 1) -> list[Prompt]:
        """In the order of the job, of the lengths that they are taken to have; the tokens are all the same."""
        questions = [[0] * (self.text_tokens(name) + CLOSING_TOKENS) for name in criteria]
        shown = []
        for number in range(images):
            group = number // candidates
            before = [self.picture(f"{group} {place}", source) for place, source in enumerate(sources)]
            shown.append([part for picture in (*before, self.picture(number, size)) for part in ([0], picture, [0])])
        merge = self.decoder.merge
        return [lay_out([[0] * OPENING_TOKENS, *parts, text], 0, merge) for text in questions for parts in shown]

    def text_tokens(self, criterion: str) -> int:
        """Of the rubric with its prompt, by the tokenizer where there is one, else estimated."""
        text = self.rubrics[criterion].text
        length = len(self.processor.encode(text)) if self.processor else -(-len(text) // CHARACTERS_A_TOKEN)
        return length + PROMPT_TOKENS

    def picture(self, name, size: tuple[int, int]) -> PatchedImage:
        """An image of `size` (height, width) as the critic sees it, without its pixels."""
        vision = self.config.vision
        limits = {"min_pixels": self.images.min_pixels, "max_pixels": self.images.max_pixels}
        resized = smart_resize(*size, factor=vision.patch_size * self.decoder.merge, **limits)
        rows, columns = (side // vision.patch_size for side in resized)
        patches = np.broadcast_to(np.float32(0), (rows * columns, vision.patch_features))
        return PatchedImage(patches, (rows, columns), str(name))

    def programs(
        self, images: int, size: tuple[int, int], criteria: Sequence[str], sources=(), candidates: int = 1
    ) -> Iterator[Program]:
        """Those that judge `images` images of `size` (height, width) by each of `criteria`.

        sources: the sizes of the images that are shown before each, `candidates` of which are shown the same ones. Of
        batches that differ, those of the largest one.
        """
        decoder, mesh, limit = self.decoder, self.mesh, "critic.batch_size"
        weights, text = (decoder.graphdef, decoder.params), self.config.text
        prompts = self.prompts(images, size, criteria, sources, candidates)
        batches = plan_batches(prompts, decoder.multiple, decoder.max_batch // decoder.multiple)
        largest = max(batches, key=lambda planned: planned.tokens)
        room = -(-self.settings.max_new_tokens // CHUNK) * CHUNK

        def program(name, function, arguments, *, beside=(), flops=0, calls=None, **more):
            calls = len(batches) if calls is None else calls
            given = arguments if function in (copy_prefixes, keep_rows) else (*weights, *arguments)
            return Program(f"critic: {name}", function, given, (arguments, beside), flops, calls, limit=limit, **more)

        def result(function, *arguments, **static):
            return outputs(mesh, partial(function, weights[0], **static), weights[1], *arguments)

        def copies(name, tables, rows: np.ndarray, beside, calls, **sizes):
            arguments = (tables, batch(mesh, (rows.size,), jnp.int32))
            copied = outputs(mesh, partial(copy_prefixes, **sizes), *arguments)
            return program(name, copy_prefixes, arguments, beside=beside, calls=calls, keywords=sizes), copied

        tables, slots, kept = (), 0, ()
        for level, name in STAGES:
            stages = [planned.own if level is None else planned.prefixes.get(level) for planned in (largest, *batches)]
            if stages[0] is None:
                continue
            stage, calls = stages[0], sum(stage is not None and stage.tokens > 0 for stage in stages[1:])
            B, T = stage.parents.size, stage.length
            ids, positions = batch(mesh, (B, T), jnp.int32), batch(mesh, (3, B, T), jnp.int32, axis=1)
            table, shown = image_table(stage.rows, multiple=decoder.multiple)
            features = None
            if shown:
                M, P = table["patches"].shape[:2]
                table = {part: batch(mesh, array.shape, array.dtype) for part, array in table.items()}
                flops = M * self.config.vision.forward_flops(P)
                yield program(f"{name}vision", encode_images, (table,), beside=(tables, kept), flops=flops, calls=calls)
                features = result(encode_images, table)
            yield program(f"{name}splice", embed, (ids, ids, features), beside=(tables, kept), calls=calls)
            embedded = result(embed, ids, ids, features)
            seen, free = T, room if level is None else 0
            copied = {"cache": None, "kv_segments": None}
            if (stage.parents >= 0).any():
                sizes = {"slots": slots, "room": T + free}
                copying, copied = copies(f"{name}copies", tables, stage.parents, (embedded, kept), calls, **sizes)
                yield copying
                seen += slots
            given = (*embedded, positions, ids, copied["cache"], copied["kv_segments"])
            flops = B * text.forward_flops(T, seen, int(level is None))
            if level is None:
                given, keywords = (*given, batch(mesh, (B,), jnp.int32)), {"new_slots": room}
                yield program("prefill", prefill, given, beside=kept, flops=flops, keywords=keywords)
                state = result(prefill, *given, **keywords)
                continue
            yield program(f"{name}prefill", read_prefixes, given, beside=(tables, kept), flops=flops, calls=calls)
            tables, slots = (result(read_prefixes, *given),), seen
            if level == GROUP and largest.kept.size:
                calls = sum(planned.kept.size > 0 for planned in batches)
                copying, kept = copies("source kept", tables, largest.kept, (), calls, slots=slots, room=0)
                yield copying
        B, slots = state["kv_segments"].shape
        yield program(
            "decode",
            decode_chunk,
            (state,),
            beside=kept,
            flops=CHUNK * B * text.forward_flops(1, slots, 1),
            calls=len(batches) * room // CHUNK,
            keywords={"rules": decoder.rules, "steps": CHUNK},
            trips=CHUNK,
        )
        if decoder.multiple < B:
            yield program("drop ended", keep_rows, (state, batch(mesh, (B // 2,), jnp.int32)), beside=kept)

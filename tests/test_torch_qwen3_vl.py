"""Qwen3-VL against transformers: vision tower, logits, generation and files."""

import copy
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from firm_jax.models import from_pretrained, save_pretrained

torch = pytest.importorskip("torch")

IMAGE, START, END, VOCAB = 150, 151, 152, 163
BUCKET = 32  # patches in a row: the largest grid below has 24
A, B, C = (4, 6), (6, 2), (2, 4)  # grids of the images, in patches


def torch_model(tied: bool):
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = dict(
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=rope,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=tied,
    )
    vision = dict(
        depth=5,
        hidden_size=24,
        num_heads=2,
        intermediate_size=44,
        out_hidden_size=40,
        patch_size=2,
        num_position_embeddings=49,
        deepstack_visual_indexes=[0, 2],
    )
    tokens = dict(image_token_id=IMAGE, video_token_id=153, vision_start_token_id=START, vision_end_token_id=END)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    model = transformers.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(float(is_scale) + 0.25 * torch.randn(parameter.shape))
    return model


def saved(tied: bool, tmp_path_factory):
    """PyTorch's model, ours read from its files, and their folder."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    reference = torch_model(tied)
    reference.save_pretrained(folder)
    return reference, from_pretrained(folder), folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return saved(False, tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return saved(True, tmp_path_factory)


def image(seed: int, grid) -> np.ndarray:
    """One image's patches, [rows * columns, C*T*ph*pw]."""
    return np.random.default_rng(seed).normal(size=(grid[0] * grid[1], 3 * 2 * 2 * 2)).astype(np.float32)


class Batch:
    """Sequences of text and images, padded as asked, in the form each side takes.

    sequences: lists whose parts are a number of random text tokens or an image (patches, grid).
    """

    def __init__(self, reference, sequences, pad_left, seed=5):
        rng = np.random.default_rng(seed)
        self.images, rows, index_rows = [], [], []
        for sequence in sequences:
            ids, index = [], []
            for part in sequence:
                if isinstance(part, int):
                    ids += list(rng.integers(1, IMAGE, size=part))
                    index += [-1] * part
                    continue
                count = part[1][0] * part[1][1] // 4
                index += [-1, *range(len(self.images) * BUCKET // 4, len(self.images) * BUCKET // 4 + count), -1]
                ids += [START, *[IMAGE] * count, END]
                self.images.append(part)
            rows.append(ids)
            index_rows.append(index)
        self.length = max(map(len, rows))
        pads = [(self.length - len(row), 0) if pad_left else (0, self.length - len(row)) for row in rows]
        self.ids = np.stack([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
        self.index = np.stack([np.pad(row, pad, constant_values=-1) for row, pad in zip(index_rows, pads, strict=True)])
        self.mask = np.stack([np.pad(np.ones(len(row), int), pad) for row, pad in zip(rows, pads, strict=True)])
        self.patches = np.stack([np.pad(p, ((0, BUCKET - len(p)), (0, 0))) for p, _ in self.images])
        self.grids = np.array([grid for _, grid in self.images], np.int32)
        self.torch = dict(
            input_ids=torch.tensor(self.ids),
            attention_mask=torch.tensor(self.mask),
            pixel_values=torch.tensor(np.concatenate([p for p, _ in self.images])),
            image_grid_thw=torch.tensor([[1, *grid] for _, grid in self.images]),
            mm_token_type_ids=torch.tensor((self.ids == IMAGE).astype(int)),
        )
        skip = ("pixel_values",)
        inputs = {name: value for name, value in self.torch.items() if name not in skip}
        positions, deltas = reference.model.get_rope_index(**inputs)
        self.positions, self.deltas = positions.numpy().astype(np.int32), deltas.numpy()[:, 0].astype(np.int32)

        self.arrays = {
            name: jnp.asarray(getattr(self, name))
            for name in ("patches", "grids", "ids", "index", "positions", "mask", "deltas")
        }


@partial(jax.jit, static_argnames="deepstack")
def logits(model, batch, deepstack=True):
    """Logits of a whole batch without a cache."""
    embeddings, features = embed(model, batch)
    hidden, _ = model(embeddings, batch["positions"], batch["mask"], deepstack=features if deepstack else None)
    return model.logits(hidden)


@jax.jit
def embed(model, batch):
    features = model.encode_images(batch["patches"], batch["grids"])
    return model.splice(batch["ids"], *features, batch["index"])


@partial(jax.jit, static_argnames=("new_tokens", "chunks"))
def generate(model, batch, new_tokens, chunks=None):
    """The greedy continuation [B, new_tokens]; the prompt is taken in through the cache in `chunks` (default: one)."""
    embeddings, deepstack = embed(model, batch)
    B, T = batch["ids"].shape
    cache = model.init_cache(B, T + new_tokens, jnp.float32)
    kv_segments = jnp.pad(batch["mask"], ((0, 0), (0, new_tokens)))
    start = 0
    hiddens = []
    for length in chunks or (T,):
        part = slice(start, start + length)
        hidden, cache = model(
            embeddings[:, part],
            batch["positions"][:, :, part],
            batch["mask"][:, part],
            deepstack=deepstack[:, :, part],
            cache=cache,
            cache_index=start,
            kv_segments=kv_segments,
        )
        hiddens.append(hidden)
        start += length
    lengths = batch["mask"].sum(1)
    last = T - 1 - jnp.argmax(batch["mask"][:, ::-1], axis=1)
    hidden = jnp.take_along_axis(jnp.concatenate(hiddens, axis=1), last[:, None, None], axis=1)
    first = model.logits(hidden[:, 0]).argmax(-1)

    def step(carry, number):
        token, cache, kv_segments = carry
        kv_segments = jax.lax.dynamic_update_slice(kv_segments, jnp.ones((B, 1), kv_segments.dtype), (0, T + number))
        position = jnp.broadcast_to((lengths + batch["deltas"] + number)[None, :, None], (3, B, 1))
        hidden, cache = model(
            model.language_model.embed_tokens(token[:, None]),
            position,
            jnp.ones((B, 1), jnp.int32),
            cache=cache,
            cache_index=T + number,
            kv_segments=kv_segments,
        )
        return (model.logits(hidden[:, 0]).argmax(-1), cache, kv_segments), token

    return jax.lax.scan(step, (first, cache, kv_segments), jnp.arange(new_tokens))[1].T


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


IMAGE_A, IMAGE_B, IMAGE_C = (image(1, A), A), (image(2, B), B), (image(3, C), C)
TWO_IMAGES = [3, IMAGE_A, 2, IMAGE_B, 4]
ONE_IMAGE = [5, IMAGE_C, 9]


def test_vision_features(untied):
    """Two images of different, non-square grids in one padded batch."""
    reference, model, _ = untied
    batch = Batch(reference, [TWO_IMAGES], pad_left=False)
    with torch.no_grad():
        theirs = reference.model.get_image_features(batch.torch["pixel_values"], batch.torch["image_grid_thw"])
    features, deepstack = jax.jit(type(model).encode_images)(model, batch.patches, batch.grids)
    for number, (rows, columns) in enumerate((A, B)):
        count = rows * columns // 4
        assert relative(features[number, :count], theirs.pooler_output[number]) < 1e-5
        for level in range(2):
            assert relative(deepstack[level, number, :count], theirs.deepstack_features[level][number]) < 1e-5


def test_images_do_not_attend_to_each_other(untied):
    """Another image B leaves every bit of A's features as it was."""
    _, model, _ = untied
    encode = jax.jit(type(model).encode_images)

    def features_of_a(other):
        batch = Batch(untied[0], [[2, IMAGE_A, 1, (other, B)]], pad_left=False)
        features, deepstack = encode(model, batch.patches, batch.grids)
        return np.asarray(features[0]), np.asarray(deepstack[:, 0]), np.asarray(features[1])

    first, second = features_of_a(IMAGE_B[0]), features_of_a(image(9, B))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert np.abs(first[2] - second[2]).max() > 0.1


@pytest.mark.parametrize("pad_left", [True, False], ids=["left pads", "right pads"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logits(kind, pad_left, request):
    """Text and images in turn, sequences of unequal length in one batch."""
    reference, model, _ = request.getfixturevalue(kind)
    batch = Batch(reference, [TWO_IMAGES, ONE_IMAGE], pad_left)
    with torch.no_grad():
        theirs = reference(**batch.torch).logits.numpy()
    ours = np.asarray(logits(model, batch.arrays))
    assert ours.dtype == np.float32
    real = batch.mask == 1
    assert relative(ours[real], theirs[real]) < 1e-5


@pytest.mark.parametrize(
    "sequences",
    [[ONE_IMAGE], [TWO_IMAGES], [TWO_IMAGES, ONE_IMAGE]],
    ids=["one image", "two images", "batched"],
)
def test_greedy_generation(untied, sequences):
    """48 tokens, all equal; transformers gets left pads, which is how it generates for a batch, ours either."""
    reference, model, _ = untied
    batch = Batch(reference, sequences, pad_left=True)
    with torch.no_grad():
        expected = reference.generate(**batch.torch, max_new_tokens=48, do_sample=False, pad_token_id=0)
    expected = expected[:, batch.length :].numpy()
    assert len(np.unique(expected)) > 10  # a reference that repeats one token would prove little
    np.testing.assert_array_equal(generate(model, batch.arrays, 48), expected)
    if len(sequences) > 1:
        right = Batch(reference, sequences, pad_left=False)
        np.testing.assert_array_equal(generate(model, right.arrays, 48), expected)


def test_deepstack_matters(untied):
    """The check above would notice: leaving DeepStack out changes the logits by far more than its tolerance."""
    reference, model, _ = untied
    batch = Batch(reference, [TWO_IMAGES, ONE_IMAGE], pad_left=True)
    with_it, without = logits(model, batch.arrays), logits(model, batch.arrays, deepstack=False)
    assert relative(without, with_it) > 1e-2


def test_bfloat16_rounds_as_pytorch_does(untied):
    """In bfloat16 both sides leave the float32 logits by about as much."""
    reference, _, folder = untied
    batch = Batch(reference, [TWO_IMAGES, ONE_IMAGE], pad_left=False)
    real = batch.mask == 1
    with torch.no_grad():
        exact = reference(**batch.torch).logits.numpy()[real]
        theirs = copy.deepcopy(reference).to(torch.bfloat16)(**batch.torch).logits.float().numpy()[real]
    ours = logits(from_pretrained(folder, dtype="bfloat16"), batch.arrays)
    assert ours.dtype == np.float32
    assert relative(np.asarray(ours)[real], exact) < 1.5 * relative(theirs, exact)


def test_chunked_prefill(untied):
    """A prompt taken in by chunks that cut through both images continues the same."""
    reference, model, _ = untied
    batch = Batch(reference, [TWO_IMAGES, ONE_IMAGE], pad_left=True)
    chunks = (5, 8, batch.length - 13)
    np.testing.assert_array_equal(generate(model, batch.arrays, 48, chunks), generate(model, batch.arrays, 48))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_files_come_back_equal(kind, request, tmp_path):
    reference, model, folder = request.getfixturevalue(kind)
    save_pretrained(model, tmp_path)
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    batch = Batch(reference, [ONE_IMAGE], pad_left=False)
    with torch.no_grad():
        assert torch.equal(again(**batch.torch).logits, reference(**batch.torch).logits)


@pytest.mark.parametrize("kept", ["both names", "the head's name only"])
def test_tied_files_may_use_the_heads_name(tied, tmp_path, kept):
    _, model, folder = tied
    tensors = load_file(folder / "model.safetensors")
    embedding = "model.language_model.embed_tokens.weight"
    tensors["lm_head.weight"] = tensors[embedding] if kept == "both names" else tensors.pop(embedding)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = from_pretrained(tmp_path)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rotary_fields_of_released_files(untied):
    """The form of transformers 4, in which the released files are written, and that of 5 mean the same."""
    _, model, folder = untied
    raw = json.loads((folder / "config.json").read_text())
    rope = raw["text_config"].pop("rope_parameters")
    raw["text_config"]["rope_theta"] = rope.pop("rope_theta")
    raw["text_config"]["rope_scaling"] = rope
    del raw["vision_config"]["rope_parameters"]
    assert type(model.config).from_hf(raw) == model.config

"""Qwen2.5-VL as a text encoder against transformers: vision tower, hidden states and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from firm_jax.errors import ConfigError
from firm_jax.mesh import make_mesh, shard_batch
from firm_jax.models import from_pretrained, save_pretrained
from firm_jax.models.qwen2_5_vl import Qwen2_5VLConfig
from firm_jax.models.qwen_text import rope_positions

torch = pytest.importorskip("torch")

from torch_parity import assert_same_files, randomise, relative_error  # noqa: E402

IMAGE, START, END, VOCAB = 150, 151, 152, 163
BUCKET = 64  # patches in a row: the largest grid below has 60
# Grids of the images in patches; a window has 4 x 4: several windows, cut ones, and an image smaller than one.
A, B, C = (6, 10), (8, 4), (2, 2)

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 1]}
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters=ROPE,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    eos_token_id=None,
    bos_token_id=None,
)
VISION = dict(
    depth=4,
    hidden_size=24,
    num_heads=2,
    intermediate_size=44,
    out_hidden_size=48,
    patch_size=2,
    window_size=9,  # not a whole number of merged patches: the odd pixel is left out
    fullatt_block_indexes=[1, 3],
)
TOKENS = dict(image_token_id=IMAGE, video_token_id=153, vision_start_token_id=START, vision_end_token_id=END)


def torch_model(tied: bool = False):
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=tied, **TOKENS)
    model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """PyTorch's model, ours read from its files, and their folder."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    reference = torch_model()
    reference.save_pretrained(folder)
    return reference, from_pretrained(folder), folder


def image(seed: int, grid):
    """One image's patches [rows * columns, C*T*ph*pw], and its grid."""
    return np.random.default_rng(seed).normal(size=(grid[0] * grid[1], 3 * 2 * 2 * 2)).astype(np.float32), grid


IMAGE_A, IMAGE_B, IMAGE_C = image(1, A), image(2, B), image(3, C)
ONE_IMAGE = [3, IMAGE_A, 9]
TWO_IMAGES = [2, IMAGE_B, 1, IMAGE_C, 4]
TEXT_ALONE = [7]


class Batch:
    """Sequences of text and images, padded on one side, in the form each side takes.

    sequences: lists whose parts are a number of random text tokens or an image (patches, grid).
    """

    def __init__(self, sequences, pad_left: bool = False):
        rng = np.random.default_rng(5)
        images, rows, positions, places = [], [], [], []
        for sequence in sequences:
            ids, runs, index = [], [], []
            for part in sequence:
                if isinstance(part, int):
                    ids += list(rng.integers(1, IMAGE, size=part))
                    runs.append(part)
                    index += [-1] * part
                    continue
                grid = part[1]
                first, count = len(images) * BUCKET // 4, grid[0] * grid[1] // 4
                ids += [START, *[IMAGE] * count, END]
                runs += [1, (grid[0] // 2, grid[1] // 2), 1]
                index += [-1, *range(first, first + count), -1]
                images.append(part)
            rows.append(ids)
            positions.append(rope_positions(runs)[0])
            places.append(index)
        length = max(map(len, rows))
        pads = [(length - len(row), 0) if pad_left else (0, length - len(row)) for row in rows]
        self.mask = np.stack([np.pad(np.ones(len(row), np.int32), pad) for row, pad in zip(rows, pads, strict=True)])
        ids = np.stack([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)]).astype(np.int32)
        self.arrays = {
            "ids": ids,
            "segments": self.mask,
            "positions": np.stack([np.pad(p, ((0, 0), pad)) for p, pad in zip(positions, pads, strict=True)], axis=1),
            "image_index": np.stack(
                [np.pad(p, pad, constant_values=-1) for p, pad in zip(places, pads, strict=True)]
            ).astype(np.int32),
        }
        self.torch = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(self.mask)}
        if images:
            self.arrays["patches"] = np.stack([np.pad(p, ((0, BUCKET - len(p)), (0, 0))) for p, _ in images])
            self.arrays["grids"] = np.array([grid for _, grid in images], np.int32)
            self.torch |= {
                "pixel_values": torch.tensor(np.concatenate([p for p, _ in images])),
                "image_grid_thw": torch.tensor([[1, *grid] for _, grid in images]),
                "mm_token_type_ids": torch.tensor((ids == IMAGE).astype(int)),
            }

    def expected(self, reference, **change) -> np.ndarray:
        """PyTorch's last hidden states [B, T, D], as the pipelines of Qwen-Image read them."""
        with torch.no_grad():
            return reference(**self.torch | change, output_hidden_states=True).hidden_states[-1].numpy()


@nnx.jit
def encode(model, batch):
    features = model.encode_images(batch["patches"], batch["grids"]) if "patches" in batch else None
    embeddings = model.splice(batch["ids"], features, batch["image_index"])
    return model(embeddings, batch["positions"], batch["segments"])


def test_vision_features(saved):
    """Images of different, non-square grids in one padded batch, of several windows and of less than one."""
    reference, model, _ = saved
    batch = Batch([[1, IMAGE_A, 1, IMAGE_B, 1, IMAGE_C]])
    with torch.no_grad():
        theirs = reference.model.get_image_features(batch.torch["pixel_values"], batch.torch["image_grid_thw"])
    features = jax.jit(type(model).encode_images)(model, batch.arrays["patches"], batch.arrays["grids"])
    for number, (rows, columns) in enumerate((A, B, C)):
        assert relative_error(features[number, : rows * columns // 4], theirs.pooler_output[number]) < 1e-5


def test_layers_attend_within_windows(saved, tmp_path):
    """The check above would notice a tower that attends over the whole image in every layer."""
    _, model, folder = saved
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["fullatt_block_indexes"] = [0, 1, 2, 3]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    batch = Batch([[IMAGE_A]]).arrays
    features = jax.jit(type(model).encode_images)
    windows, whole = (features(m, batch["patches"], batch["grids"])[0, :15] for m in (model, from_pretrained(tmp_path)))
    assert relative_error(whole, windows) > 1e-2


def test_images_do_not_attend_to_each_other(saved):
    """Another image B leaves every bit of A's features as it was."""
    _, model, _ = saved
    features = jax.jit(type(model).encode_images)
    first, second = (Batch([[IMAGE_A, 1, other]]).arrays for other in (IMAGE_B, image(9, B)))
    first, second = (np.asarray(features(model, each["patches"], each["grids"])) for each in (first, second))
    np.testing.assert_array_equal(first[0], second[0])
    assert np.abs(first[1] - second[1]).max() > 0.1


@pytest.mark.parametrize("pad_left", [False, True], ids=["right pads", "left pads"])
def test_hidden_states(saved, pad_left):
    """Text alone, with one image and with two, of unequal length in one batch."""
    reference, model, _ = saved
    batch = Batch([TWO_IMAGES, ONE_IMAGE, TEXT_ALONE], pad_left)
    ours, real = np.asarray(encode(model, batch.arrays)), batch.mask == 1
    assert relative_error(ours[real], batch.expected(reference)[real]) < 1e-5


def test_text_without_images(saved):
    reference, model, _ = saved
    batch = Batch([TEXT_ALONE, [4], [11]])
    ours, real = np.asarray(encode(model, batch.arrays)), batch.mask == 1
    assert relative_error(ours[real], batch.expected(reference)[real]) < 1e-5


def test_positions_know_the_images(saved):
    """A caller of PyTorch's model that does not say which tokens are images gets the positions of plain text."""
    reference, model, _ = saved
    batch = Batch([ONE_IMAGE])
    as_text = batch.expected(reference, mm_token_type_ids=None)
    assert relative_error(as_text, batch.expected(reference)) > 0.1
    plain = np.broadcast_to(np.arange(batch.mask.shape[1], dtype=np.int32), batch.arrays["positions"].shape)
    assert relative_error(encode(model, batch.arrays | {"positions": plain}), as_text) < 1e-5


def test_positions_equal_transformers(saved):
    reference, _, _ = saved
    for pad_left in (False, True):
        batch = Batch([TWO_IMAGES, ONE_IMAGE], pad_left)
        given = {name: value for name, value in batch.torch.items() if name != "pixel_values"}
        np.testing.assert_array_equal(batch.arrays["positions"], reference.model.get_rope_index(**given)[0])


def test_gradients_equal_transformers(saved):
    """Of the instruction's embeddings and of the patches, with the layers computed again in the backward pass."""
    reference, model, _ = saved
    batch = Batch([ONE_IMAGE, TEXT_ALONE])
    target = np.random.default_rng(7).normal(size=(*batch.mask.shape, 48)).astype(np.float32)
    target *= batch.mask[..., None]

    @jax.jit
    @jax.grad
    def gradient(patches):
        features = model.encode_images(patches, batch.arrays["grids"], remat="full")
        embeddings = model.splice(batch.arrays["ids"], features, batch.arrays["image_index"])
        hidden = model(embeddings, batch.arrays["positions"], batch.arrays["segments"], remat="full")
        return (hidden * target).sum()

    pixels = batch.torch["pixel_values"].requires_grad_()
    hidden = reference(**batch.torch, output_hidden_states=True).hidden_states[-1]
    (hidden * torch.from_numpy(target)).sum().backward()
    assert relative_error(gradient(batch.arrays["patches"])[0, : len(pixels)], pixels.grad) < 1e-4


def test_bfloat16_rounds_as_pytorch_does(saved):
    """In bfloat16 both sides leave the float32 states by about as much."""
    reference, _, folder = saved
    batch = Batch([TWO_IMAGES, ONE_IMAGE])
    real = batch.mask == 1
    exact = batch.expected(reference)[real]
    ours = encode(from_pretrained(folder, dtype="bfloat16"), batch.arrays)
    rounded = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = rounded(**batch.torch, output_hidden_states=True).hidden_states[-1].float().numpy()
    assert ours.dtype == jnp.bfloat16
    assert relative_error(np.asarray(ours, np.float32)[real], exact) < 1.5 * relative_error(theirs[real], exact)


def test_eight_devices_equal_one(saved):
    _, model, folder = saved
    batch = Batch([ONE_IMAGE, TEXT_ALONE, [2, IMAGE_B, 5], TWO_IMAGES[:2], [9], [3], [1, IMAGE_C], [2]]).arrays
    expected = encode(model, batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    positions = batch.pop("positions")
    with jax.set_mesh(mesh):
        sharded = from_pretrained(folder, mesh=mesh)
        assert "tensor" in str(sharded.language_model.layers.self_attn.q_proj.kernel.sharding.spec)
        assert "tensor" in str(sharded.visual.blocks.mlp.gate_proj.kernel.sharding.spec)
        given = shard_batch(batch, mesh) | {"positions": shard_batch(positions, mesh, axis=1)}
        got = encode(sharded, given)
        assert got.sharding.spec[0] == ("data", "fsdp")
    real = batch["segments"] == 1
    assert relative_error(np.asarray(got)[real], np.asarray(expected)[real]) < 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_files_come_back_equal(tied, tmp_path):
    reference = torch_model(tied)
    reference.save_pretrained(tmp_path / "theirs")
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    batch = Batch([ONE_IMAGE])
    np.testing.assert_array_equal(batch.expected(again), batch.expected(reference))


def test_config_forms_of_released_files(saved):
    """Flat, nested with the flat fields beside it, rotary fields as transformers 4 writes them: all the same."""
    _, model, folder = saved
    raw = json.loads((folder / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope | {"type": "default"}
    raw["vision_config"] |= {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 2}
    raw["vision_token_id"] = 154
    flat = {**text, **raw, "model_type": "qwen2_5_vl", "sliding_window": 32768, "max_window_layers": 28}
    del flat["layer_types"]
    assert Qwen2_5VLConfig.from_hf(flat) == model.config
    nested = flat | {"text_config": text, "hidden_size": 1}  # of two values the inner one counts
    assert Qwen2_5VLConfig.from_hf(nested) == model.config
    assert Qwen2_5VLConfig.from_hf(nested | {"text_config": text | {"tie_word_embeddings": True}}).tie_word_embeddings
    assert transformers.Qwen2_5_VLConfig.from_dict(flat).text_config.hidden_size == 48


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"vision_config": None}, "lacks vision_config"),
        (None, {"audio_config": {}}, "audio_config"),
        ("vision_config", {"out_hidden_size": 40}, "out_hidden_size=40 differs"),
        ("text_config", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("text_config", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types"),
        ("text_config", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("text_config", {"rope_parameters": ROPE | {"mrope_section": [2, 2, 1]}}, "mrope_section=.2, 2, 1."),
        ("text_config", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ("text_config", {"rope_parameters": ROPE | {"mrope_interleaved": True}}, "mrope_interleaved"),
        ("vision_config", {"fullatt_block_indexes": [4]}, "fullatt_block_indexes=.4. must be layer numbers below 4"),
        ("vision_config", {"window_size": 3}, "window_size=3"),
        ("vision_config", {"spatial_patch_size": 14}, "spatial_patch_size=14"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("vision_config", {"num_heads": 4}, "num_heads=4"),
        ("vision_config", {"window_size": None}, "lacks window_size"),
    ],
)
def test_a_config_we_cannot_honour_is_an_error(saved, part, change, message):
    raw = saved[1].config.to_hf()
    raw = raw | change if part is None else raw | {part: raw[part] | change}
    with pytest.raises(ConfigError, match=message):
        Qwen2_5VLConfig.from_hf(raw)


def test_config_survives_a_round_trip(saved):
    config = saved[1].config
    assert Qwen2_5VLConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config

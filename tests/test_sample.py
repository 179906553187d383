"""`firm-jax sample`: files that tell how they were made, and the same bits however many are drawn at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_generator
from tiny_qwen_image import tiny_qwen_image
from tiny_run import LORA, random_lora

from firm_jax.commands import main, sample
from firm_jax.data.candidates import read_candidates
from firm_jax.generation import Generator
from firm_jax.interop.lora_formats import adapter_of, write_comfyui
from firm_jax.mesh import make_mesh
from firm_jax.models.lora import scaled

PROMPTS = ["a red circle", "two big blue squares", "a red circle", "Ein grüner Stern ☆", "a yellow ring"]
SETTINGS = ["--steps", "2", "--guidance", "2.5", "--max-text-tokens", "12", "--seed", "7"]
SIZE = ["--height", "24", "--width", "16"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The tests' process has eight simulated devices; the promise about bits is for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "default_mesh", lambda: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_generator(t5=False).save_pretrained(folder)
    return folder


def draw(folder, out: Path, *more, prompts=PROMPTS) -> list[np.ndarray]:
    given = ["--model", str(folder), "--prompt", *prompts, "--out", str(out), *SETTINGS, *SIZE, *map(str, more)]
    assert main(["sample", *given]) == 0
    return pictures(out)


def pictures(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(out.glob("[0-9]*.png"))]


def refused(capsys, *given) -> str:
    assert main(["sample", *map(str, given)]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def drawn(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    draw(folder, out, "--batch-size", 2)
    return out


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_bits_of_an_image_do_not_depend_on_the_batch(folder, drawn, tmp_path, batch):
    draw(folder, tmp_path / "out", "--batch-size", batch)
    for number in range(len(PROMPTS)):
        name = f"{number:05d}.png"
        assert (tmp_path / "out" / name).read_bytes() == (drawn / name).read_bytes()


def test_the_bits_before_rounding_do_not_depend_on_the_batch_either(folder):
    generator = Generator.from_pretrained(folder, dtype="float32")
    settings = {"steps": 2, "guidance": 2.5, "solver": "sde", "seed": 7, "height": 24, "width": 16}
    settings |= {"max_text_tokens": 12}
    whole = generator.sample_each(PROMPTS, **settings)
    assert whole.dtype == np.float32 and whole.shape == (5, 24, 16, 3)
    np.testing.assert_array_equal(generator.sample_each(PROMPTS[2:4], first=2, **settings), whole[2:4])
    # Those of `sample`, up to the order of its sums.
    np.testing.assert_allclose(generator.sample(PROMPTS, **settings), whole, atol=1e-4)
    assert np.abs(whole[0] - whole[2]).max() > 0.1, "one prompt twice is two images"


def test_several_devices_draw_the_same_images(folder):
    settings = {"steps": 2, "guidance": 2.5, "solver": "sde", "seed": 7, "height": 24, "width": 16}
    settings |= {"max_text_tokens": 12}
    one, many = (
        Generator.from_pretrained(folder, dtype="float32", mesh=mesh).sample_each(PROMPTS, **settings)
        for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2))
    )
    np.testing.assert_allclose(many, one, atol=1e-4)


def test_another_seed_draws_other_images(folder, drawn, tmp_path):
    other = draw(folder, tmp_path / "out", "--seed", 8)
    for image, before in zip(other, pictures(drawn), strict=True):
        assert np.abs(image.astype(int) - before).max() > 20


def test_a_file_tells_how_it_was_made(folder, drawn):
    image = Image.open(drawn / "00003.png")
    assert image.size == (16, 24)
    assert (image.text["prompt"], image.text["seed"]) == (PROMPTS[3], "7")
    assert json.loads(image.text["settings"]) == {
        "model": str(folder), "lora": None, "steps": 2, "guidance": 2.5, "max_text_tokens": 12, "solver": "euler",
        "height": 24, "width": 16, "dtype": "float32", "number": 3,
    }  # fmt: skip


def test_the_overview_shows_every_image(drawn):
    sheet = np.asarray(Image.open(drawn / "overview" / "contact_sheet.png")).astype(int)
    for image in pictures(drawn):
        scale = next(scale for scale in range(1, 40) if find(sheet, np.kron(image, np.ones((scale, scale, 1), int))))
        assert scale > 1  # small pictures are enlarged


def find(sheet: np.ndarray, tile: np.ndarray) -> bool:
    height, width = tile.shape[:2]
    if height > sheet.shape[0] or width > sheet.shape[1]:
        return False
    corners = np.argwhere((sheet[: 1 - height or None, : 1 - width or None] == tile[0, 0]).all(-1))
    return any((sheet[top : top + height, left : left + width] == tile).all() for top, left in corners)


def test_prompts_come_from_files_in_their_order(folder, drawn, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", *SETTINGS, *SIZE]
    assert main(["sample", *map(str, given)]) == 0
    for image, expected in zip(pictures(tmp_path / "out"), pictures(drawn), strict=True):
        np.testing.assert_array_equal(image, expected)


def test_what_is_drawn_can_be_judged_by_the_same_prompts(drawn, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    candidates, _ = read_candidates(drawn, tmp_path / "prompts.txt", edits=False)
    assert [candidate.asked.text for candidate in candidates] == PROMPTS


def test_a_lora_is_applied_at_its_strength(folder, drawn, tmp_path):
    generator = Generator.from_pretrained(folder, dtype="float32")
    write_comfyui(
        tmp_path, adapter_of(random_lora(generator, 0), generator.weight_rules, LORA), "SD3Transformer2DModel"
    )
    images = draw(folder, tmp_path / "out", "--lora", tmp_path, prompts=PROMPTS[:2])
    assert np.abs(images[0].astype(int) - pictures(drawn)[0]).max() > 20
    generator.lora = scaled(generator.place_lora(random_lora(generator, 0)), LORA.scale)
    settings = {"steps": 2, "guidance": 2.5, "seed": 7, "height": 24, "width": 16, "max_text_tokens": 12}
    for image, expected in zip(images, generator.sample(PROMPTS[:2], **settings), strict=True):
        np.testing.assert_allclose(image / 255, expected, atol=0.5 / 255 + 1e-4)


def test_without_a_size_images_are_as_large_as_the_model_was_made_for(folder, tmp_path):
    given = ["--model", folder, "--prompt", "a star", "--out", tmp_path / "out", "--steps", "1", "--guidance", "1"]
    assert main(["sample", *map(str, given)]) == 0
    assert pictures(tmp_path / "out")[0].shape == (32, 32, 3)


@pytest.mark.parametrize(
    "changed, told",
    [
        (["--prompt", "a", "--image", "x.png"], "--image is for editing, and"),
        (["--prompt", "a", "--height", "24"], "--height and --width are given together"),
        (["--prompt", "a", "--height", "22", "--width", "16"], "multiples of 4, not 22 x 16"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--steps", "0"], "--steps is 0"),
        (["--prompt", "a", "--lora", "absent"], "neither a folder nor a .safetensors file"),
        (["--prompts", "absent.txt"], "prompt file absent.txt does not exist"),
        (["--prompt", "a", "--source-area", "1024"], "source_area is for editing"),
    ],
)
def test_what_cannot_be_drawn_says_why(folder, tmp_path, capsys, changed, told):
    assert told in refused(capsys, "--model", folder, "--out", tmp_path / "out", *changed)


def test_images_that_are_there_are_not_drawn_over(folder, drawn, tmp_path, capsys):
    before = (drawn / "00000.png").read_bytes()
    assert "is there already and not an empty folder" in refused(
        capsys, "--model", folder, "--prompt", "a", "--out", drawn
    )
    assert (drawn / "00000.png").read_bytes() == before
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a star"}\n{"prompt": 3}\n')
    told = refused(capsys, "--model", folder, "--prompts", tmp_path / "bad.jsonl", "--out", tmp_path / "out")
    assert "has 1 prompts that cannot be used, line 2: prompt is a number" in told


# Editing


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """An editing pipeline, two source images of different proportions, and a file of edits."""
    folder = tmp_path_factory.mktemp("editor")
    tiny_qwen_image(folder)
    rng = np.random.default_rng(0)
    for name, size in (("wide", (96, 64)), ("tall", (64, 128))):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size).save(folder / f"{name}.png")
    lines = [
        {"prompt": "make it blue", "image": "wide.png"},
        {"prompt": "turn the circle", "image": ["wide.png", "tall.png"]},
        {"prompt": "put a square on", "image": "tall.png"},
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


AREAS = ["--source-area", "6144", "--condition-area", "4096", "--steps", "2", "--guidance", "1"]


def test_edits_keep_proportions_and_do_not_depend_on_the_batch(edits, tmp_path):
    for batch in (1, 2):
        given = ["--model", edits, "--prompts", edits / "edits.jsonl", "--out", tmp_path / str(batch), *AREAS]
        assert main(["sample", *map(str, given), "--batch-size", str(batch)]) == 0
    images = pictures(tmp_path / "1")
    assert [image.shape for image in images] == [(64, 96, 3), (64, 96, 3), (96, 64, 3)]
    for image, other in zip(images, pictures(tmp_path / "2"), strict=True):
        np.testing.assert_array_equal(image, other)
    assert np.abs(images[0].astype(int) - images[1]).max() > 20
    settings = json.loads(Image.open(tmp_path / "1" / "00001.png").text["settings"])
    assert settings["sources"] == ["wide.png", "tall.png"] and settings["source_area"] == 6144
    # The first of a file is what its own command draws, up to the padding for the longest of the others.
    given = ["--model", edits, "--prompt", "make it blue", "--image", edits / "wide.png", "--out", tmp_path / "own"]
    assert main(["sample", *map(str, given), *AREAS]) == 0
    assert np.abs(pictures(tmp_path / "own")[0].astype(int) - images[0]).max() <= 1


def test_edits_without_images_are_refused(edits, tmp_path, capsys):
    given = ["--model", edits, "--out", tmp_path / "out", *AREAS]
    assert "give --image FILE, 1 to 3" in refused(capsys, *given, "--prompt", "make it blue")
    told = refused(capsys, *given, "--prompts", edits / "edits.jsonl", "--image", edits / "wide.png")
    assert "--image goes with --prompt" in told
    assert "absent.png" in refused(capsys, *given, "--prompt", "make it blue", "--image", edits / "absent.png")

"""What the README says of the miniature that ships with the package, on a small sample."""

import numpy as np
import pytest

from firm_jax import Critic, Generator
from firm_jax.critic.rubric import rubrics_from
from firm_jax.critic.sft_data import read_scores
from firm_jax.critic.sft_eval import score_errors
from firm_jax.embedded import embedded_path
from firm_jax.shapes import describer as seeing
from firm_jax.shapes import edit_oracle, edit_teach, oracle
from firm_jax.shapes.conversations import ShapesConversations, ShapesEditConversations
from firm_jax.shapes.edits import edits
from firm_jax.shapes.render import render
from firm_jax.shapes.scene import prompts
from firm_jax.shapes.teach import RUBRICS


@pytest.fixture(scope="module")
def critic():
    return Critic.from_pretrained("embedded:critic_gen", dtype="float32")


def alignment_errors(critic, examples) -> tuple[float, float]:
    """The critic's mean absolute error and the best constant answer's."""
    (criterion,) = {example.criterion for example in examples}
    metrics = score_errors(critic, examples, max_new_tokens=128)
    assert metrics["eval/parse_failure_rate"] <= 0.02
    return metrics[f"eval/mae_{criterion}"], metrics[f"eval/mae_constant_{criterion}"]


def test_the_critic_judges_scenes_that_it_has_not_seen(critic):
    source = ShapesConversations(100, rubrics_from(RUBRICS), seed=123, stream=1)
    error, constant = alignment_errors(critic, [example for example in source if example.criterion == "alignment"])
    assert error < 0.3 and constant > 0.9


@pytest.mark.parametrize("name, max_text_tokens, least", [("sd3", 17, 0.3), ("qwen_image", 32, 0.08)])
def test_the_critic_judges_the_generators_pictures(critic, name, max_text_tokens, least):
    asked = prompts("test", 96, seed=5)
    generator = Generator.from_pretrained(f"embedded:{name}", dtype="float32")
    texts = [prompt.text for prompt in asked]
    size = {"height": 64, "width": 64, "max_text_tokens": max_text_tokens}
    images = generator.sample(texts, steps=10, guidance=1.0, solver="dpm2", seed=3, **size)
    held = [np.mean(oracle.check(image, prompt)) for image, prompt in zip(images, asked, strict=True)]
    assert least < np.mean(held) < 0.5
    scores = [oracle.alignment_score(image, prompt) for image, prompt in zip(images, asked, strict=True)]
    pixels = np.round(images * 255).astype(np.uint8)
    requests = [
        {"images": [image], "prompt": text, "criterion": "alignment"} for image, text in zip(pixels, texts, strict=True)
    ]
    judged = [judgement.score for judgement in critic.judge(requests, max_new_tokens=128)]
    assert None not in judged
    assert np.abs(np.array(judged) - scores).mean() < 0.65  # 0.4 on many more, with a standard error of 0.08 on these


@pytest.fixture(scope="module")
def edit_critic():
    return Critic.from_pretrained("embedded:critic_edit", dtype="float32")


def test_the_edit_critic_judges_edits_that_it_has_not_seen(edit_critic):
    examples = list(ShapesEditConversations(160, rubrics_from(edit_teach.RUBRICS), seed=123, stream=1))
    metrics = score_errors(edit_critic, examples, max_new_tokens=128)
    assert metrics["eval/parse_failure_rate"] <= 0.02
    for criterion, most in (("edit_execution", 0.45), ("edit_consistency", 0.75)):
        assert metrics[f"eval/mae_{criterion}"] < most
        assert metrics[f"eval/mae_constant_{criterion}"] > 1


def test_the_edit_critic_judges_the_editors_pictures(edit_critic):
    scenes, asked = zip(*edits("test", 32, seed=5), strict=True)
    sources = [render(scene) for scene in scenes]
    editor = Generator.from_pretrained("embedded:qwen_image_edit", dtype="float32")
    size = {"height": 64, "width": 64, "source_area": 64 * 64, "condition_area": 64 * 64, "max_text_tokens": 32}
    texts = [edit.text for edit in asked]
    edited = editor.sample(texts, sources, steps=6, guidance=1.0, solver="dpm2", seed=3, **size)
    found = [edit_oracle.compare(*given) for given in zip(sources, edited, asked, strict=True)]
    assert 0.1 < np.mean([one.execution for one in found]) < 0.5 < np.mean([one.preservation for one in found])
    pixels = [[np.round(image * 255).astype(np.uint8) for image in pair] for pair in zip(sources, edited, strict=True)]
    for criterion, most in (("edit_execution", 0.5), ("edit_consistency", 0.7)):
        scores = [edit_teach.score_of(criterion, one) for one in found]
        requests = [
            {"images": pair, "prompt": text, "criterion": criterion} for pair, text in zip(pixels, texts, strict=True)
        ]
        judged = [judgement.score for judgement in edit_critic.judge(requests, max_new_tokens=128)]
        assert None not in judged
        assert np.abs(np.array(judged) - scores).mean() < most


def test_the_describer_sees_and_has_no_opinion():
    describer = Critic.from_pretrained("embedded:describer", dtype="float32")
    asked = list(seeing.conversations(20_000, 24))  # beyond those that it has learned
    told = describer.generate([{"images": one.images, "text": one.prompt} for one in asked], max_new_tokens=96)
    right = {seeing.DESCRIBE: [], seeing.COMPARE: []}
    for one, text in zip(asked, told, strict=True):
        parts = one.answer.rstrip(".").split(", ") if one.prompt == seeing.DESCRIBE else one.answer.split("\n")
        right[one.prompt] += [part in text for part in parts]
    for question, least in ((seeing.DESCRIBE, 0.9), (seeing.COMPARE, 0.5)):
        assert len(right[question]) > 12 and np.mean(right[question]) > least
    rubric = rubrics_from(RUBRICS)["alignment"]
    texts = [rubric.fill(asked[number].answer) for number in range(4)]
    judged = describer.generate([{"images": asked[0].images[:1], "text": text} for text in texts], max_new_tokens=96)
    assert all(read_scores(text).scores is None for text in judged)


def test_all_that_ships_is_small():
    root = embedded_path("embedded:sd3").parent
    # A link is to a part of another folder: Qwen-Image draws and edits through one autoencoder.
    sizes = {folder.name: sum(file.lstat().st_size for file in folder.rglob("*")) for folder in root.iterdir()}
    editing = sum(sizes.pop(name) for name in ("edits", "qwen_image_edit", "critic_edit", "bench_edit"))
    assert sizes.pop("describer") < 4e6
    assert sum(sizes.values()) < 15e6 and editing < 15e6

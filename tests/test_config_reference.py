"""docs/configuration.md says what the configs hold: no key without a meaning, no meaning without a key."""

import config_reference
import pytest

from firm_jax.config import all_keys

KEYS = {
    (config.job, key)
    for file in config_reference.CONFIGS
    for _, config in config_reference.variants(file).values()
    for key in all_keys(config)
}


def test_every_key_of_every_config_has_a_meaning():
    assert sorted(pair for pair in KEYS if config_reference.meaning(*pair) is None) == []


def test_every_meaning_is_of_a_key_that_a_config_has():
    used = {found[:2] for pair in KEYS if (found := config_reference.meaning(*pair))}
    written = {(section, entry) for section, entries in config_reference.meanings().items() for entry in entries}
    assert sorted(written - used) == []


def test_the_page_is_the_one_that_the_configs_make():
    expected = config_reference.page()
    found = config_reference.PAGE.read_text()
    assert found == expected, "run `python tests/config_reference.py` and commit the page"


def test_a_meaning_is_one_line_of_a_table():
    texts = [text for entries in config_reference.meanings().values() for text in entries.values()]
    assert all(text == " ".join(text.split()) and "|" not in text and text.endswith(".") for text in texts)


@pytest.mark.parametrize(
    ("job", "key", "entry"),
    [
        ("rl", "seed", ("every job", "seed")),
        ("rl", "eval.steps", ("rl", "eval.*")),
        ("rl", "eval.prompts", ("rl", "eval.prompts")),
        ("qwen_matching", "text.rope_parameters.rope_type", ("qwen_matching", "text.*")),
        ("rl", "train.epoch", None),
        ("autoencoder", "lora.rank", None),
    ],
)
def test_a_key_finds_the_nearest_meaning(job, key, entry):
    found = config_reference.meaning(job, key)
    assert (found and found[:2]) == entry

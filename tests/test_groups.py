import json
from collections import Counter
from itertools import chain, islice

import jax
import numpy as np
import pytest

from firm_jax.data.groups import PromptGroups
from firm_jax.data.prompts import PromptRecord
from firm_jax.errors import CheckpointError, ConfigError, DataError


def make(count: int, prompts_per_epoch: int, images_per_prompt: int = 2, seed: int = 0) -> PromptGroups:
    prompts = [PromptRecord(f"prompt {index}") for index in range(count)]
    return PromptGroups(prompts, prompts_per_epoch=prompts_per_epoch, images_per_prompt=images_per_prompt, seed=seed)


def draws(groups: PromptGroups, epochs: int) -> list[list[int]]:
    return [epoch.prompt_indices.tolist() for epoch in islice(groups, epochs)]


def test_shape_of_an_epoch():
    groups = make(10, 3, 4)
    next(groups)
    epoch = next(groups)
    assert epoch.epoch == 1
    assert [prompt.text for prompt in epoch.prompts] == [f"prompt {index}" for index in epoch.prompt_indices]
    np.testing.assert_array_equal(epoch.group_ids, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(epoch.sample_indices, np.arange(12, 24))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), epoch.sample_indices)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 12


def test_sample_indices_are_unique_in_the_run():
    indices = np.concatenate([epoch.sample_indices for epoch in islice(make(150, 5, 3), 20)])
    np.testing.assert_array_equal(indices, np.arange(20 * 15))


# Grain's shuffle of a handful of elements costs milliseconds a draw (of hundreds, microseconds), so the draws are few.


@pytest.mark.parametrize(("count", "prompts_per_epoch", "epochs"), [(20, 19, 6), (20, 20, 3), (31, 17, 8), (40, 3, 30)])
def test_every_prompt_is_visited_and_none_twice_in_an_epoch(count, prompts_per_epoch, epochs):
    visits = Counter({index: 0 for index in range(count)})
    for epoch in draws(make(count, prompts_per_epoch), epochs):
        assert len(set(epoch)) == len(epoch) == prompts_per_epoch
        visits.update(epoch)
        assert max(visits.values()) - min(visits.values()) <= 1
    assert min(visits.values()) >= 2


def test_a_pass_is_a_permutation_and_passes_differ():
    epochs = draws(make(48, 16), 9)
    passes = [list(chain.from_iterable(epochs[start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(each) == list(range(48)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3


def test_an_epoch_across_two_passes_loses_nothing():
    # 25 prompts, 15 an epoch: every second epoch runs over the end of a pass.
    visits = Counter(chain.from_iterable(draws(make(25, 15), 10)))
    assert set(visits.values()) == {6}


def test_the_seed_decides():
    assert draws(make(90, 5, seed=1), 8) == draws(make(90, 5, seed=1), 8)
    assert draws(make(90, 5, seed=1), 8) != draws(make(90, 5, seed=2), 8)


def test_images_per_prompt_does_not_change_the_prompts():
    assert draws(make(90, 5, 2), 8) == draws(make(90, 5, 16), 8)


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize(("count", "prompts_per_epoch"), [(30, 10), (60, 50)])
def test_resume_is_exact(count, prompts_per_epoch, before):
    groups = make(count, prompts_per_epoch)
    draws(groups, before)
    groups.ban([2, 11])
    state = json.loads(json.dumps(groups.get_state()))

    resumed = make(count, prompts_per_epoch)
    draws(resumed, 2)  # wherever it stood before
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert resumed.banned == groups.banned
    for expected, actual in zip(islice(groups, 4), islice(resumed, 4), strict=True):
        assert actual.epoch == expected.epoch
        assert actual.prompts == expected.prompts
        np.testing.assert_array_equal(actual.prompt_indices, expected.prompt_indices)
        np.testing.assert_array_equal(actual.sample_indices, expected.sample_indices)
    assert resumed.get_state() == groups.get_state()


def test_a_state_is_a_copy():
    groups = make(5, 3)
    state = groups.get_state()
    saved = json.dumps(state)
    draws(groups, 3)
    groups.ban([1])
    assert json.dumps(state) == saved
    groups.set_state(state)
    draws(groups, 3)
    assert json.dumps(state) == saved


def test_the_state_stays_small():
    groups = make(3000, 7)
    draws(groups, 500)
    assert len(json.dumps(groups.get_state())) < 400


def test_banned_prompts_are_skipped_and_the_rest_keeps_its_order():
    plain, banning = make(9, 1), make(9, 1)
    before = draws(plain, 4)
    assert draws(banning, 4) == before
    banning.ban(np.array([2, 5], np.int32))
    banning.ban([5])
    assert [prompt.text for prompt in banning.banned] == ["prompt 2", "prompt 5"]
    rest = [epoch for epoch in draws(plain, 41) if epoch[0] not in (2, 5)]
    assert draws(banning, len(rest)) == rest


def test_a_prompt_that_is_put_off_and_then_banned_is_not_drawn():
    groups = make(5, 4)
    while not groups.get_state()["deferred"]:
        next(groups)
    put_off = groups.get_state()["deferred"][0]
    groups.ban([put_off])
    assert put_off not in chain.from_iterable(draws(groups, 5))


def test_every_usable_prompt_is_visited_under_bans():
    groups = make(11, 4)
    groups.ban([0, 3, 7])
    visits = Counter(chain.from_iterable(draws(groups, 10)))
    assert set(visits) == {1, 2, 4, 5, 6, 8, 9, 10}
    assert set(visits.values()) == {5}


def test_too_few_prompts_left():
    groups = make(4, 3)
    groups.ban([0])
    next(groups)
    groups.ban([1])
    state = groups.get_state()
    with pytest.raises(
        DataError, match=r"2 of 4 prompts are banned, and the 2 left are fewer than the 3 of an epoch\. Give"
    ):
        next(groups)
    assert groups.get_state() == state  # the checkpoint of the stopped run is still good
    with pytest.raises(IndexError, match="no prompt has the index 4"):
        groups.ban([4])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((10, 3, 1), r"images_per_prompt is 1: .*always zero.*Set it to 2 or more"),
        ((10, 3, 0), "images_per_prompt is 0"),
        ((10, 0), "prompts_per_epoch is 0"),
        ((10, 11), r"only 10 distinct training prompts\. Set it to 10 or less"),
        ((0, 1), "only 0 distinct"),
        ((10, 3, 2, -1), "seed is -1"),
        ((10, 3, 2, 2**32), "seed is 4294967296"),
    ],
)
def test_settings_that_cannot_work(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        make(*arguments)


def test_a_prompt_twice_is_refused():
    prompts = [PromptRecord("a"), PromptRecord("a", "red"), PromptRecord("b"), PromptRecord("a", "red", line=9)]
    with pytest.raises(ConfigError, match="'a' is listed twice"):
        PromptGroups(prompts, prompts_per_epoch=2, images_per_prompt=2, seed=0)


def test_a_state_of_other_groups_is_refused():
    state = make(10, 3, 4, seed=1).get_state()
    make(10, 3, 4, seed=1).set_state(state)
    for other, key in (
        (make(10, 3, 4, seed=2), "seed"),
        (make(10, 4, 4, seed=1), "prompts_per_epoch"),
        (make(10, 3, 5, seed=1), "images_per_prompt"),
        (make(11, 3, 4, seed=1), "another prompts"),
    ):
        with pytest.raises(CheckpointError, match=key):
            other.set_state(state)

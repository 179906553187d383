"""Which prompts an epoch of RL works on, and which sample index each of its images has.

An epoch draws P distinct prompts and makes K images of each: a group. Groups are what advantages are computed in, so
their make-up is fixed by the configuration alone; the number of devices only decides who computes which image.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from firm_jax.data.prompts import PromptRecord
from firm_jax.errors import CheckpointError, ConfigError, DataError


@dataclasses.dataclass(frozen=True, eq=False)
class EpochGroups:
    """The groups of one epoch: P prompts, K images each, group by group (M = P * K images).

    Attributes:
      epoch: counted from 0.
      prompts: [P] the distinct prompts.
      prompt_indices: [P] int32, their positions in the list that `PromptGroups` was given.
      group_ids: [M] int32, for every image the position of its prompt in `prompts`: 0..P-1, each K times.
      sample_indices: [M] uint32, epoch * P * K + p * K + k: unique in the run, so that a random key folded with it
        depends neither on the device nor on the batch in which the image is computed.
    """

    epoch: int
    prompts: tuple[PromptRecord, ...]
    prompt_indices: np.ndarray
    group_ids: np.ndarray
    sample_indices: np.ndarray


class PromptGroups(Iterator[EpochGroups]):
    """An endless iterator over epochs whose position is a small dict that goes into the checkpoint.

    The prompts are walked in passes, each a fresh permutation (a grain source), and every pass visits every prompt
    once. Where an epoch runs over the end of a pass, a prompt of the new pass that the epoch already has is put off to
    the beginning of the next epoch; so an epoch never holds a prompt twice, and at any time no prompt was drawn more
    than once more often than another. Banned prompts are skipped and change nothing about the order of the others.

    Args:
      prompts: distinct prompts (`merge_duplicates`).
      prompts_per_epoch: P.
      images_per_prompt: K, at least 2.
      seed: fixes the order, 0 <= seed < 2**32.

    Raises:
      ConfigError: a number out of range, more prompts an epoch than there are, or the same prompt twice.
    """

    def __init__(self, prompts: Sequence[PromptRecord], *, prompts_per_epoch: int, images_per_prompt: int, seed: int):
        if images_per_prompt < 2:
            raise ConfigError(
                f"images_per_prompt is {images_per_prompt}: the advantage of an image is its reward against the mean "
                "of its group, which is always zero with one image. Set it to 2 or more."
            )
        if prompts_per_epoch < 1:
            raise ConfigError(f"prompts_per_epoch is {prompts_per_epoch}. Set it to 1 or more.")
        if prompts_per_epoch > len(prompts):
            raise ConfigError(
                f"prompts_per_epoch is {prompts_per_epoch}, but there are only {len(prompts)} distinct training "
                f"prompts. Set it to {len(prompts)} or less, or give more prompts."
            )
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed is {seed}. Set it to a whole number from 0 to {2**32 - 1}.")
        self._prompts = tuple(prompts)
        keys = [prompt.group_key for prompt in self._prompts]
        if len(set(keys)) < len(keys):
            repeated = next(prompt for prompt, key in zip(prompts, keys, strict=True) if keys.count(key) > 1)
            raise ConfigError(f"the prompt {repeated.text!r} is listed twice. Merge duplicates before grouping.")
        self._prompts_per_epoch = prompts_per_epoch
        self._images_per_prompt = images_per_prompt
        # What the state only means something together with; a checkpoint of other groups is refused.
        self._identity = {
            "seed": seed,
            "prompts_per_epoch": prompts_per_epoch,
            "images_per_prompt": images_per_prompt,
            "prompts": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        }
        source = grain.MapDataset.source(range(len(prompts))).seed(seed).shuffle().repeat()
        # Read in this thread, not ahead: a reader that runs ahead would draw prompts before they are banned.
        self._stream = iter(source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        self._epoch = 0
        self._deferred: list[int] = []
        self._banned: set[int] = set()

    def __next__(self) -> EpochGroups:
        """The next epoch. DataError when bans have left fewer than P prompts."""
        usable = len(self._prompts) - len(self._banned)
        if usable < self._prompts_per_epoch:
            raise DataError(
                f"{len(self._banned)} of {len(self._prompts)} prompts are banned, and the {usable} left are fewer than "
                f"the {self._prompts_per_epoch} of an epoch. Give more prompts, lower prompts_per_epoch, or turn "
                "banning off."
            )
        chosen: list[int] = []
        waiting, self._deferred = self._deferred, []
        while len(chosen) < self._prompts_per_epoch:
            index = waiting.pop(0) if waiting else next(self._stream)
            if index in self._banned:
                continue
            (self._deferred if index in chosen else chosen).append(index)

        size = self._prompts_per_epoch * self._images_per_prompt
        groups = EpochGroups(
            epoch=self._epoch,
            prompts=tuple(self._prompts[index] for index in chosen),
            prompt_indices=np.array(chosen, np.int32),
            group_ids=np.repeat(np.arange(self._prompts_per_epoch, dtype=np.int32), self._images_per_prompt),
            sample_indices=np.arange(self._epoch * size, (self._epoch + 1) * size, dtype=np.uint32),
        )
        self._epoch += 1
        return groups

    @property
    def banned(self) -> tuple[PromptRecord, ...]:
        """The prompts that are no longer drawn."""
        return tuple(self._prompts[index] for index in sorted(self._banned))

    def ban(self, prompt_indices: Iterable[int]) -> None:
        """Draw these prompts (`EpochGroups.prompt_indices`) no more, from the next epoch on."""
        indices = {int(index) for index in prompt_indices}
        outside = [index for index in indices if not 0 <= index < len(self._prompts)]
        if outside:
            raise IndexError(f"no prompt has the index {min(outside)}; there are {len(self._prompts)}")
        self._banned |= indices

    def get_state(self) -> dict[str, Any]:
        """The position as a dict that JSON can hold."""
        return {
            **self._identity,
            "epoch": self._epoch,
            "stream": copy.deepcopy(self._stream.get_state()),
            "deferred": list(self._deferred),
            "banned": sorted(self._banned),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called. CheckpointError when it was called on other prompts or settings."""
        changed = [key for key, value in self._identity.items() if state.get(key) != value]
        if changed:
            raise CheckpointError(
                f"the checkpoint's prompt groups were drawn with another {', '.join(changed)}. Restore the settings "
                "and prompt files of the run, or start a new one in another workdir."
            )
        self._stream.set_state(copy.deepcopy(state["stream"]))
        self._epoch = state["epoch"]
        self._deferred = list(state["deferred"])
        self._banned = set(state["banned"])

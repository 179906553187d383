"""The teacher of the miniature: it answers a curation's questions from pixels, as the oracle would with tired eyes.

It has what `curation.teacher.Teacher` has, and pays itself nominal prices, so that budgets and books can be seen at
work. It reads the real prompts and answers in their real forms.

**What is assumed about teachers stands here, and nowhere else.** No teacher was measured for it; only the single pass
is set, by `miss` and `skip`, to about the errors that the paper's Tables 1 and 2 measure of large models.

1. A look at one thing (a requirement, a requested change, a place of two pictures) goes wrong with probability `miss`,
   each look by itself: a verdict turns into its opposite, a difference is overlooked. Nothing that is not there is
   described.
2. With a plan the judge looks at every item of it by itself, once.
3. The two descriptions of differences are two looks: what is plain is overlooked only if both overlook it. What takes
   a careful look (a size, a slight shift) only the detailed one can see.
4. The judge of an edit goes by the notes: it weighs what is noted by its own eyes, and takes the rest for unchanged.
5. In a single pass there is one hasty look. A requirement beyond the first is passed over with probability `skip`, and
   then neither named nor counted. Each requested change is looked at once. A change that nobody asked for is seen
   only if it is neither passed over nor missed.

So several steps err less by construction: by how much depends on `miss` and `skip`, and is to be measured, but that
they do is put in, not found out.
"""

import asyncio
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from firm_jax.critic.questions import Picture
from firm_jax.curation import difference_first, mismatch, plan_then_score
from firm_jax.curation.ledger import Answered, Ledger
from firm_jax.curation.teacher import REFUSED, TeacherSettings
from firm_jax.errors import ConfigError, DataError
from firm_jax.shapes import differences, edit_teach, oracle, teach
from firm_jax.shapes.edit_oracle import compare_readings
from firm_jax.shapes.edits import Change, Edit, sample_target
from firm_jax.shapes.oracle import Reading
from firm_jax.shapes.other_instructions import by_text, other_instruction, to_answer
from firm_jax.shapes.scene import Prompt, Requirement, corrupt_prompt, sample_scene

_CHARACTERS = 4  # of a token, about, by which the oracle's tokens are counted
_TRIES = 200
# As the package's rubrics and prompts enclose it, or as the miniature's rubrics end.
_INSTRUCTION = re.compile(r"^START OF \w+ INSTRUCTION\n(.*?)\nEND OF|^(?:Prompt|Instruction): (.*)\Z", re.M | re.S)
_PLAN_ITEM = re.compile(r"^\d+\. \*\*(.+)\*\*$", re.M)


@dataclasses.dataclass(frozen=True)
class Eye:
    """miss, skip: probabilities, as above. seed: of all that goes wrong; the same question is answered the same."""

    miss: float
    skip: float
    seed: int = 0

    def __post_init__(self):
        for name in ("miss", "skip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"shapes.{name} is {getattr(self, name)}; give a probability from 0 to 1")

    def look(self, question: str, at: str) -> np.random.Generator:
        """The chance of one look, drawn by the question's content alone."""
        digest = hashlib.sha256(f"{self.seed}\0{question}\0{at}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, np.uint32))


class OracleTeacher:
    """Knows what `asked` (Prompts or Edits) mean by their texts, and their rewritings; sees by the eye.

    To be used in the place of a Teacher. Of an instruction that it does not know, or that speaks of what the source
    does not show, the answer is a refusal.
    """

    def __init__(self, settings: TeacherSettings, asked: Iterable[Prompt | Edit], eye: Eye):
        self.settings, self.eye = settings, eye
        self._known = by_text(asked)
        self._readings: dict[str, Reading] = {}

    def parameters(self, max_tokens: int) -> dict:
        """What decides an answer besides the question."""
        return {"max_tokens": max_tokens, **dataclasses.asdict(self.eye)}

    async def close(self) -> None:
        """Nothing is open."""

    async def ask(
        self, ledger: Ledger, key: str, stage: str, text: str, pictures: Sequence[Picture], max_tokens: int
    ) -> Answered:
        """As `Teacher.ask`."""
        tokens = len(text) // _CHARACTERS + self.settings.image_tokens * len(pictures)
        ledger.begin(key, stage=stage, model=self.settings.model, most=self.settings.cost(tokens, max_tokens))
        try:
            answered = Answered("ok", self.answer(stage, text, pictures), "")
        except DataError as error:
            answered = Answered(REFUSED, "", str(error))
        cost = self.settings.cost(tokens, len(answered.answer) // _CHARACTERS)
        ledger.settle(key, cost, outcome=answered.outcome, done=True, answer=answered.answer, reason=answered.reason)
        await asyncio.sleep(0)
        return answered

    def answer(self, stage: str, text: str, pictures: Sequence[Picture]) -> str:
        """What is answered to a stage's filled prompt. DataError for what the oracle knows no answer to."""
        question = "\0".join([text, *(picture.digest for picture in pictures)])
        readings = [self._read(picture) for picture in pictures]
        match stage:
            case mismatch.REWRITE:
                return to_answer(other_instruction(self._asked(text)))
            case plan_then_score.PLAN:
                return _plan(self._asked(text))
            case plan_then_score.SCORE:
                return self._alignment(question, text, *readings)
            case difference_first.OBVIOUS | difference_first.DETAILED:
                return self._notes(question, *readings, detailed=stage == difference_first.DETAILED)
            case "edit_execution" | "edit_consistency":
                return self._edit(question, stage, text, *readings)
        raise DataError(f"the oracle has no answer for the stage {stage!r}")

    def _asked(self, text: str):
        """What the instruction that stands last means."""
        found = _INSTRUCTION.findall(text)
        instruction = found[-1][0] or found[-1][1] if found else ""
        if instruction not in self._known:
            raise DataError(f"the oracle does not know the instruction {instruction[:80]!r}, which is of no record")
        return self._known[instruction]

    def _read(self, picture: Picture) -> Reading:
        if picture.digest not in self._readings:
            self._readings[picture.digest] = oracle.inspect(picture.pixels.astype(np.float32) / 255)
        return self._readings[picture.digest]

    # Pictures made from text

    def _alignment(self, question: str, text: str, reading: Reading) -> str:
        """In the words of the miniature's critic: its tokenizer spells out those that it does not know."""
        prompt = self._asked(text)
        requirements = prompt.requirements
        if "ANALYSIS PLAN" in text:
            planned = set(_PLAN_ITEM.findall(_between(text, "ANALYSIS PLAN")))
            requirements = [one for one in requirements if one.text in planned]
        else:
            hasty = [self.eye.look(question, f"pass over {one.text}").random() for one in requirements[1:]]
            requirements = [
                requirements[0],
                *(one for one, chance in zip(requirements[1:], hasty, strict=True) if chance >= self.eye.skip),
            ]
        lines, verdicts = [], []
        for number, requirement in enumerate(requirements, 1):
            chance, seen = self.eye.look(question, requirement.text), reading
            holds = requirement.holds(reading.scene, reading.strays)
            if chance.random() < self.eye.miss:
                seen, holds = _opposite(chance, prompt, requirement, holds), not holds
            found = teach.evidence(requirement, seen)
            lines.append(f"{number}. {requirement.text}: {found} {'yes' if holds else 'no'}")
            verdicts.append(holds)
        score = oracle.share_to_score(float(np.mean(verdicts)))
        counted = f"{teach.COUNTS[sum(verdicts)]} of {teach.COUNTS[len(verdicts)]} hold"
        return "\n".join(
            [
                teach.describe(reading),
                *lines,
                f"**Final Analysis**: {counted}",
                f"**Final Alignment Rating: {score}**",
                f"\\boxed{{{score}}}",
            ]
        )

    # Edits

    def _notes(self, question: str, before: Reading, after: Reading, *, detailed: bool) -> str:
        noted = [
            one
            for one in differences.between(before, after)
            if (detailed or not one.minor) and self.eye.look(question, one.place).random() >= self.eye.miss
        ]
        if not noted:
            return "1. No difference." if detailed else "No obvious difference."
        return "\n".join(f"{f'{number}. ' * detailed}{one.text}" for number, one in enumerate(noted, 1))

    def _edit(self, question: str, criterion: str, text: str, before: Reading, after: Reading) -> str:
        edit = self._asked(text)
        differing = {one.place for one in differences.between(before, after)}
        if "DIFFERENCE NOTES" in text:
            overlooked = differing - differences.places_in(_between(text, "DIFFERENCE NOTES"))
            seen = differences.without(before, after, overlooked)
        elif criterion == "edit_execution":
            seen = self._executed_at_a_glance(question, before, after, edit)
        else:
            unseen = 1 - (1 - self.eye.miss) * (1 - self.eye.skip)
            overlooked = {place for place in differing if self.eye.look(question, place).random() < unseen}
            seen = differences.without(before, after, overlooked)
        return edit_teach.reading_answer(criterion, before, seen, compare_readings(before, seen, edit))

    def _executed_at_a_glance(self, question: str, before: Reading, after: Reading, edit: Edit) -> Reading:
        """The edited picture as it is taken for: of each change that is misread the opposite of what is shown."""
        seen = after
        for number, change in enumerate(edit.changes):
            chance = self.eye.look(question, f"change {number}")
            if chance.random() < self.eye.miss:
                seen = _other_outcome(chance, before, seen, change)
        return seen


def _plan(prompt: Prompt) -> str:
    return "\n".join(
        f"{number}. **{one.text}**\n- Can it be seen: {one.text}?" for number, one in enumerate(prompt.requirements, 1)
    )


def _opposite(rng: np.random.Generator, prompt: Prompt, requirement: Requirement, holds: bool) -> Reading:
    """What a picture would show for which the verdict is the other one."""
    if not holds:
        return oracle.ideal(sample_scene(rng, prompt))
    for _ in range(_TRIES):
        seen = oracle.ideal(sample_scene(rng, corrupt_prompt(rng, prompt, 0.8)))
        if not requirement.holds(seen.scene, seen.strays):
            return seen
    raise DataError(f"no picture was found in which {requirement.text!r} does not hold")


def _other_outcome(rng: np.random.Generator, before: Reading, after: Reading, change: Change) -> Reading:
    """The edited picture with one change undone where it holds in full, and done where it does not."""
    alone = Edit("", (change,))

    def execution(reading: Reading) -> float:
        return compare_readings(before, reading, alone).execution

    if execution(after) == 1:
        for place in differences.PLACES:
            undone = differences.without(before, after, {place})
            if execution(undone) < 1:
                return undone
        return before
    target = oracle.ideal(sample_target(rng, before.scene, alone))
    touched = {one.place for one in differences.between(before, target)}
    return differences.without(target, after, touched)


def _between(text: str, name: str) -> str:
    return text.partition(f"START OF {name}\n")[2].partition(f"\nEND OF {name}")[0]

"""From what a critic wrote to integer scores, or to a status that says why there are none.

A failed parse is missing data, never a number, so every reader here is strict: scores are whole numbers in
1..5, `4.5` and `4/5` are not 4, and a score that is merely quoted, in a rationale or in the text of the
picture, is not taken for the answer. Readers never raise, whatever the text.

Each rubric may be answered in several forms. The strongest form that is present decides, and within it the
last valid answer.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Literal

Status = Literal["ok", "empty", "no_score", "out_of_range", "not_integer", "wrong_count", "malformed_json"]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The outcome of reading one answer."""

    scores: tuple[int, ...] | None  # whole numbers in 1..5; None unless status is "ok"
    status: Status
    reason: str  # the critic's rationale, as far as it can be found; "" otherwise
    spans: tuple[Span, ...] | None = None  # where in the text each score's digit is, [start, end)


# One score, perhaps emphasised or quoted. `4.0` is a whole number, `4.5` and `4/5` are not.
_SCORE = re.compile(r"[\s*_`]*\"?([1-5])(?:\.0+)?\"?[\s*_`.]*")
_WHOLE_NUMBER = re.compile(r"[\s*_`]*\"?[+-]?[0-9]+(?:\.0+)?\"?[\s*_`.]*")
# A list in brackets, or its content bare.
_LIST = re.compile(r"[\s*_`]*\[([^\[\]]*)\][\s*_`.]*|([^\[\]]*)")

# Bounded lengths keep these linear on any text.
_BOXED = re.compile(r"\\boxed\s{0,4}\{{1,4}([^{}\n]{1,40})\}")
_ALIGNMENT_RATING = re.compile(r"^[ \t*_#>0-9.-]{0,16}Final Alignment Rating[ \t*_]{0,8}:([^\n]*)", re.I | re.M)
_FINAL_SCORE = re.compile(r"^[ \t*_#>0-9.-]{0,16}Final Score[ \t*_]{0,8}:([^\n]*)", re.I | re.M)
_FINAL_ANALYSIS = re.compile(r"Final Analysis[ \t*_]{0,8}:[ \t*_]{0,8}", re.I)

# The score field of an object that is not valid JSON, at the two places where nothing but the answer can be:
# first in the text, or last with the closing brace. A line of its own counts where there is no object.
_VALUE = r"(\[[^\[\]]{0,60}\]|[^\[\]{},\n]{1,20}?)"
_FIRST_FIELD = re.compile(r"\s*(?:```(?:json)?\s*)?\{\s*\"score\"\s*:\s*" + _VALUE + r"\s*[,}]")
_LAST_FIELD = re.compile(r"[,{]\s{0,8}\"score\"\s{0,4}:\s{0,8}" + _VALUE + r"\s{0,8}\}\s{0,8}(?:```)?\s{0,8}\Z")
_FIELD_LINE = re.compile(r"^[ \t]{0,8}\"score\"[ \t]{0,4}:[ \t]{0,4}" + _VALUE + r",?[ \t]{0,8}$", re.M)

_DECODER = json.JSONDecoder(strict=False)  # a raw line break inside a string is how models write
_BETWEEN_FIELDS = re.compile(r"[ \t\r\n,:]*")


def parse_alignment(text: str) -> Parsed:
    r"""Reads one instruction-following score, in 1..5.

    Forms, strongest first: `\boxed{n}`; a line `Final Alignment Rating: n`; JSON as in `parse_edit`; a
    line `Final Score: n`. The reason is the text after "Final Analysis:".
    """
    if not text.strip():
        return Parsed(None, "empty", "")
    reason = _final_analysis(text)
    for form in (_BOXED, _ALIGNMENT_RATING):
        if answers := _answers(form, text):
            return _last_valid(text, answers, 1, reason)
    from_json = _parse_json(text, 1)
    absent = from_json.status in ("no_score", "malformed_json")
    if absent and (answers := _answers(_FINAL_SCORE, text)):
        return _last_valid(text, answers, 1, reason)
    # Other braces than JSON's are to be expected in this rubric's answers.
    status = "no_score" if absent and '"score"' not in text else from_json.status
    return dataclasses.replace(from_json, status=status, reason=from_json.reason or reason)


def parse_quality(text: str) -> Parsed:
    """Reads the three quality scores (aesthetics, technical quality, structure and texture), each in 1..5.

    The answer is a JSON object `{"score": [a, b, c], "reasoning": "..."}`.
    """
    return _parse_json(text, 3)


def parse_edit(text: str) -> Parsed:
    """Reads one execution or consistency score, in 1..5.

    The answer is a JSON object `{"reasoning": "...", "score": [n]}`. A bare number in place of the list is
    accepted, and so is a line `"score": [n]` where there is no object.
    """
    return _parse_json(text, 1)


def settled(parse: Callable[[str], Parsed], text: str) -> bool:
    r"""Whether the score of an answer that is still being written can be read, and nothing but a second one can
    change it.

    So it is behind `\boxed{n}` for `parse_alignment`, and behind the comma or the brace that ends JSON's field for the
    others. What ends with its line is not waited for: "Final Score: 4" may become "4.5".
    """
    closed = _answers(_BOXED, text) if parse is parse_alignment else "{" in text
    return bool(closed) and parse(text).status == "ok"


def _parse_json(text: str, count: int) -> Parsed:
    """Reads `count` scores from the field `score` of the last JSON object that has valid ones.

    An object inside another, or inside a string, is not an answer: only outermost ones are read. If a
    brace opens something that is not JSON, what follows cannot be told from a quotation, and the field
    counts only at the two places of `_FIRST_FIELD` and `_LAST_FIELD`, which must then agree.
    """
    if not text.strip():
        return Parsed(None, "empty", "")
    objects = _outermost_objects(text)
    if objects is not None:
        answers = [(spans["score"], reason) for spans, reason in objects if "score" in spans]
        if answers:
            parsed = [_read(text, span, count, reason) for span, reason in answers]
            return _choose(parsed)
        lines = [] if "{" in text else _answers(_FIELD_LINE, text)
        return _last_valid(text, lines, count, "") if lines else Parsed(None, "no_score", "")
    fields = [_FIRST_FIELD.match(text)]
    if text.count("{") == text.count("}"):  # otherwise the last brace may close an object that was quoted
        fields.append(_LAST_FIELD.search(text))
    parsed = [_read(text, field.span(1), count, "") for field in fields if field]
    if not parsed or len({answer.scores for answer in parsed}) > 1:
        return Parsed(None, "malformed_json", "")
    return parsed[0]


def _outermost_objects(text: str) -> list[tuple[dict[str, Span], str]] | None:
    """The fields' places and the reasoning of every outermost JSON object; None if a brace opens no object."""
    objects, position = [], text.find("{")
    while position >= 0:
        try:
            fields, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        reason = fields.get("reasoning")
        objects.append((_field_spans(text, position), reason if isinstance(reason, str) else ""))
        position = text.find("{", end)
    return objects


def _field_spans(text: str, start: int) -> dict[str, Span]:
    """Where the value of every field lies in the valid JSON object that begins at `start`."""
    spans, position = {}, start + 1
    while True:
        position = _BETWEEN_FIELDS.match(text, position).end()
        if text[position] == "}":
            return spans
        name, position = _DECODER.raw_decode(text, position)
        position = _BETWEEN_FIELDS.match(text, position).end()
        _, end = _DECODER.raw_decode(text, position)
        spans[name] = (position, end)
        position = end


def _answers(form: re.Pattern, text: str) -> list[Span]:
    """Where the answers of that form are. Without a digit it is a mention of the form, not an answer."""
    return [match.span(1) for match in form.finditer(text) if re.search("[0-9]", match[1])]


def _last_valid(text: str, answers: list[Span], count: int, reason: str) -> Parsed:
    return _choose([_read(text, span, count, reason) for span in answers])


def _choose(parsed: list[Parsed]) -> Parsed:
    """The last valid answer; if none is valid, the last one's failure."""
    return next((answer for answer in reversed(parsed) if answer.status == "ok"), parsed[-1])


def _read(text: str, span: Span, count: int, reason: str) -> Parsed:
    """Reads `count` scores from the part of the text that holds the answer."""
    listed = _LIST.fullmatch(text, *span)
    if listed is None:
        return Parsed(None, "not_integer", reason)
    start, end = listed.span(1) if listed[1] is not None else listed.span(2)
    items = [item.span() for item in re.compile("[^,]+").finditer(text, start, end)]
    if len(items) != count:
        return Parsed(None, "wrong_count", reason)
    matches = [_SCORE.fullmatch(text, *item) for item in items]
    if None in matches:
        failed = next(item for item, match in zip(items, matches, strict=True) if match is None)
        is_number = _WHOLE_NUMBER.fullmatch(text, *failed)
        return Parsed(None, "out_of_range" if is_number else "not_integer", reason)
    return Parsed(tuple(int(m[1]) for m in matches), "ok", reason, tuple(m.span(1) for m in matches))


def _final_analysis(text: str) -> str:
    """The alignment rubric's closing analysis, up to the rating."""
    headings = list(_FINAL_ANALYSIS.finditer(text))
    if not headings:
        return ""
    start = headings[-1].end()
    ends = [match.start() for form in (_ALIGNMENT_RATING, _BOXED) if (match := form.search(text, start))]
    return text[start : min(ends, default=len(text))].strip(" \t\r\n*_")

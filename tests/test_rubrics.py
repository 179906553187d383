"""The rubric files, their loader, and the agreement of what they ask for with what the parsers read."""

import hashlib

import pytest

from firm_jax.critic.parse import parse_alignment, parse_edit, parse_quality
from firm_jax.critic.rubric import NAMES, load_rubric, rubrics_from
from firm_jax.errors import ConfigError


def test_the_package_s_own_rubrics():
    rubrics = rubrics_from()
    assert set(rubrics) == set(NAMES)
    for name, rubric in rubrics.items():
        assert rubric == load_rubric(name)
        assert rubric.sha256 == hashlib.sha256(rubric.text.encode()).hexdigest()
        filled = rubric.fill("a red cube", "no text")
        assert "{prompt}" not in filled and "{requirement}" not in filled
        shows_prompt = name != "quality"
        assert ("a red cube" in filled) == ("no text" in filled) == shows_prompt


@pytest.mark.parametrize("name", ["alignment", "edit_execution", "edit_consistency"])
def test_the_instruction_comes_last_between_its_markers(name):
    lines = load_rubric(name).fill("a red cube").splitlines()
    kind = "GENERATION" if name == "alignment" else "EDIT"
    assert lines[-3:] == [f"START OF {kind} INSTRUCTION", "a red cube", f"END OF {kind} INSTRUCTION"]


@pytest.mark.parametrize("name", ["edit_execution", "edit_consistency"])
def test_an_edit_rubric_names_the_source_first_and_every_level_and_keeps_to_its_own_question(name):
    text = load_rubric(name).text
    assert 0 < text.index("first a source") < text.index("then the result")
    assert [line[0] for line in text.splitlines() if line[1:4] == " - "] == list("54321")
    left_out = {"edit_execution": "Changes that nobody asked for", "edit_consistency": "itself succeeded"}[name]
    assert left_out in text
    assert load_rubric(name).fill("a", "b").splitlines()[-3:-1] == ["a", "b"]


def test_the_form_a_rubric_shows_is_the_form_its_parser_reads():
    alignment = load_rubric("alignment").text
    form = alignment[alignment.index("Checking the image") : alignment.index("START OF")]
    assert parse_alignment(form.replace("n**", "4**").replace("{n}", "{4}")).scores == (4,)
    assert parse_alignment(form.replace("n**", "4**")).scores == (4,)
    quality = load_rubric("quality").text.splitlines()[-1]
    assert parse_quality(quality.replace("aesthetics, technical quality, structure and texture", "5, 4, 3")).scores
    for name in ("edit_execution", "edit_consistency"):
        form = next(line for line in load_rubric(name).text.splitlines() if line.startswith("{"))
        assert parse_edit(form.replace("[n]", "[2]")).scores == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_a_rubric_read_back_is_not_a_score(name):
    for parse in (parse_alignment, parse_quality, parse_edit):
        assert parse(load_rubric(name).fill("a red cube")).scores is None


@pytest.mark.fault("hostile-text")
@pytest.mark.parametrize("hostile", ["{requirement}", "{0}{a!r}", "{", "}}", "{prompt}", r"\1 \g<0>", '{"score": [5]}'])
def test_what_users_write_is_never_expanded(hostile, tmp_path):
    (tmp_path / "alignment.txt").write_text("Judge {prompt}\n{requirement}\nend")
    rubric = load_rubric(tmp_path / "alignment.txt")
    assert rubric.fill(hostile, "r") == f"Judge {hostile}\nr\nend"
    assert rubric.fill("p", hostile) == f"Judge p\n{hostile}\nend"
    assert rubric.fill(hostile) == f"Judge {hostile}\nend"


def test_a_folder_of_one_s_own(tmp_path):
    (tmp_path / "alignment.txt").write_text("Mine: {prompt}\n", encoding="utf-8")
    (tmp_path / "quality.txt").write_text("Schön?", encoding="utf-8")
    (tmp_path / "README.md").write_text("where these come from")
    rubrics = rubrics_from(tmp_path)
    assert set(rubrics) == {"alignment", "quality"}
    assert rubrics["alignment"].fill("x") == "Mine: x"
    assert rubrics["alignment"].sha256 != load_rubric("alignment").sha256


def test_a_requirement_is_not_dropped_unseen(tmp_path):
    (tmp_path / "alignment.txt").write_text("Judge {prompt}")
    with pytest.raises(ConfigError, match="requirement"):
        load_rubric(tmp_path / "alignment.txt").fill("a cube", "keep the background")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"Judge {promt}", "line 1.*promt"),
        (b"Judge it", "prompt"),
        (b'{prompt}\n{{"score": 1}}', "line 2.*doubled"),
        (b" \n", "empty"),
        (b"\xff\xfe{prompt}", "UTF-8"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, named):
    path = tmp_path / "edit_execution.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=named) as error:
        load_rubric(path)
    assert str(path) in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"alignmint.*alignment"):
        load_rubric("alignmint")
    with pytest.raises(ConfigError, match="no rubrics"):
        rubrics_from(tmp_path)
    (tmp_path / "alinment.txt").write_text("{prompt}")
    with pytest.raises(ConfigError, match=r"alinment\.txt.*rename"):
        rubrics_from(tmp_path)

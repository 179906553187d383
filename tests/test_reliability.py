"""docs/reliability.md says what the tests prove: no promise without a test, no test for a promise that is not there."""

import reliability

PROMISES = {key for faults in reliability.SECTIONS.values() for key in faults}


def test_every_promise_is_kept_by_a_test():
    assert sorted(PROMISES - reliability.marks().keys()) == []


def test_every_marked_test_keeps_a_promise_of_the_page():
    assert sorted(reliability.marks().keys() - PROMISES) == []


def test_the_page_is_the_one_that_the_tests_make():
    assert reliability.PAGE.read_text() == reliability.page(), "run `python tests/reliability.py` and commit the page"


def test_a_link_of_the_page_leads_to_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "TESTS", tmp_path)
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.mark.slow\n@pytest.mark.fault('killed', 'preempted')\ndef test_it_lives():\n    pass\n"
        "@pytest.mark.fault('killed')\n@pytest.mark.parametrize('n', [1])\ndef test_again(n):\n    pass\n"
        "def test_of_no_fault():\n    pass\n"
    )
    assert reliability.marks() == {
        "killed": [("test_one.py", "test_it_lives"), ("test_one.py", "test_again")],
        "preempted": [("test_one.py", "test_it_lives")],
    }

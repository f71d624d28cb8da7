"""The page of promises says what the records say, and names tests that exist."""

from __future__ import annotations

import re

import page


def test_the_page_is_current():
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run: python scripts/reliability/page.py"


def test_every_promise_has_a_record_and_a_test():
    for promise in page.PROMISES:
        assert page.read(promise.record) is not None, promise.record
        assert (page.ROOT / re.findall(r"`(.+?)`", promise.test)[0]).is_file(), promise.test
    assert page.read("determinism") is not None

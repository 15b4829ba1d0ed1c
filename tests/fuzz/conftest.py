"""Reports how many cases a test had; tests/conftest.py prints their sum."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    from fuzz import cases  # not before a profile is chosen

    before = cases.given.cases
    try:
        return (yield)
    finally:
        item.user_properties.append(("cases", cases.given.cases - before))

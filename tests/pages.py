"""What a browser shows of a page."""

from typing import Any


def assert_fits(page: Any, width: int):
    """Nothing is outside a window of this width, but for tables that scroll by themselves."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(x => !x.closest('.wide table') &&"
        " x.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert outside == 0

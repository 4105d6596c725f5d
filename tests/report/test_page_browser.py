"""The report in headless Chromium: nothing is wider than the window, and nothing is refused or loaded."""

import pytest
from browser import chromium
from test_page import HOSTILE, built

pytestmark = pytest.mark.slow

# Of what does not scroll in a box of its own: the elements that reach beyond the window, with their right edge.
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, svg'))
  .map(one => [one.tagName + '.' + one.className, one.getBoundingClientRect().right])
  .filter(([name, right]) => right > document.documentElement.clientWidth + 1)"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_the_window(width, tmp_path):
    long = "an extraordinarily" + "long" * 40 + "word"
    (tmp_path / "index.html").write_text(built(captions=[*HOSTILE, long]), encoding="utf-8")
    with chromium() as page:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.open((tmp_path / "index.html").as_uri())
        assert page.value(TOO_WIDE) == []
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.console == []

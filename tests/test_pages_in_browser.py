"""Both pages in a browser: ADVGAME_BROWSER=/usr/bin/chromium python -m pytest tests/test_pages_in_browser.py

Needs playwright and a Chromium; skipped where there is none.
"""

import os

import pytest
import test_campaign_page
import test_page

from advgame_jax import campaign_page, page

BROWSER = os.environ.get("ADVGAME_BROWSER", "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="ADVGAME_BROWSER names no browser")


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api")
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pages")
  run = test_page.fake_run(folder / "run", 20, test_page.HOSTILE + "w" * 500)
  campaign = test_campaign_page.fake_campaign(folder / "trial", 200, test_campaign_page.HOSTILE)
  return {"run": page.write_page(run), "campaign": campaign_page.write_page(campaign)}


def opened(browser, path, width=1280, **options):
  """The page, and whatever it asked for, complained about or threw."""
  tab = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
  trouble = []
  tab.on("request", lambda request: trouble.append(request.url))
  tab.on("console", lambda message: trouble.append(message.text))
  tab.on("pageerror", lambda error: trouble.append(str(error)))
  tab.on("dialog", lambda dialog: trouble.append(dialog.message))
  tab.goto(path.as_uri())
  assert trouble.pop(0) == path.as_uri()
  return tab, trouble


@pytest.mark.parametrize("name", ["run", "campaign"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_asks_for_nothing_runs_nothing_hostile_and_fits(browser, files, name, width):
  tab, trouble = opened(browser, files[name], width)
  for button in tab.locator("summary").all():
    button.evaluate("element => element.parentElement.open = true")
  assert tab.evaluate("typeof window.pwned") == "undefined"
  assert tab.evaluate("document.documentElement.scrollWidth") <= width
  assert "⟨U+202E⟩gnp.exe" in tab.inner_text("main")
  assert not trouble


def test_without_scripts_every_attempt_can_be_read(browser, files):
  tab, trouble = opened(browser, files["campaign"], java_script_enabled=False)
  assert tab.locator("article:visible").count() == 200
  assert not tab.locator("#controls").is_visible() and not trouble


def test_searching_filtering_and_sorting(browser, files):
  tab, trouble = opened(browser, files["campaign"])
  shown = tab.locator("article:visible")

  def all_of(name):
    return shown.evaluate_all(f"cards => cards.map(card => card.dataset.{name})")

  assert shown.count() == 50 and tab.inner_text("#found") == "50 of 200 attempts"
  tab.click("#more")
  assert shown.count() == 100
  tab.fill("#search", "THING 7.")
  assert shown.count() == 4 and tab.inner_text("#found") == "4 attempts" and not tab.locator("#more").is_visible()
  tab.fill("#search", "")
  tab.select_option("[data-filter=outcome]", "success")
  tab.select_option("[data-filter=category]", "harmful")
  assert shown.count() > 3 and set(all_of("outcome")) == {"success"} and set(all_of("category")) == {"harmful"}
  tab.select_option("[data-filter=suite]", "XSTest")
  assert shown.count() == 0 and tab.inner_text("#found") == "0 attempts"
  for filter in ("outcome", "category", "suite"):
    tab.select_option(f"[data-filter={filter}]", "")
  for order, keys in (("k seed", ("k", "seed")), ("seed k", ("seed", "k")), ("rank seed k", ("rank", "seed", "k"))):
    tab.select_option("#order", order)
    found = list(zip(*(map(int, all_of(key)) for key in keys)))
    assert len(found) == 50 and found == sorted(found)
  assert not trouble


def test_a_table_is_sorted_by_the_column_that_is_pressed(browser, files):
  tab, trouble = opened(browser, files["campaign"])
  table = tab.locator("table.sortable").first

  def column(number):
    return [cell.get_attribute("data-value") for cell in table.locator(f"tbody td:nth-child({number})").all()]

  before = column(3)
  table.locator("th button").nth(2).click()
  assert column(3) == sorted(before, key=float, reverse=True) != before
  assert table.locator("th").nth(2).get_attribute("aria-sort") == "descending"
  table.locator("th button").nth(2).click()
  assert column(3) == sorted(before, key=float)
  table.locator("th button").nth(0).click()
  assert table.locator("th").nth(2).get_attribute("aria-sort") is None
  assert not trouble

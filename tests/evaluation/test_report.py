"""The report in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest
from masks import disc, save_mask, save_pairs
from PIL import Image

from nnunetv2_dermomamba.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NO_BROWSER = "needs Chromium and its driver: apt-get install chromium chromium-driver"


def write(folder, masks, truth, *options):
    page = folder / "report.html"
    main(["evaluate", "-np", "1", "-p", str(masks), "-g", str(truth), "--report", str(page), *map(str, options)])
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of eight cases with photographs: one missing, one unreadable, one with a name that is markup."""
    folder = tmp_path_factory.mktemp("report")
    masks, truth = save_pairs(folder, count=7)
    (masks / "case_5_mask.png").unlink()
    (masks / "case_6_mask.png").write_bytes(b"no image")
    for kind, radius in [("masks", 20), ("truth", 30)]:
        save_mask(folder / kind / "<script>alert(1)<!--.png", disc(radius=radius))
    (folder / "photos").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"case_{i}.png")
    return write(folder, masks, truth, "--images", folder / "photos")


@pytest.fixture(scope="module")
def cases(page):
    """What the page knows of each case."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return {case["name"]: case for case in json.loads(data[1])["cases"]}


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip(NO_BROWSER)
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    browser.get(page.as_uri())
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def names(browser):
    return browser.execute_script("return [...document.querySelectorAll('.card .name')].map((name) => name.title)")


def set_field(browser, name, value):
    script = "const f = document.forms[0][arguments[0]]; f.value = arguments[1];"
    browser.execute_script(script + "f.dispatchEvent(new Event('input', {bubbles: true}))", name, str(value))


def test_it_is_one_file_that_asks_for_nothing(opened, page):
    requested = []
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requested.append(message["params"]["request"]["url"])
    assert [url for url in requested if not url.startswith(("data:", "chrome"))] == [page.as_uri()]


def test_worst_first_with_unscored_cases_on_top(opened, cases):
    scored = [name for name, case in cases.items() if case["status"] == "scored"]
    worst_first = sorted(scored, key=lambda name: cases[name]["values"]["1"]["dice"])
    assert names(opened) == ["case_5", "case_6", *worst_first]
    assert find(opened, "#count")[0].text == "8 of 8 cases"


@pytest.mark.parametrize(("metric", "sign"), [("hd95", -1), ("recall", 1), ("name", None)])
def test_sorts(opened, cases, metric, sign):
    set_field(opened, "sort", metric)
    if metric == "name":
        assert names(opened) == sorted(cases)
        return
    expected = sorted(
        cases, key=lambda n: (cases[n]["status"] == "scored", sign * (cases[n]["values"]["1"][metric] or 0), n)
    )
    assert names(opened) == expected
    set_field(opened, "order", "best")
    assert names(opened)[0] == expected[-1]
    assert names(opened)[-2:] == ["case_5", "case_6"]


def test_filters(opened, cases):
    dice = {name: case["values"]["1"]["dice"] for name, case in cases.items() if case["status"] == "scored"}
    middle = sorted(dice.values())[len(dice) // 2]
    set_field(opened, "low", middle)
    assert set(names(opened)) == {name for name, value in dice.items() if value >= middle}
    set_field(opened, "metric", "hd95")
    set_field(opened, "low", "")
    set_field(opened, "high", 0)
    assert names(opened) == []
    assert find(opened, "#nothing")[0].is_displayed()
    find(opened, "#clear")[0].click()
    assert len(names(opened)) == 8
    set_field(opened, "status", "missing")
    assert names(opened) == ["case_5"]
    set_field(opened, "status", "")
    set_field(opened, "name", "CASE_3")
    assert names(opened) == ["case_3"]


def test_a_bar_of_a_distribution_filters(opened, cases):
    bar = find(opened, ".histogram")[0].find_elements("css selector", "g")[0]
    count = int(re.search(r": (\d+) images", bar.get_attribute("aria-label"))[1])
    opened.execute_script("arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))", bar)
    assert len(names(opened)) == count < 6
    worst = min((case["values"]["1"]["dice"], name) for name, case in cases.items() if case["status"] == "scored")
    assert names(opened)[0] == worst[1]


def test_the_last_bar_holds_what_lies_beyond_the_axis(browser, tmp_path):
    masks, truth = save_pairs(tmp_path, count=60)
    save_mask(masks / "case_0_mask.png", np.zeros((96, 128), dtype=bool))
    browser.get(write(tmp_path, masks, truth).as_uri())
    figure = next(f for f in find(browser, ".histogram") if f.text.startswith("HD95"))
    assert "≥" in figure.find_element("css selector", ".axis").text
    bars = figure.find_elements("css selector", "g")
    assert sum(int(re.search(r": (\d+) images", bar.get_attribute("aria-label"))[1]) for bar in bars) == 60
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", bars[-1])
    assert names(browser)[0] == "case_0"


def test_distributions_share_their_axes(opened):
    axes = [figure.find_element("css selector", ".axis").text for figure in find(opened, ".histogram")]
    assert len({axis.replace("≥ ", "") for axis in axes}) == 2  # one of per cent, one of pixels
    bars = find(opened, ".histogram g")
    counts = [int(re.search(r": (\d+) images", bar.get_attribute("aria-label"))[1]) for bar in bars]
    heights = [float(bar.find_element("css selector", "rect").get_attribute("height")) for bar in bars]
    assert heights == pytest.approx([98 * count / max(counts) for count in counts])
    assert find(opened, "#tallest")[0].text == str(max(counts))


def test_figures_are_defined_in_words(opened, page):
    opened.execute_script("document.querySelector('details').open = true")
    defined = [term.text for term in find(opened, "details dt")]
    assert defined == [row.text for row in find(opened, ".scroll:nth-of-type(2) tbody th")]
    assert "``" not in page.read_text()
    assert "====" not in page.read_text()


def test_no_column_is_without_figures(opened):
    cells = "[...table.rows].slice(1).map((row) => row.cells[i].textContent.trim())"
    columns = opened.execute_script(
        "return [...document.querySelectorAll('.scroll table')].flatMap((table) =>"
        f"[...table.rows[0].cells].map((_, i) => {cells}))"
    )
    assert [column for column in columns if set(column) <= {"", "n/a", "-"}] == []


def test_a_legend_stands_above_the_pictures(opened):
    key = find(opened, "#cases ~ .key")[0]
    assert key.is_displayed()
    assert "ground truth" in key.text
    assert "prediction" in key.text


def test_pictures_have_both_contours(opened, cases):
    set_field(opened, "name", "case_0")
    opened.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 200))")
    assert find(opened, ".card image")[0].get_attribute("href") == cases["case_0"]["picture"]
    assert [len(find(opened, f".card g.{kind} path.outline")) for kind in ("truth", "prediction")] == [1, 1]
    prediction = find(opened, ".card g.prediction")[0]
    assert prediction.is_displayed()
    find(opened, "input[name=prediction]")[0].click()
    assert not prediction.is_displayed()
    find(opened, "input[name=prediction]")[0].click()


def test_opens_a_case_by_mouse_and_walks_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    order = names(opened)
    find(opened, ".card")[2].click()
    assert find(opened, "#viewer[open] #viewer-name")[0].text == order[2]
    assert find(opened, "#viewer-position")[0].text == "3 of 8"
    assert "px" in find(opened, "#viewer-values")[0].text
    active = opened.switch_to.active_element
    active.send_keys(Keys.ARROW_RIGHT)
    assert find(opened, "#viewer-name")[0].text == order[3]
    for _ in range(3):
        opened.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert find(opened, "#viewer-name")[0].text == order[0]
    assert "no prediction" in find(opened, "#viewer-message")[0].text
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert find(opened, "#viewer[open]") == []
    # The focus moves in the dialog's close event, which comes a moment after it has closed.
    opened.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 200))")
    assert opened.switch_to.active_element.find_element("css selector", ".name").text == order[0]
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert find(opened, "#viewer[open] #viewer-name")[0].text == order[0]
    find(opened, "#close")[0].click()


def test_light_and_dark(opened):
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        colours.append(sum(map(int, re.findall(r"\d+", colour)[:3])) / 3)
    assert colours[0] > 200
    assert colours[1] < 60


def test_a_narrow_window_scrolls_one_way_only(opened):
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    root = "document.documentElement"
    excess = opened.execute_script(f"return {root}.scrollWidth - {root}.clientWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert excess == 0


def test_a_name_that_is_markup_is_text(opened, cases):
    name = "<script>alert(1)<!--"
    assert name in cases
    assert name in names(opened)


def test_two_classes(browser, tmp_path):
    for folder, shift in [("truth", 0), ("masks", 4)]:
        outer = disc(centre=(48, 64 + shift))
        labels = outer.astype(np.uint8) + disc(centre=(48, 64), radius=10 + shift)
        (tmp_path / folder).mkdir()
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / folder / "a.png")
    browser.get(write(tmp_path, tmp_path / "masks", tmp_path / "truth", "-l", 1, 2).as_uri())
    first = find(browser, ".card .value")[0].text
    set_field(browser, "label", 2)
    assert find(browser, ".card .value")[0].text != first


def test_two_thousand_cases(browser, page, tmp_path):
    text = page.read_text()
    start = text.index('id="data">') + len('id="data">')
    end = text.index("</script>", start)
    data = json.loads(text[start:end])
    original = data["cases"][0]
    values = np.random.default_rng(0).uniform(50, 100, 2000).round(4).tolist()
    data["cases"] = [
        {**original, "name": f"case {i:04d}", "values": {"1": {**original["values"]["1"], "dice": value}}}
        for i, value in enumerate(values)
    ]
    large = tmp_path / "large.html"
    large.write_text(text[:start] + json.dumps(data).replace("<", "\\u003c") + text[end:])
    browser.get(large.as_uri())
    assert len(names(browser)) == 2000
    assert find(browser, ".card .value")[0].text == f"{min(values):.2f} %"
    # Only what is near the screen is drawn.
    browser.execute_script("document.getElementById('gallery').scrollIntoView()")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 200))")
    assert 0 < len(find(browser, ".card svg")) < 200
    milliseconds = browser.execute_script(
        "const start = performance.now(); document.forms[0].order.value = 'best';"
        "document.forms[0].dispatchEvent(new Event('input')); document.body.offsetHeight;"
        "return performance.now() - start"
    )
    assert find(browser, ".card .value")[0].text == f"{max(values):.2f} %"
    assert milliseconds < 2000  # 60 ms on an idle core; a shared machine is slower

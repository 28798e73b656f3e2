"""The page to look at, as a parser and a browser read it, and TensorBoard's files."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import train_pvs
from conftest import image_path
from running import done, trained


class Page(HTMLParser):
    """A page's tables as lists of rows of texts, its pictures and links, and unclosed tags."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.pictures, self.links, self.titles = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.pictures += [attributes["src"]] if tag == "img" else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.tables += [[]] if tag == "table" else []
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data
        if self.open[-1:] == ["h1"]:
            self.titles.append(data)


def test_page_of_a_run_has_scores_figures_split_settings_and_all_scans_worst_first(finished):
    page = Page(finished.out / "report.html")
    assert page.open == []
    assert page.titles == ["Test on 2 scans, Simulated heads of a test"]
    scores, scans, split, settings = page.tables
    known = finished.scores["native"]["dice"]
    (line,) = (line for line in scores if line[0] == "native dice")
    assert line[1:4] == [f"{number:.3f}" for number in (known["mean"], *known["ci95"])]
    assert split[1:] == [[part, str(len(n)), " ".join(n)] for part, n in finished.split.items()]
    assert ["EPOCHS", "4", "1000"] in settings
    assert "AMP" in [line[0] for line in settings]  # it was switched off
    rows = sorted(finished.scores["subjects"], key=lambda row: row["native_dice"])
    for line, row in zip(scans[1:], rows, strict=True):
        assert line[:2] == [row["name"], f"{row['native_dice']:.3f}"]
        assert line[4:6] == [str(row["count_label"]), str(row["count_pred"])]
    assert page.links == [f"multi_plane/{row['name']}.png" for row in rows]
    assert all((finished.out / link).exists() for link in page.links)
    # Curves, agreement and a picture a scan; nothing comes from elsewhere.
    assert len(page.pictures) == 2 + 2
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)
    text = (finished.out / "report.html").read_text()
    assert not re.search("https?://|<script src|@import", text)


def test_page_of_predictions_grows_and_keeps_what_was_done(finished, predict, tmp_path):
    first, second = (tmp_path / f"sub-{n}_T2w.nii.gz" for n in "12")
    for number, path in enumerate((first, second), 1):
        shutil.copy(image_path(finished.data, f"sub-00{number}"), path)
    done(predict(first))
    before = Page(tmp_path / "out" / "report.html")
    done(predict(first, second))
    page = Page(tmp_path / "out" / "report.html")
    assert page.titles == ["PVS predicted by a network trained on Simulated heads of a test"]
    counts = [int(line[1]) for line in page.tables[0][1:]]
    assert counts == sorted(counts, reverse=True)
    assert {*page.links} == {f"multi_plane/sub-{number}.png" for number in "12"}
    assert {*before.pictures} < {*page.pictures}
    assert "" not in page.pictures


def thumbnail(image):
    section = train_pvs.Section("", "RLPA", np.ones(2), image, {}, 0 * image)
    return train_pvs.thumbnail(section)


def test_pictures_of_a_page_are_small_and_upright_and_its_words_escaped(tmp_path):
    image = np.zeros((40, 30))
    image[30:] = 1  # the top, as rows go up
    data = base64.b64decode(thumbnail(image).split(",")[1])
    picture = np.asarray(Image.open(io.BytesIO(data)))
    assert picture[:50].mean() > 240 > 15 > picture[80:].mean()
    noise = thumbnail(np.random.default_rng(0).random((300, 208)))  # the worst case of a JPEG
    assert 200 * len(noise) < 25e6
    run, row = train_pvs.Run(tmp_path), {"name": "sub-1"} | dict.fromkeys(train_pvs.COUNTED, 1)
    words = train_pvs.Config(), "<b> & co", train_pvs.COUNTED
    train_pvs.write_report(run, *words, [row], {"sub-1": noise})
    assert Page(run.report).titles == ["<b> & co"]


@pytest.fixture
def browser():
    """Debian's Chromium without a screen; skips where it, or selenium, is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync".split():
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


def test_browser_sorts_scans_shows_pictures_and_scrolls_tables_alone(browser, tmp_path):
    run, numbers = train_pvs.Run(tmp_path), {"sub-1": 9, "sub-2": 10, "sub-3": None, "sub-4": 2}
    small = dict.fromkeys(numbers, thumbnail(np.ones((9, 9))))
    usual = dict.fromkeys(train_pvs.COUNTED, 0)
    rows = [{"name": n} | usual | {"volume_ml": ml} for n, ml in numbers.items()]
    cfg = train_pvs.Config(DATA_DIR="/a/very" + "/long" * 40)
    train_pvs.write_report(run, cfg, "page", train_pvs.COUNTED, rows, small)
    browser.get(run.report.as_uri())
    order = "return [...document.querySelectorAll('.scans td:first-child a')].map(a => a.innerText)"
    click = "document.querySelectorAll('.scans button')[2].click()"
    assert browser.execute_script(order) == [*numbers]
    browser.execute_script(click)
    assert browser.execute_script(order) == ["sub-4", "sub-1", "sub-2", "sub-3"]  # none is last
    browser.execute_script(click)
    assert browser.execute_script(order) == ["sub-2", "sub-1", "sub-4", "sub-3"]
    for width in (1300, 400):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    drawn = "return [...document.images].every(image => image.naturalWidth > 0)"
    assert browser.execute_script(drawn)
    assert browser.get_log("browser") == []  # no error, nothing that was not found


def test_tensorboard_reads_the_history_also_of_a_resumed_run(run, data, tmp_path, no_figures):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained(run("--epochs", 3, "--val-every", 2))
    trained(run("--epochs", 4, "--val-every", 2, "--resume"))
    reader = events.EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard"))
    reader.Reload()
    history = json.loads((tmp_path / "out" / "logs" / "training_history.json").read_text())
    assert [row["val_dice"] is None for row in history] == [False, False, True, False]
    for tag, key in {"loss/train": "train_loss", "dice/val": "val_dice", "lr": "lr"}.items():
        read = [(event.step, event.value) for event in reader.Scalars(tag)]
        known = [(row["epoch"], row[key]) for row in history if row[key] is not None]
        np.testing.assert_allclose(read, known, rtol=1e-6)


def test_run_without_tensorboard_says_so_and_goes_on(run, data, monkeypatch, no_figures):
    util, find = train_pvs.importlib.util, train_pvs.importlib.util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda n: None if n == "tensorboard" else find(n))
    status, screen, errors = run()
    assert (status in (0, 1), "TensorBoard     off" in screen) == (True, True), errors

"""report.html: what it holds, that no file name gets out of it, and what its slider does in a browser."""

import base64
import csv
import json
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE, save_image
from test_figures import ScorerStub, make_test_set

import evaluate
import predict
import report
from metrics import METRICS
from scorer import ScoreOptions
from verdict import Thresholds, distribution

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
BROWSER_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--window-size=1200,900")  # fmt: skip
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\"'&.png"


def data_of(page: Path, name="data"):
    """What the page's script reads."""
    html = page.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html)[1])


def make_report(paths, scores, labels=None, size=SIZE):
    """A report of noise."""
    rng = np.random.default_rng(0)
    page = report.Report("widget", (0.0, 1.0), {"start": 0.5})
    for i, (path, score) in enumerate(zip(paths, scores, strict=True)):
        image = rng.integers(0, 256, (size, size, 3), np.uint8)
        anomaly = rng.random((SIZE, SIZE), np.float32)
        label = None if labels is None else labels[i]
        kind = "hole" if label else "good"
        page.add(Path(path), kind, label, score, image, anomaly, {"mask": anomaly > 0.5})
    return page


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The folder of an evaluation."""
    out = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", str(trained.checkpoint), "--datapath", str(trained.data),
                                   "--out", str(out), "--gpu", "cpu"])  # fmt: skip
        evaluate.main()
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def predicted(trained, tmp_path_factory):
    """The folder of a prediction."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["predict.py", str(trained.checkpoint), str(trained.data), "--threshold",
                                   "f1", "--out", str(out), "--gpu", "cpu"])  # fmt: skip
        predict.main()
    return out


def test_a_run_and_an_evaluation_show_metrics_curves_and_every_image(trained, evaluated):
    for folder in (trained.run, evaluated):
        html = (folder / report.FILE).read_text()
        for words in ("Curves", "best F1", "pixel AUROC", "torch", "Settings"):
            assert words in html
        curves = [base64.b64encode((folder / "pictures" / "roc_pro.png").read_bytes()).decode()]
        if folder == trained.run:
            curves.append(base64.b64encode((folder / "pictures" / "curves.png").read_bytes()).decode())
        assert re.findall('<img src="data:image/png;base64,([^"]*)"', html) == curves
        data = data_of(folder / report.FILE)
        assert data["labeled"]
        assert data["template"].startswith("data:image/jpeg")
        tiles = data["tiles"]
        assert {(t["kind"], t["name"]) for t in tiles} == {
            (kind, f"{i:03}.png") for kind in ("good", "hole") for i in range(3)
        }
        assert all((t["kind"] == "hole") == t["defective"] for t in tiles)
        assert [t["score"] for t in tiles] == sorted((t["score"] for t in tiles), reverse=True)
        assert all(list(t["pictures"]) == ["image", "overlay", "map", "ground truth"] for t in tiles)


def test_a_prediction_shows_what_its_table_says(predicted):
    data = data_of(predicted / report.FILE)
    rows = list(csv.DictReader((predicted / "scores.csv").open()))
    assert not data["labeled"]
    assert {(t["name"], f"{t['score']:.6g}") for t in data["tiles"]} == {
        (row["path"], row["score"]) for row in rows
    }
    assert {t["kind"] for t in data["tiles"]} == {"train/good", "test/good", "test/hole", "ground_truth/hole"}
    assert list(data["tiles"][0]["pictures"]) == ["image", "overlay", "map", "mask"]


def test_the_page_asks_for_nothing_outside_it(evaluated, predicted):
    for folder in (evaluated, predicted):
        html = (folder / report.FILE).read_text()
        assert not re.search(r"https?:|//\w+\.\w+/|@import|url\(|<link|<iframe", html)
        assert "default-src 'none'; img-src data:;" in html


def test_names_are_text_and_nothing_else(tmp_path):
    latin = os.fsdecode(b"latin-\xe9.png")
    page = make_report([NASTY, latin], [0.9, 0.1], [True, False])
    page.title = NASTY
    page.save(tmp_path / "report.html", {NASTY: {NASTY: NASTY}}, [NASTY], ([NASTY], [[NASTY, NASTY]]))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("</script>") == html.count("<script") == 3
    assert "<img src=x" not in html
    assert "49" not in re.sub(r"[\w+/=;:,]{60,}", "", html[: html.index("<style")])  # no template in a name
    names = [tile["name"] for tile in data_of(tmp_path / "report.html")["tiles"]]
    assert names == [NASTY, r"latin-\udce9.png"]  # as in scores.csv


def test_labels_of_one_kind_or_no_masks_leave_out_what_is_undefined(tmp_path, monkeypatch):
    for kinds, masks, curves in (
        (["good", "good"], True, False), (["good", "hole"], False, True), (["hole", "hole"], True, True)
    ):  # fmt: skip
        test_set, scored = make_test_set(kinds, masks=masks)
        scorer = ScorerStub(distribution(scored))
        scorer.image_template = lambda *_: None
        scorer.metrics, scorer.settings, scorer.device = {}, {}, torch.device("cpu")
        scorer.options = ScoreOptions()
        rows = [{"epoch": None, "score": "paper", **dict.fromkeys(METRICS)}]
        report.save_evaluation(tmp_path, test_set, scored, scorer, rows, {})
        assert ("Curves" in (tmp_path / "report.html").read_text()) == curves
        assert len(data_of(tmp_path / "report.html")["tiles"]) == 2


def test_an_evaluation_shows_images_as_they_are_and_nothing_outside_of_the_region(tmp_path, monkeypatch):
    """In the proportions of their files, not in those of the network's input."""
    test_set, scored = make_test_set(["good", "hole"])
    for image in test_set.data.test:
        save_image(tmp_path / image.path.name, np.zeros((100, 300, 3), np.uint8))
    test_set.data.test = [replace(x, path=tmp_path / x.path.name) for x in test_set.data.test]
    scorer = ScorerStub(distribution(scored))
    scorer.image_template = lambda *_: None
    scorer.metrics, scorer.settings, scorer.device = {}, {}, torch.device("cpu")
    scorer.options, scorer.roi = ScoreOptions(), torch.zeros_like(scored.maps[0], dtype=torch.bool)
    scorer.roi[10:12] = True
    seen = []
    monkeypatch.setattr(
        report.Report,
        "add",
        lambda self, path, kind, defective, score, image, anomaly, masks: seen.append((image, anomaly)),
    )
    rows = [{"epoch": None, "score": "paper", **dict.fromkeys(METRICS)}]
    report.save_evaluation(tmp_path, test_set, scored, scorer, rows, {})
    assert len(seen) == 2
    for (image, anomaly), whole in zip(seen, scored.maps, strict=True):
        assert image.shape == (53, 160, 3)
        assert np.array_equal(anomaly[10:12], whole[10:12])
        assert (np.delete(anomaly, [10, 11], axis=0) == float(whole.min())).all()


def test_equal_scores_and_a_report_without_images_can_be_drawn(tmp_path):
    make_report(["a", "b"], [0.0, 0.0]).save(tmp_path / "report.html", {})
    data = data_of(tmp_path / "report.html")
    assert data["low"] < data["high"]
    report.Report("x", (0, 1), {"start": 0.0}).save(tmp_path / "report.html", {})
    assert data_of(tmp_path / "report.html")["tiles"] == []


@pytest.mark.parametrize("size", [(256, 256), (3000, 4000)])
def test_small_regions_of_a_mask_do_not_vanish(size):
    mask = np.zeros(size, bool)
    mask[100, 100] = True
    assert report.mask_uri(mask, (40, 40)) != report.mask_uri(np.zeros_like(mask), (40, 40))


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_report(["a"], [0.5]).save(path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_bytes() == b"old"


def test_images_can_be_added_from_several_threads(tmp_path):
    page = report.start_predictions(ScorerWithName(), Thresholds(0.5, 0.5), (0.0, 1.0))
    image, anomaly = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32)
    threads = [
        threading.Thread(target=page.add_prediction, args=(Path(f"{i}"), image, anomaly, i / 9, anomaly > 0.5))
        for i in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page.save(tmp_path / "report.html", {})
    assert [t["name"] for t in data_of(tmp_path / "report.html")["tiles"]] == [*"876543210"]


class ScorerWithName:
    class_name = "widget"


def test_beyond_a_limit_the_highest_scores_have_pictures_and_all_count(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_TILES", 3)
    scores = [0.1, 0.9, 0.5, 0.7, 0.3]
    make_report("abcde", scores).save(tmp_path / "report.html", {})
    tiles = data_of(tmp_path / "report.html")["tiles"]
    assert [t["name"] for t in tiles] == [*"bdcea"]
    assert [t["pictures"] is not None for t in tiles] == [True] * 3 + [False] * 2
    assert "counts are of all 5" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A report of 1,000 labeled images of noise, which compress worst, and the seconds it took."""
    path = tmp_path_factory.mktemp("thousand") / "report.html"
    start = time.perf_counter()
    scores, labels = np.random.default_rng(1).random(1000), [i % 3 == 0 for i in range(1000)]
    page = make_report((f"{i:04}.png" for i in range(1000)), scores.tolist(), labels, size=256)
    page.save(path, {})
    return path, time.perf_counter() - start


def test_a_thousand_images_stay_below_30_mb(thousand):
    path, seconds = thousand
    assert path.stat().st_size < 30e6
    assert seconds < 120  # ten on an idle core
    tiles = data_of(path)["tiles"]
    assert len(tiles) == 1000
    assert all(tile["pictures"] for tile in tiles)


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM.is_file() and DRIVER.is_file()):
        pytest.skip(f"no {CHROMIUM} and {DRIVER} here (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*BROWSER_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # not every window has it
    yield driver
    driver.quit()


class Page:
    """A report in a browser."""

    def __init__(self, browser, path):
        browser.get(path.absolute().as_uri())
        self.run = browser.execute_script
        self.browser = browser
        assert browser.get_log("browser") == []

    def find(self, name):
        return self.browser.find_element("id", name)

    def number(self, name):
        return int(self.find(name).text)

    def set_threshold(self, value):
        """As if typed."""
        self.run("const t = document.getElementById('threshold'); t.value = arguments[0];"
                 "t.dispatchEvent(new Event('change'))", value)  # fmt: skip

    def choose(self, name, label):
        """Choose in a list."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(name)).select_by_visible_text(label)

    def tiles(self):
        """(file name, verdict) of those shown, in order."""
        return self.run(
            "return [...document.querySelectorAll('.tile:not([hidden])')].map(t => "
            "[t.querySelector('bdi').textContent, t.querySelector('.verdict').textContent])"
        )


def test_the_counts_start_at_those_of_scores_csv_and_follow_the_slider(browser, predicted):
    from selenium.webdriver.common.keys import Keys

    rows = list(csv.DictReader((predicted / "scores.csv").open()))
    page = Page(browser, predicted / report.FILE)
    decided = [row["decision"] == "defective" for row in rows]
    assert page.number("called") == sum(decided)
    assert page.number("passed") == len(rows) - sum(decided)
    verdicts = sorted((Path(row["path"]).name, row["decision"]) for row in rows)
    assert sorted(map(tuple, page.tiles())) == verdicts
    slider = page.find("slider")
    slider.send_keys(Keys.HOME)
    assert (page.number("called"), page.number("passed")) == (len(rows), 0)
    slider.send_keys(Keys.END)
    assert (page.number("called"), page.number("passed")) == (0, len(rows))
    for _ in range(3):
        slider.send_keys(Keys.PAGE_DOWN)
        threshold = float(page.run("return threshold"))
        expected = sum(float(row["score"]) >= threshold for row in rows)
        assert page.number("called") == expected
        assert [word for _, word in page.tiles()].count("defective") == expected


def test_precision_recall_and_verdicts_follow_the_threshold(browser, evaluated):
    page = Page(browser, evaluated / report.FILE)
    tiles = data_of(evaluated / report.FILE)["tiles"]
    for threshold in [tile["score"] * (1 - 1e-6) for tile in tiles]:
        page.set_threshold(threshold)
        called = [tile["score"] >= threshold for tile in tiles]
        hits = sum(c and tile["defective"] for c, tile in zip(called, tiles, strict=True))
        assert page.number("called") == sum(called)
        assert page.number("false-alarms") == sum(called) - hits
        assert page.number("missed") == 3 - hits
        assert page.find("precision").text == f"{100 * hits / sum(called):.1f} %"
        assert page.find("recall").text == f"{100 * hits / 3:.1f} %"
        words = {(True, True): "defective", (True, False): "false alarm", (False, True): "missed",
                 (False, False): "good"}  # fmt: skip
        words = [words[c, tile["defective"]] for c, tile in zip(called, tiles, strict=True)]
        assert [word for _, word in page.tiles()] == words


def test_lists_choose_which_images_are_shown_and_in_which_order(browser, evaluated):
    page = Page(browser, evaluated / report.FILE)
    page.choose("kind", "hole")
    assert len(page.tiles()) == 3
    assert page.find("shown").text == "3 of 6 images"
    page.set_threshold(1e9)
    page.choose("verdict", "defective")
    assert page.tiles() == []
    page.choose("verdict", "wrong")
    assert [word for _, word in page.tiles()] == ["missed"] * 3
    page.choose("kind", "all")
    page.choose("verdict", "all")
    names = page.tiles()
    page.choose("order", "lowest score first")
    assert page.tiles() == names[::-1]


def test_a_click_shows_all_pictures_and_the_keyboard_the_next_image(browser, evaluated):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, evaluated / report.FILE)
    tile = page.browser.find_element("css selector", ".tile")
    page.run("arguments[0].focus()", tile)
    focused = page.run("return arguments[0].querySelector('img').src", tile)
    assert focused == data_of(evaluated / report.FILE)["tiles"][0]["pictures"]["overlay"]
    tile.send_keys(Keys.ENTER)
    shown = page.run("return [...document.querySelectorAll('#pictures img')].map(i => [i.alt, i.naturalWidth])")
    assert [name for name, _ in shown] == ["image", "mean template", "overlay", "map", "ground truth"]
    assert all(width > 0 for _, width in shown)
    tiles = data_of(evaluated / report.FILE)["tiles"]
    assert page.find("detail-name").text == tiles[0]["name"]
    page.find("next").send_keys(Keys.ARROW_RIGHT)
    assert page.find("detail-text").text.endswith(("defective", "good", "missed", "false alarm"))
    assert f"{tiles[1]['score']:.4g}" in page.find("detail-text").text
    page.find("close").send_keys(Keys.ESCAPE)
    assert not page.run("return document.getElementById('detail').open")


def test_a_nasty_name_is_shown_and_not_run(browser, tmp_path):
    make_report([NASTY], [0.9]).save(tmp_path / "report.html", {"Settings": {"out": NASTY}})
    page = Page(browser, tmp_path / "report.html")
    shown = page.run("return document.querySelector('.tile bdi').title")
    assert shown == NASTY
    assert page.run("return document.querySelectorAll('img[onerror]').length") == 0


def test_a_thousand_images_are_smooth_and_fit_a_phone(browser, thousand):
    page = Page(browser, thousand[0])
    milliseconds = page.run(
        "const s = document.getElementById('slider'), start = performance.now();"
        "for (let i = 0; i < 100; i++) { s.value = 10 * i; s.dispatchEvent(new Event('input'));"
        "document.getElementById('gallery').offsetHeight; } return (performance.now() - start) / 100"
    )
    assert milliseconds < 200  # a few on an idle core
    loaded = page.run("return [...document.querySelectorAll('.tile img')].filter(i => i.src).length")
    assert loaded < 500  # those in sight and near
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True})  # fmt: skip
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

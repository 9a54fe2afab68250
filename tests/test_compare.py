"""compare.py: its numbers, its tables, and its page in a browser."""
import os
import re
import shutil
import sys

import numpy as np
import pytest
from scipy import stats

from scripts import compare
from browser import Browser
from conftest import ROOT
from harness.runs import SPEEDRUN, Run, make_groups
from sample_runs import SHARD, facts, lines, run_of, write


def compared(*runs, baseline=None, target=1.0):
    return compare.compare(make_groups(list(runs)), baseline, target)


# numbers


def test_difference_is_welchs_test():
    old, new = [0.90, 0.93, 0.89, 0.91], [0.85, 0.88, 0.86]
    runs = [run_of(final, 10 + i, seed=i) for i, final in enumerate(old)]
    runs += [run_of(final, 11 + i, seed=i, optimizer="newton_muon") for i, final in enumerate(new)]
    newton, muon = compared(*runs)
    assert (newton.label, muon.label, muon.loss_change.mean) == ("newton_muon", "muon", None)
    va, vb = np.var(new, ddof=1) / 3, np.var(old, ddof=1) / 4
    df = (va + vb) ** 2 / (va ** 2 / 2 + vb ** 2 / 3)
    mean, half = np.mean(new) - np.mean(old), stats.t.ppf(0.975, df) * (va + vb) ** 0.5
    change = newton.loss_change
    assert (change.mean, change.low, change.high) == pytest.approx((mean, mean - half, mean + half))
    assert change.p == pytest.approx(stats.t.cdf(mean / (va + vb) ** 0.5, df))
    assert newton.step_change.mean == pytest.approx((11 * 12 * 13) ** (1 / 3) / (10 * 11 * 12 * 13) ** (1 / 4) - 1)
    assert newton.tokens == 25600 and newton.seconds.mean == 12


def test_diverged_run_is_shown(tmp_path, call):
    for seed, final in enumerate((0.8, 0.81, 0.82, float("nan"))):
        write(tmp_path / f"muon_{seed}", final, seed=seed)
    write(tmp_path / "adamw", 0.9, optimizer="adamw")
    done = call(compare, tmp_path)
    assert done.returncode == 0 and re.search(r"^adamw +adamw .*^muon_3 +muon +100 +nan", done.stdout, re.MULTILINE | re.DOTALL)
    assert re.search(r"^muon +4 +n/a +n/a .* no: muon_3 diverged: its loss", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("n, test", [(4, "z-test, sd 0.0013"), (5, "t-test")])
def test_rules_of_the_speedrun(n, test):
    finals = [3.27 + i / 1e4 for i in range(n)]
    config = {**SPEEDRUN, "val": {**SHARD, "name": "fineweb_val_000000.bin"}}
    [summary] = compared(*(run_of(final, seed=i, **config) for i, final in enumerate(finals)), target=3.28)
    assert summary.record.valid and test in summary.record.verdict and "margin" in summary.record.verdict
    for target, fields in ((3.28, {}), (3.29, config)):  # another model, another target
        [other] = compared(*(run_of(final, seed=i, **fields) for i, final in enumerate(finals)), target=target)
        assert "margin" not in other.record.verdict


def test_run_that_stopped_at_the_target():
    [summary] = compared(run_of(0.9, planned=200, stop_at_target=True))
    assert summary.crossings == [pytest.approx((100 / 1.1, 10 / 1.1))]
    assert not summary.record.valid and "prove nothing" in summary.record.verdict


# the command


def test_three_single_runs(tmp_path, call):
    for name, final in (("muon", 0.9), ("newton_muon", 0.85), ("adamw", 1.1)):
        write(tmp_path / name, final, optimizer=name)
    done = call(compare, tmp_path, "--png", tmp_path / "p" / "a.png")
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 25 and max(map(len, done.stdout.splitlines())) < 130
    assert re.search(r"^muon +muon +100 +0\.9000 +10\.0 +100\.0 +91 +9\.1$", done.stdout, re.MULTILINE)
    assert re.search(r"^adamw +adamw +100 +1\.1000 +10\.0 +100\.0 +never +never$", done.stdout, re.MULTILINE)
    assert re.search(r"^adamw +1 +100 +1\.1000 .* no: the mean is above the target", done.stdout, re.MULTILINE)
    assert re.search(r"^newton_muon +100 +-0\.0500 +n/a +n/a +\+0\.0%", done.stdout, re.MULTILINE)
    assert (tmp_path / "p" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_long_labels_fit(tmp_path, call):
    names = ("hidden_learning_rate", "learning_rate", "weight_decay", "momentum", "num_iterations", "refresh_interval")
    for i in range(4):
        write(tmp_path / f"a_long_name_of_a_run_{i}", 0.9 - i / 100, 1e5 + i, seed=i, **dict.fromkeys(names, 123456 + i // 2))
    done = call(compare, tmp_path)
    assert done.returncode == 0 and "refresh_interval=123457" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 130


def test_notes(tmp_path, call):
    write(tmp_path / "a")
    write(tmp_path / "b", 0.91, json_of={**facts(target_val_loss=1.5), "machine": dict(gpu="H100")})
    shutil.copy(tmp_path / "a/log.txt", tmp_path / "terminal.log")
    (tmp_path / "c.txt").write_text(lines([0, 100], [0.99, 0.8], [0, 10]))
    (tmp_path / "d.txt").write_text(lines([0, 50, 100], [1.9, 1.8, 1.7], [0, 10, -1]))
    (tmp_path / "notes.txt").write_text("nothing\n")
    text = " ".join(call(compare, tmp_path, "--target", 1).stdout.split())
    for words in ("several runs of one seed", "different machines (1 x 1 threads of c; 1 x H100)", "2 of 4 runs have no run.json",
                  "1 of 4 runs have no training times, or some that run backwards: these are not used",
                  "copies of runs left out: 1", "saw the data in one order",
                  "1 of 4 runs are at the target in their first evaluation", "without evaluations: 1 (notes.txt)"):
        assert words in text


def test_hostile_names(tmp_path, call):
    for i, name in enumerate(("$\\frac$", "_\udcff\x1b[2J", "a|<b>\n")):  # the second is no UTF-8
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(lines([0, 100], [2.0, 0.9 + i / 10], [0, 10]))
    done = call(compare, tmp_path, "--png", tmp_path / "a.png", "--html", tmp_path / "a.html")
    assert done.returncode == 0 and "$\\frac$" in done.stdout and "\x1b" not in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 10 ** 4


def test_a_terminal_without_unicode(tmp_path, launch):
    write(tmp_path / "a", optimizer="\u00b5on")
    resumable = "from harness.command import command; command()(lambda: print('\\u00b5on'))()"
    for command in ((ROOT / "scripts/compare.py", tmp_path), ("-c", resumable)):
        out, errors = launch(sys.executable, *command, env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ROOT}).communicate()
        assert "\\xb5on" in out and errors == ""


def test_files_survive_a_broken_pipe(tmp_path, call, monkeypatch):
    """As `compare.py ... --html FILE | head -1`."""
    def gone(rows):
        raise BrokenPipeError(32, "Broken pipe")
    write(tmp_path / "a")
    monkeypatch.setattr(compare, "plain", gone)
    assert "the output: Broken pipe" in call(compare, tmp_path, "--html", tmp_path / "a.html", "--png", tmp_path / "a.png").stderr
    assert "</html>" in (tmp_path / "a.html").read_text() and (tmp_path / "a.png").stat().st_size > 10 ** 4


def test_plot_of_many_groups_and_long_labels(tmp_path, recwarn):
    summaries = compared(*(run_of(1.9, optimizer=f"{i}" * 100) for i in range(10, 40)))
    compare.plot(summaries, 1.0, tmp_path / "a.svg")
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    assert (tmp_path / "a.svg").read_text().count("target 1") == 1


@pytest.mark.parametrize("arguments, words", [
    (["missing"], ["missing", "No such file"]), (["empty"], ["no log.txt"]), (["binary.pt"], ["binary.pt", "no line such as"]),
    (["a", "--baseline", "muno"], ["'muno'", "nearest is 'muon'"]), (["a", "--target", "nan"], ["--target nan"]),
    (["a", "--html", "binary.pt/x.html"], ["binary.pt"]), (["broken"], ["run.json", "cannot be read"]),
    (["a", "--at_step", "x"], ["GROUP=STEP"]), (["a", "--loss", "val_ema_loss"], ["--loss could be val_loss"]),
    (["comma.txt"], ["no line such as 'step:125/6200 val_loss:5.2017 train_time:24564ms'; is it the log of a run?"]),
    (["a", "--at_step", "50"], ["no group has a result", "no evaluation at step 50"]),
    (["log.html", "--html", "log.html"], ["not be that of a log"]), (["a", "--png", "a/log.txt"], ["must end in .png"]),
    (["a", "b"], ["targets (1.0, 1.5); choose one with --target"])])
def test_errors_are_sentences(tmp_path, call, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "b", target_val_loss=1.5)
    (write(tmp_path / "broken") / "run.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "comma.txt").write_text(lines([0, 100], ["2.0,", "0.9,"], [0, 10]))
    (tmp_path / "binary.pt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "log.html").write_text(lines([0, 100], [2.0, 0.9], [0, 10]))
    before = (tmp_path / "a/log.txt").read_text(), (tmp_path / "log.html").read_text()
    done = call(compare, *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") <= 1
    assert all(word in done.stderr for word in words), done.stderr
    assert before == ((tmp_path / "a/log.txt").read_text(), (tmp_path / "log.html").read_text())


# the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two groups: muon, twice, and one of a hostile name."""
    runs = [Run(name, facts(optimizer=name), list(range(0, 101, 10)), [5.0, *np.linspace(2, final, 10)],
                list(np.linspace(0, seconds, 11)), 100)
            for name, final, seconds in (("muon", 0.9, 10.0), ("muon", 0.92, 11.0), ("</script><b>x", 0.8, 12.0))]
    summaries = compared(*runs, baseline="muon")
    path = tmp_path_factory.mktemp("page") / "page.html"
    compare.write_html(summaries, 1.0, compare.tables(summaries, "muon", 1.0), ["a note"], path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    binary = next(filter(None, found), None)
    if not binary:
        pytest.skip("no Chromium: install one (Debian: apt-get install chromium) or set the environment variable CHROMIUM to one")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


PATHS = "[...document.querySelectorAll('path.run')].map(p => p.getAttribute('d'))"
CONTROL, GROUP = ("document.querySelectorAll('#%s button')[{}]" % name for name in ("controls", "legend"))


@pytest.mark.parametrize("width, height, scheme", [(390, 844, "dark"), (1280, 900, "light")])
def test_page_and_its_toggles(page, browser, width, height, scheme):
    browser.open(page, width, height, scheme)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.querySelectorAll('table').length") == 4
    assert browser.js("document.querySelectorAll('b').length") == 2  # those of the legend, none from a name
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    bad = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert bad == [] and requests == [page.as_uri()]
    before = browser.js(PATHS)
    assert len(before) == 3
    for i in range(4):
        browser.press(CONTROL.format(i))
        assert browser.js(f"{CONTROL.format(i)}.ariaPressed") == "true"
        assert browser.js(PATHS) != before
        browser.press(CONTROL.format(i))
        assert browser.js(PATHS) == before  # pressed twice: as it was
    for i in range(4):
        browser.press(CONTROL.format(i))
    paths = browser.js(PATHS)
    assert len(paths) == 3 and not any("NaN" in d or "Infinity" in d for d in paths)


@pytest.mark.parametrize("steps, losses, paths, circles", [
    ([100], [1.0], 0, 1), ([0, 100], [1.0, float("nan")], 0, 1), ([100], [float("nan")], 0, 0), ([0, 100], [-1.0, -2.0], 1, 0),
    (list(range(150_000)), [1.0] * 150_000, 1, 0)])
def test_page_of_an_odd_run(browser, tmp_path, steps, losses, paths, circles):
    groups = make_groups([Run("a" * 200, facts(optimizer="b" * 200), steps, losses, [1.0 + step for step in steps], steps[-1])])
    compare.write_html(compare.compare(groups, None, 1.0), 1.0, [("t" * 200, [["group"], ["b" * 200]], "")], [], tmp_path / "a.html")
    browser.open(tmp_path / "a.html", 390, 844)
    for i in (0, 2, 3):
        assert [browser.js(f"document.querySelectorAll('{kind}').length") for kind in ("path.run", "#chart circle")] == [paths, circles]
        browser.press(CONTROL.format(i))
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.js("document.querySelectorAll('#chart text').length") > 4
    bad = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert bad == [] and "NaN" not in browser.js("document.querySelector('#chart').outerHTML")


def test_name_hides_its_group(page, browser):
    browser.open(page, 390, 844)
    assert browser.js(f"{GROUP.format(1)}.textContent") == "muon (2 runs)"
    browser.press(GROUP.format(1))
    assert len(browser.js(PATHS)) == 1 and browser.js(f"{GROUP.format(1)}.ariaPressed") == "false"
    browser.press(GROUP.format(1))
    assert len(browser.js(PATHS)) == 3


def test_touch_reads_losses(page, browser):
    browser.open(page, 390, 844)
    _, y = browser.centre("document.querySelector('#chart')")
    browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=390 - 16 - 14, y=y)])  # right end: step 100
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert browser.js("document.querySelector('#at').textContent") == "Mean loss of each group at step 100:"
    assert browser.js("[...document.querySelectorAll('#legend b')].map(b => b.textContent)") == ["0.8000", "0.9100"]


def test_mouse_reads_seconds(page, browser):
    browser.open(page, 1280, 900)
    browser.press(CONTROL.format(0))
    x, y = browser.centre("document.querySelector('#chart')")
    start = browser.js("document.querySelector('#chart').getBoundingClientRect().x")
    left, right = start + 44, 2 * x - start - 14  # where 0 and 12 s are; 9.9 s is an evaluation of the second run
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=left + (right - left) * 9.9 / 12, y=y)
    assert browser.js("document.querySelector('#at').textContent") == "Mean loss of each group at second 9.9:"
    slope = (2 - 0.9) / 9
    first = 0.9 + slope * 0.1  # 0.1 s, a tenth of the time between two evaluations, before its end at 10 s
    second = 0.92 + (2 - 0.92) / 9
    assert browser.js("document.querySelectorAll('#legend b')[1].textContent") == f"{(first + second) / 2:.4f}"

"""compare.py: its numbers, its tables, its pictures, and its page in a browser."""
import json
import os
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from scripts import compare
from browser import Browser
from conftest import ROOT, fork
from harness import pictures
from harness.runs import SPEEDRUN, Run, make_groups
from sample_runs import SHARD, facts, lines, run_of, write


def compared(*runs, baseline=None, target=1.0):
    return compare.compare(make_groups(list(runs)), baseline, target)


# numbers


def test_difference_is_welchs_test():
    old = [0.90, 0.93, 0.89, 0.91]
    new = [0.85, 0.88, 0.86]
    runs = [run_of(final, 10 + i, seed=i) for i, final in enumerate(old)]
    runs += [run_of(final, 11 + i, seed=i, optimizer="newton_muon") for i, final in enumerate(new)]
    newton, muon = compared(*runs)
    assert (newton.label, muon.label, muon.loss_change.mean) == ("newton_muon", "muon", None)
    va = np.var(new, ddof=1) / 3
    vb = np.var(old, ddof=1) / 4
    df = (va + vb) ** 2 / (va ** 2 / 2 + vb ** 2 / 3)
    mean = np.mean(new) - np.mean(old)
    half = stats.t.ppf(0.975, df) * (va + vb) ** 0.5
    change = newton.loss_change
    assert (change.mean, change.low, change.high) == pytest.approx((mean, mean - half, mean + half))
    assert change.p == pytest.approx(stats.t.cdf(mean / (va + vb) ** 0.5, df))
    ratio = (11 * 12 * 13) ** (1 / 3) / (10 * 11 * 12 * 13) ** (1 / 4)
    assert newton.step_change.mean == pytest.approx(ratio - 1)
    assert newton.tokens == 25600
    assert newton.seconds.mean == 12


def test_diverged_run_is_shown(tmp_path, call):
    for seed, final in enumerate((0.8, 0.81, 0.82, float("nan"))):
        write(tmp_path / f"muon_{seed}", final, seed=seed)
    write(tmp_path / "adamw", 0.9, optimizer="adamw")
    done = call(compare, tmp_path)
    assert done.returncode == 0
    assert re.search(r"^adamw +adamw .*^muon_3 +muon +100 +nan", done.stdout, re.MULTILINE | re.DOTALL)
    assert re.search(r"^muon +4 +n/a +n/a .* no: muon_3 diverged: its loss", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("n, test", [(4, "z-test, sd 0.0013"), (5, "t-test")])
def test_rules_of_the_speedrun(n, test):
    finals = [3.27 + i / 1e4 for i in range(n)]
    config = {**SPEEDRUN, "val": {**SHARD, "name": "fineweb_val_000000.bin"}}
    runs = [run_of(final, seed=i, **config) for i, final in enumerate(finals)]
    [summary] = compared(*runs, target=3.28)
    assert summary.record.valid
    assert test in summary.record.verdict
    assert "margin" in summary.record.verdict
    for target, fields in ((3.28, {}), (3.29, config)):  # another model, another target
        runs = [run_of(final, seed=i, **fields) for i, final in enumerate(finals)]
        [other] = compared(*runs, target=target)
        assert "margin" not in other.record.verdict


def test_run_that_stopped_at_the_target():
    [summary] = compared(run_of(0.9, planned=200, stop_at_target=True))
    assert summary.crossings == [pytest.approx((100 / 1.1, 10 / 1.1))]
    assert not summary.record.valid
    assert "prove nothing" in summary.record.verdict


# the command


def test_three_single_runs(tmp_path, call):
    for name, final in (("muon", 0.9), ("newton_muon", 0.85), ("adamw", 1.1)):
        write(tmp_path / name, final, optimizer=name)
    folder = tmp_path / "p"
    done = call(compare, tmp_path, "--png", folder / "a.png", "--readme_png", folder / "b.png")
    printed = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(printed) < 26
    assert max(map(len, printed)) < 130
    for pattern in (r"^muon +muon +100 +0\.9000 +10\.0 +100\.0 +91 +9\.1$",
                    r"^adamw +adamw +100 +1\.1000 +10\.0 +100\.0 +never +never$",
                    r"^adamw +1 +100 +1\.1000 .* no: the mean is above the target",
                    r"^newton_muon +100 +-0\.0500 +n/a +n/a +\+0\.0%"):
        assert re.search(pattern, done.stdout, re.MULTILINE), pattern
    for name in ("a.png", "b.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_long_labels_fit(tmp_path, call):
    names = ("hidden_learning_rate", "learning_rate", "weight_decay", "momentum", "num_iterations",
             "refresh_interval")
    for i in range(4):
        values = dict.fromkeys(names, 123456 + i // 2)
        write(tmp_path / f"a_long_name_of_a_run_{i}", 0.9 - i / 100, 1e5 + i, seed=i, **values)
    done = call(compare, tmp_path)
    assert done.returncode == 0
    assert "refresh_interval=123457" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 130


def test_notes(tmp_path, call):
    write(tmp_path / "a")
    write(tmp_path / "b", 0.91, json_of={**facts(target_val_loss=1.5), "machine": dict(gpu="H100")})
    shutil.copy(tmp_path / "a/log.txt", tmp_path / "terminal.log")
    (tmp_path / "c.txt").write_text(lines([0, 100], [0.99, 0.8], [0, 10]))
    (tmp_path / "d.txt").write_text(lines([0, 50, 100], [1.9, 1.8, 1.7], [0, 10, -1]))
    (tmp_path / "notes.txt").write_text("nothing\n")
    text = " ".join(call(compare, tmp_path, "--target", 1).stdout.split())
    for words in ("several runs of one seed", "different machines (1 x 1 threads of c; 1 x H100)",
                  "2 of 4 runs have no run.json",
                  "1 of 4 runs have no training times, or some that run backwards: these are not used",
                  "copies of runs left out: 1", "saw the data in one order",
                  "1 of 4 runs are at the target in their first evaluation",
                  "without evaluations: 1 (notes.txt)"):
        assert words in text


def test_hostile_names(tmp_path, call):
    for i, name in enumerate(("$\\frac$", "_\udcff\x1b[2J", "a|<b>\n")):  # the second is no UTF-8
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(lines([0, 100], [2.0, 0.9 + i / 10], [0, 10]))
    outputs = ("--png", tmp_path / "a.png", "--readme_png", tmp_path / "b.png", "--html", tmp_path / "a.html")
    done = call(compare, tmp_path, *outputs)
    assert done.returncode == 0
    assert "$\\frac$" in done.stdout
    assert "\x1b" not in done.stdout
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).stat().st_size > 10 ** 4


def test_a_terminal_without_unicode(tmp_path):
    write(tmp_path / "a", optimizer="\u00b5on")
    resumable = "from harness.command import command; command()(lambda: print('\\u00b5on'))()"
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    for command in ((ROOT / "scripts/compare.py", tmp_path), ("-c", resumable)):
        done = fork(*command, env=ascii_only)
        assert "\\xb5on" in done.stdout
        assert done.stderr == ""


def test_files_survive_a_broken_pipe(tmp_path, call, monkeypatch):
    """As `compare.py ... --html FILE | head -1`."""
    def gone(rows):
        raise BrokenPipeError(32, "Broken pipe")
    write(tmp_path / "a")
    monkeypatch.setattr(compare, "plain", gone)
    done = call(compare, tmp_path, "--html", tmp_path / "a.html", "--png", tmp_path / "a.png")
    assert "the output: Broken pipe" in done.stderr
    assert "</html>" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.png").stat().st_size > 10 ** 4


@pytest.mark.parametrize("arguments, words", [
    (["missing"], ["missing", "No such file"]),
    (["empty"], ["no log.txt"]),
    (["binary.pt"], ["binary.pt", "no line such as"]),
    (["a", "--baseline", "muno"], ["'muno'", "nearest is 'muon'"]),
    (["a", "--target", "nan"], ["--target nan"]),
    (["a", "--html", "binary.pt/x.html"], ["binary.pt"]),
    (["broken"], ["run.json", "cannot be read"]),
    (["a", "--at_step", "x"], ["GROUP=STEP"]),
    (["a", "--loss", "val_ema_loss"], ["--loss could be val_loss"]),
    (["comma.txt"], ["no line such as 'step:125/6200 val_loss:5.2017 train_time:24564ms'; "
                     "is it the log of a run?"]),
    (["a", "--at_step", "50"], ["no group has a result", "no evaluation at step 50"]),
    (["log.html", "--html", "log.html"], ["not be that of a log"]),
    (["a", "--png", "a/log.txt"], ["must end in .png"]),
    (["a", "--readme_png", "a/log.txt"], ["must end in .png"]),
    (["a", "b"], ["targets (1.0, 1.5); choose one with --target"]),
])
def test_errors_are_sentences(tmp_path, call, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    write(tmp_path / "b", target_val_loss=1.5)
    (write(tmp_path / "broken") / "run.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "comma.txt").write_text(lines([0, 100], ["2.0,", "0.9,"], [0, 10]))
    (tmp_path / "binary.pt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "log.html").write_text(lines([0, 100], [2.0, 0.9], [0, 10]))
    logs = [tmp_path / "a/log.txt", tmp_path / "log.html"]
    before = [log.read_text() for log in logs]
    done = call(compare, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") <= 1
    assert all(word in done.stderr for word in words), done.stderr
    assert before == [log.read_text() for log in logs]


# names and curves of the pictures


def labels_of(*runs):
    return pictures.short_labels(make_groups(list(runs)))


def test_labels_have_only_what_tells_groups_apart():
    newton = dict(optimizer="newton_muon", num_iterations=100, warmdown_iters=30, momentum=0.9)
    labels = labels_of(run_of(0.80, **newton),
                       run_of(0.81, **{**newton, "num_iterations": 94, "warmdown_iters": 28}),
                       run_of(0.82, **{**newton, "momentum": 0.95}),
                       run_of(0.83, optimizer="muon", learning_rate=0.02),
                       run_of(0.84, optimizer="muon", learning_rate=0.01),
                       run_of(0.85, optimizer="optimizers.lion:Lion"))
    assert labels == ["Newton-Muon, 100 steps, momentum 0.9", "Newton-Muon, 94 steps, momentum 0.9",
                      "Newton-Muon, 100 steps, momentum 0.95", "Muon, lr 0.02", "Muon, lr 0.01", "Lion"]


def test_classes_of_one_name_are_told_apart():
    assert labels_of(run_of(0.8), run_of(0.9, optimizer="torch.optim:Muon")) == ["muon", "torch.optim:Muon"]


def test_an_optimizer_looks_the_same_in_every_picture():
    muon, adamw = run_of(0.8), run_of(0.9, optimizer="adamw")
    alone = pictures.group_styles(make_groups([muon]))[0]
    beside = pictures.group_styles(make_groups([adamw, muon, run_of(0.7, optimizer="a:B")]))[1]
    for key in ("color", "linestyle"):
        assert alone[key] == beside[key]


def test_groups_of_one_optimizer_differ():
    runs = [run_of(0.8 + i / 10, learning_rate=0.01 * i) for i in range(4)]
    styles = pictures.group_styles(make_groups(runs))
    assert len({style["color"] for style in styles}) == 4
    assert len({style["marker"] for style in styles}) == 4


def run_at(steps, losses, seconds=None, **config):
    seconds = [float(step) for step in steps] if seconds is None else seconds
    return Run("r", facts(**config), list(steps), list(losses), list(seconds), steps[-1])


def test_mean_curve_is_the_mean_with_students_interval():
    finals = [0.9, 0.95, 0.85]
    curve = pictures.mean_curve([run_at([0, 10], [2.0, final]) for final in finals])
    half = stats.t.ppf(0.975, 2) * stats.sem(finals)
    assert curve.steps.tolist() == [0, 10]
    assert curve.mean == pytest.approx([2.0, 0.9])
    assert curve.low[1] == pytest.approx(0.9 - half)
    assert curve.high[1] == pytest.approx(0.9 + half)


def test_mean_curve_of_runs_evaluated_at_different_steps():
    curve = pictures.mean_curve([run_at([0, 10], [2.0, 1.0]), run_at([0, 5, 10], [2.0, 1.0, 0.8])])
    assert curve.steps.tolist() == [0, 5, 10]
    assert curve.mean == pytest.approx([2.0, (1.5 + 1.0) / 2, 0.9])


def test_mean_curve_counts_a_diverged_run_until_then():
    curve = pictures.mean_curve([run_at([0, 5, 10], [2.0, 1.5, 1.0]), run_at([0, 5, 10], [2.0, 1.7, np.nan])])
    assert curve.mean == pytest.approx([2.0, 1.6, 1.0])
    assert np.isnan(curve.low[2])  # a single run has no interval
    assert pictures.mean_curve([run_at([0, 5], [np.nan, np.inf])]) is None


def test_one_halted_run_does_not_set_the_scale_of_time():
    times = [[0.0, 100.0], [0.0, 104.0], [0.0, 1026.0]]
    runs = [run_at([0, 100], [2.0, 0.9], seconds, seed=i) for i, seconds in enumerate(times)]
    assert pictures.mean_curve(runs).seconds.tolist() == [0, 104]
    assert pictures.longest_time(make_groups(runs)) == 104


def test_thinned_curve_keeps_first_last_best_and_extremes():
    losses = np.linspace(4, 3, 900_000)
    losses[123_456] = 2.5  # the best
    losses[500_001] = 9.0
    losses[700_001] = np.nan
    kept = pictures.thinned(losses)
    assert len(kept) <= pictures.POINTS + 3
    assert np.all(np.diff(kept) > 0)
    assert {0, 123_456, 500_001, len(losses) - 1} <= set(kept.tolist())
    drawn = np.interp(np.arange(len(losses)), kept, losses[kept])
    assert np.nanmax(np.abs(drawn - losses)[:100_000]) < 0.01


def test_short_curves_are_not_thinned():
    assert pictures.thinned([3.0, np.nan, 1.0, 2.0]).tolist() == [0, 1, 2, 3]


def test_page_of_a_long_log_is_small(tmp_path):
    steps = list(range(900_000))
    run = run_at(steps, np.linspace(4, 0.5, len(steps)).tolist())
    summaries = compared(run)
    compare.write_html(summaries, 1.0, [], [], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert len(text) < 200_000
    data = json.loads(re.search(r"^const data = (.*)$", text, re.MULTILINE)[1])
    [drawn] = data["groups"][0]["runs"]
    for name, values in (("steps", run.steps), ("losses", run.losses), ("seconds", run.seconds)):
        assert (drawn[name][0], drawn[name][-1]) == (values[0], values[-1])
    assert "1 of 1 runs were thinned to about 1,000 points" in data["notes"][0]


# the pictures


def texts_of(svg):
    """The texts of an SVG picture, which matplotlib writes as comments beside their glyphs."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_plot_of_many_groups_and_long_labels(tmp_path, recwarn):
    summaries = compared(*(run_of(1.9, optimizer=f"{i}" * 100) for i in range(10, 40)))
    compare.plot(summaries, 1.0, tmp_path / "a.svg")
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    assert (tmp_path / "a.svg").read_text().count("target 1") == 1


def test_plot_says_what_is_beyond_its_scales(tmp_path):
    finals = {"muon": (0.80, 0.81, 0.82), "newton_muon": (0.79, 0.80, 0.81), "adamw": (1.6, 1.61, 1.62)}
    runs = []
    for optimizer, losses in finals.items():
        for seed, final in enumerate(losses):
            slow = optimizer == "muon" and seed == 2
            runs.append(run_of(final, 1026.0 if slow else 10.0 + seed, seed=seed, optimizer=optimizer))
    compare.plot(compared(*runs), 1.0, tmp_path / "a.svg")
    texts = texts_of(tmp_path / "a.svg")
    assert "loss against time (▸ 1 run beyond it, to 1026 s)" in texts
    assert "the end (above it: AdamW)" in texts
    assert "Newton-Muon (3 runs)" in texts


def test_plot_of_a_diverged_run(tmp_path):
    runs = [run_of(0.8 if seed else float("nan"), seed=seed) for seed in range(3)]
    compare.plot(compared(*runs), 1.0, tmp_path / "a.svg")
    assert "Muon (3 runs, 1 diverged)" in texts_of(tmp_path / "a.svg")


@pytest.mark.parametrize("losses, seconds", [
    ([float("nan"), float("nan")], [0.0, 10.0]), ([2.0, 0.9], [0.0, float("nan")]),
    ([-1.0, -2.0], [0.0, 0.0]), ([1.0, 1.0], [0.0, 1.0])])
def test_plot_of_odd_runs(tmp_path, losses, seconds):
    compare.plot(compared(run_at([0, 100], losses, seconds)), 1.0, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("ending", compare.PLOTS)
def test_the_same_plot_has_the_same_bytes(tmp_path, ending):
    summaries = compared(run_of(0.8), run_of(0.9, optimizer="adamw"))
    for draw in (compare.plot, compare.plot_for_readme):
        written = []
        for name in "ab":
            draw(summaries, 1.0, tmp_path / (name + ending))
            written.append((tmp_path / (name + ending)).read_bytes())
        assert written[0] == written[1]


def test_readme_picture_names_its_lines(tmp_path):
    finals = {"muon": 0.82, "newton_muon": 0.80, "adamw": 1.6}
    runs = [run_of(final, optimizer=name) for name, final in finals.items()]
    compare.plot_for_readme(compared(*runs), 1.0, tmp_path / "a.svg")
    texts = texts_of(tmp_path / "a.svg")
    assert [texts.count(name) for name in ("Muon", "Newton-Muon", "AdamW")] == [2, 2, 2]
    assert {"0.820", "0.800", "1.600 ↑"} <= set(texts)  # the last is above the zoom


# the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two groups: muon, twice, and one of a hostile name."""
    runs = []
    for name, final, seconds in (("muon", 0.9, 10.0), ("muon", 0.92, 11.0), ("</script><b>x", 0.8, 12.0)):
        losses = [5.0, *np.linspace(2, final, 10)]
        times = list(np.linspace(0, seconds, 11))
        runs.append(Run(name, facts(optimizer=name), list(range(0, 101, 10)), losses, times, 100))
    summaries = compared(*runs, baseline="muon")
    path = tmp_path_factory.mktemp("page") / "page.html"
    compare.write_html(summaries, 1.0, compare.tables(summaries, "muon", 1.0), ["a note"], path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, names)]), None)
    if not binary:
        pytest.skip("no Chromium: install one (Debian: apt-get install chromium) "
                    "or set the environment variable CHROMIUM to one")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


PATHS = "[...document.querySelectorAll('path.%s')].map(p => p.getAttribute('d'))"
MEANS = PATHS % "mean"
BANDS = PATHS % "band"
RUNS = PATHS % "run"
CONTROL = "document.querySelectorAll('#controls button')[{}]"
GROUP = "document.querySelectorAll('#legend button')[{}]"
SECONDS, LOG_X, LOG_LOSS, FROM_THE_START, THE_END, SINGLE_RUNS = range(6)


def complaints(browser, *more):
    """What the browser logged since the page was opened."""
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", *more)
    return [event for event in browser.events if event["method"] in kinds]


@pytest.mark.parametrize("width, height, scheme", [(390, 844, "dark"), (1280, 900, "light")])
def test_page_and_its_toggles(page, browser, width, height, scheme):
    browser.open(page, width, height, scheme)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.querySelectorAll('table').length") == 4
    assert browser.js("document.querySelectorAll('b').length") == 2  # those of the legend, none from a name
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    requests = [event["params"]["request"]["url"] for event in browser.events
                if event["method"] == "Network.requestWillBeSent"]
    assert complaints(browser, "Runtime.consoleAPICalled") == []
    assert requests == [page.as_uri()]
    before = browser.js(MEANS)
    assert len(before) == 2
    assert len(browser.js(BANDS)) == 1  # a group of one run has none
    for control in (SECONDS, LOG_X, LOG_LOSS, FROM_THE_START, THE_END):
        browser.press(CONTROL.format(control))
        assert browser.js(f"{CONTROL.format(control)}.ariaPressed") == "true"
        assert browser.js(MEANS) != before
        browser.press(CONTROL.format(control))
        assert browser.js(MEANS) == before  # pressed twice: as it was
    for control in range(6):
        browser.press(CONTROL.format(control))
    paths = browser.js(MEANS) + browser.js(BANDS) + browser.js(RUNS)
    assert len(paths) == 2 + 1 + 3
    assert not any("NaN" in d or "Infinity" in d for d in paths)


def test_single_runs_on_demand(page, browser):
    browser.open(page, 1280, 900)
    assert browser.js(RUNS) == []
    browser.press(CONTROL.format(SINGLE_RUNS))
    assert len(browser.js(RUNS)) == 3
    assert len(browser.js(MEANS)) == 2
    browser.press(CONTROL.format(SINGLE_RUNS))
    assert browser.js(RUNS) == []


@pytest.mark.parametrize("steps, losses, paths, circles", [
    ([100], [1.0], 0, 1), ([0, 100], [1.0, float("nan")], 0, 1), ([100], [float("nan")], 0, 0),
    ([0, 100], [-1.0, -2.0], 1, 0), (list(range(150_000)), [1.0] * 150_000, 1, 0)])
def test_page_of_an_odd_run(browser, tmp_path, steps, losses, paths, circles):
    seconds = [1.0 + step for step in steps]
    run = Run("a" * 200, facts(optimizer="b" * 200), steps, losses, seconds, steps[-1])
    table = ("t" * 200, [["group"], ["b" * 200]], "")
    compare.write_html(compared(run), 1.0, [table], [], tmp_path / "a.html")
    browser.open(tmp_path / "a.html", 390, 844)
    for control in (SECONDS, LOG_LOSS, FROM_THE_START):
        counts = [browser.js(f"document.querySelectorAll('{kind}').length")
                  for kind in ("path.mean", "#chart circle")]
        assert counts == [paths, circles]
        browser.press(CONTROL.format(control))
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.js("document.querySelectorAll('#chart text').length") > 4
    assert complaints(browser) == []
    assert "NaN" not in browser.js("document.querySelector('#chart').outerHTML")


def test_page_says_which_runs_are_beyond_the_scale(browser, tmp_path):
    times = [10.0, 11.0, 1026.0]
    runs = [run_of(0.9, seconds, seed=i) for i, seconds in enumerate(times)]
    compare.write_html(compared(*runs), 1.0, [], [], tmp_path / "a.html")
    browser.open(tmp_path / "a.html", 1280, 900)
    assert "beyond" not in browser.js("document.querySelector('#about').textContent")
    browser.press(CONTROL.format(SECONDS))
    about = browser.js("document.querySelector('#about').textContent")
    assert "1 run ends beyond the scale of time, at up to 1026 s." in about


def test_name_hides_its_group(page, browser):
    browser.open(page, 390, 844)
    assert browser.js(f"{GROUP.format(1)}.textContent") == "Muon (2 runs)"
    browser.press(GROUP.format(1))
    assert len(browser.js(MEANS)) == 1
    assert browser.js(f"{GROUP.format(1)}.ariaPressed") == "false"
    browser.press(GROUP.format(1))
    assert len(browser.js(MEANS)) == 2


def test_touch_reads_losses(page, browser):
    browser.open(page, 390, 844)
    _, y = browser.centre("document.querySelector('#chart')")
    right_end = dict(x=390 - 16 - 14, y=y)  # step 100
    browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[right_end])
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert browser.js("document.querySelector('#at').textContent") == "Mean loss of each group at step 100:"
    numbers = browser.js("[...document.querySelectorAll('#legend b')].map(b => b.textContent)")
    assert numbers == ["0.8000", "0.9100"]


def test_mouse_reads_seconds(page, browser):
    """The mean of muon's two runs is at the median of their times: 10.5 s at the end."""
    browser.open(page, 1280, 900)
    browser.press(CONTROL.format(SECONDS))
    x, y = browser.centre("document.querySelector('#chart')")
    start = browser.js("document.querySelector('#chart').getBoundingClientRect().x")
    left = start + 44  # 0 s
    right = 2 * x - start - 14  # 12 s
    seconds = 9.6  # the eighth evaluation of the other group, whose run took 12 s
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=left + (right - left) * seconds / 12, y=y)
    assert browser.js("document.querySelector('#at').textContent") == "Mean loss of each group at second 9.6:"
    means = np.linspace(2, 0.91, 10)  # from 1.05 s to 10.5 s
    expected = np.interp(seconds, np.linspace(1.05, 10.5, 10), means)
    assert browser.js("document.querySelectorAll('#legend b')[1].textContent") == f"{expected:.4f}"

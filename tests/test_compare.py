import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from scripts import compare
from scripts.compare import Run, change, estimate, find_logs, groups, read_log, record, runs_needed

HERE = Path(__file__).parent
RULER = "=" * 100
CONFIG = dict(optimizer="muon", seed=0, run_name="a", log_dir="logs", hidden_learning_rate=0.01, batch_size=32, sequence_length=8,
              n_layer=2, val_tokens=64, target_val_loss=1.0, num_iterations=100)
SHARD = dict(name="train_1.bin", tokens=10 ** 6, sha256_of_header_and_size="aa", sha256_of_first_mebibyte="cc")


def lines(steps, losses, seconds, unit="ms"):
    """The lines of a log, training losses between them."""
    text = ""
    for step, loss, time in zip(steps, losses, seconds):
        train_time = f"{1000 * time:.0f}ms" if unit == "ms" else f"{time}s"
        for what, value in (("train_loss", 0.5), ("val_loss", loss)):
            text += f"step:{step}/{steps[-1]} {what}:{value} train_time:{train_time} step_avg:nanms\n"
    return text


def facts(val=SHARD, **config):
    """run.json of a small run."""
    return dict(config={**CONFIG, **config}, tokens_per_step=256, train_shards=[SHARD], val_shards=[val], parameters=99,
                dtype="torch.float32", machine=dict(cpu="c", cpu_threads=1), world_size=1)


def run_of(final=0.9, seconds=10.0, name="r", **config):
    """A run from loss 2 to `final` in 100 steps of equal time; the line meets 1.0 after 100 / (2 - final) steps."""
    return Run(name, facts(**config), [0, 100], [2.0, final], [0.0, seconds], 100)


def write(folder, final=0.9, seconds=10.0, json_of=None, **config):
    """The folder of a finished run."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(f"code\n{RULER}\n" + lines([0, 100], [2.0, final], [0, seconds]))
    (folder / "run.json").write_text(json.dumps(json_of or facts(**config)))
    return folder


@pytest.fixture
def command(call):
    """command(*arguments) runs compare.py as the command line does: returncode, stdout, stderr."""
    return lambda *arguments: call(compare, *arguments)


# the page, in a real browser: the DevTools protocol over a pipe


class Browser:
    """Headless Chromium. Messages are JSON, each followed by a zero byte, on its descriptors 3 and 4."""

    def __init__(self, binary, profile):
        read_end, self.requests = os.pipe()
        self.answers, write_end = os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read_end} 4>&{write_end}', "bash", binary, "--headless", "--no-sandbox",
             "--no-first-run", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=(read_end, write_end), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self.rest, self.number, self.session, self.events = b"", 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser has ended"
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **params):
        self.number += 1
        request = dict(id=self.number, method=method, params=params, **({"sessionId": self.session} if self.session else {}))
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, path, width, height, scheme="light"):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.events = []
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def js(self, expression):
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def centre(self, expression):
        """Where the middle of this element is on the screen, after scrolling to it."""
        self.js(f"{expression}.scrollIntoView({{block: 'center'}})")
        box = self.js(f"{expression}.getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def press(self, expression):
        x, y = self.centre(expression)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.requests)
        os.close(self.answers)


# reading logs


def record4(path, unit):
    """The published curve of record 4, written as the log that it was taken from."""
    rows = np.loadtxt(HERE / "record4.csv", delimiter=",", skiprows=3).T
    code = 'f"step:{step}/{N} val_loss:{loss:.4f} train_time:{t:.0f}ms"\n"""\nstep:6125/6200 val_loss:1.0 train_time:5ms\n"""\n'
    curve = lines(rows[0].astype(int).tolist(), rows[1].tolist(), rows[2].tolist(), unit)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{code}{RULER}\nnvidia-smi\n{RULER}\n{curve}")
    return path


@pytest.mark.parametrize("unit", ["ms", "s"])
def test_record_4_meets_the_target_where_it_was_published_to(tmp_path, unit):
    run = read_log(record4(tmp_path / "log.txt", unit))
    assert tuple(map(round, run.to_target(3.28))) == (6134, 1325)
    assert len(run.steps) == 51 and run.losses[-1] == 3.2785 and run.total == 6200 and not run.fault


def test_an_example_in_code_without_a_ruler_after_it_is_no_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text("step:50/100 val_loss:0.1000 train_time:1ms\n" + lines([0, 100], [2.0, 0.9], [0, 10]))
    assert read_log(tmp_path / "a.txt").losses == [2.0, 0.9]


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    (tmp_path / "a.txt").write_text(lines([0, 50, 100], [2.0, 1.5, 1.4], [0, 5, 10]) + lines([50, 100], [1.5, 1.2], [5, 11]))
    run = read_log(tmp_path / "a.txt")
    assert (run.steps, run.losses, run.seconds) == ([0, 50, 100], [2.0, 1.5, 1.2], [0, 5, 11])


def test_a_folder_gives_its_runs_and_its_published_logs(tmp_path):
    run = write(tmp_path / "x" / "run")
    published = record4(tmp_path / "x" / "record" / "1234.txt", "ms")
    (tmp_path / "x" / "record" / "requirements.txt").write_text("torch\n")
    assert find_logs(tmp_path / "x") == [run, published] and find_logs(run) == [run]


def test_a_target_below_all_losses_is_not_met():
    assert run_of(final=0.9).to_target(0.8) is None


# groups and tracks


def test_seed_name_folder_and_machine_make_no_group():
    runs = [run_of(), run_of(seed=1, run_name="b", log_dir="x"), run_of(device="cpu", device_batch_size=4, log_every=3)]
    assert [(group.label, len(group.runs)) for group in groups(runs)] == [("muon", 3)]


def test_a_setting_makes_a_group_and_names_it():
    found = groups([run_of(), run_of(0.8, hidden_learning_rate=0.02), run_of(0.95, optimizer="adamw", momentum=0.5)])
    assert [group.label for group in found] == ["muon hidden_learning_rate=0.02", "muon hidden_learning_rate=0.01", "adamw"]


def test_published_logs_are_a_group_if_their_code_is_the_same(tmp_path):
    for name, code in (("a", "lr = 1"), ("b", "lr = 1"), ("c", "lr = 2"), ("d", ""), ("e", "")):
        text = f"{code}\n{RULER}\nmachine {name}\n{RULER}\n" + lines([0, 100], [2.0, 0.9], [0, 10])
        (tmp_path / f"{name}.txt").write_text(text)
    found = groups([read_log(path) for path in find_logs(tmp_path)])
    names = sorted([run.name for run in group.runs] for group in found)
    assert names == [["a", "b"], ["c"], ["d"], ["e"]]  # where there is no code, nothing tells


@pytest.mark.parametrize("other, words", [
    (dict(n_layer=3), "n_layer (a: 2, b: 3)"), (dict(batch_size=64), "batch_size (a: 32, b: 64)"),
    (dict(val_tokens=128), "val_tokens (a: 64, b: 128)"),
    (dict(val={**SHARD, "sha256_of_header_and_size": "bb"}), "val shard 1 (a: train_1.bin aa cc, b: train_1.bin bb cc)"),
    (dict(val={**SHARD, "sha256_of_first_mebibyte": "dd"}), "val shard 1 (a: train_1.bin aa cc, b: train_1.bin aa dd)"),
    (dict(val={**SHARD, "name": "other.bin"}), "val shard 1")])
def test_runs_of_other_tracks_are_refused_and_what_differs_is_named(tmp_path, command, other, words):
    write(tmp_path / "a")
    write(tmp_path / "b", json_of=facts(**other))
    done = command(tmp_path)
    assert done.returncode == 1 and "different tracks" in done.stderr and words in done.stderr and done.stdout == ""


def test_shards_that_no_run_reads_do_not_matter():
    runs = [run_of(), run_of(seed=1), run_of(seed=2)]
    for run, name in zip(runs[1:], ("train_2.bin", "train_3.bin")):
        run.facts["train_shards"] = [SHARD, {**SHARD, "name": name}]
    assert len(groups(runs)) == 1


def test_a_log_without_run_json_is_compared_and_said_to_be_unchecked(tmp_path, command):
    write(tmp_path / "a")
    (tmp_path / "b.txt").write_text("x\n" + lines([0, 100], [2.0, 0.8], [0, 10]))
    done = command(tmp_path, "--target", 1)
    assert done.returncode == 0 and "1 of 2 runs have no run.json: their track could not be checked" in done.stdout


# statistics


def test_the_interval_of_a_mean_is_that_of_the_tables():
    e = estimate([10.0, 12.0, 14.0])  # sd 2, t(0.975, 2) = 4.3027
    assert e.mean == 12 and (e.low, e.high) == pytest.approx((12 - 4.3027 * 2 / 3 ** 0.5, 12 + 4.3027 * 2 / 3 ** 0.5), abs=1e-3)


def test_the_bootstrap_interval_is_that_of_all_resamples():
    values = [10.0, 11.0, 15.0, 20.0]
    means = np.mean(np.stack(np.meshgrid(*[values] * 4)).reshape(4, -1), axis=0)  # all 256
    e = estimate(values)
    assert (e.boot_low, e.boot_high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.3)


def test_a_change_is_welchs_test_of_logarithms():
    new, old = [90.0, 94.0, 91.0], [100.0, 103.0, 99.0, 101.0]
    a, b = np.log(new), np.log(old)
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 4
    df = (va + vb) ** 2 / (va ** 2 / 2 + vb ** 2 / 3)
    d, half = a.mean() - b.mean(), stats.t.ppf(0.975, df) * (va + vb) ** 0.5
    c = change(new, old, -1)
    assert (c.mean, c.low, c.high) == pytest.approx((1 - np.exp(d), 1 - np.exp(d + half), 1 - np.exp(d - half)))
    assert c.p == pytest.approx(stats.t.cdf(d / (va + vb) ** 0.5, df)) and c.sd == pytest.approx((3 * va + 4 * vb) ** 0.5)
    assert c.mean == pytest.approx(1 - np.mean(new) / np.mean(old), abs=1e-3)
    assert change(new, old, 1).low == pytest.approx(-c.high)


def test_the_interval_of_a_change_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    changes = [change(list(rng.normal(94, 2, 3)), list(rng.normal(100, 1, 5)), -1) for _ in range(1000)]
    assert 0.93 < np.mean([c.low <= 0.06 <= c.high for c in changes]) < 0.98


def test_p_is_below_a_twentieth_as_often_as_it_says_when_nothing_changed():
    rng = np.random.default_rng(1)
    p = [change(list(rng.normal(100, 1, 4)), list(rng.normal(100, 1, 4)), -1).p for _ in range(1000)]
    assert 0.03 < np.mean(np.array(p) < 0.05) < 0.065


def exactly(n, mean, sd):
    """n values with this mean and standard deviation."""
    values = np.arange(n) - (n - 1) / 2
    return mean + values * (sd / values.std(ddof=1))


@pytest.mark.parametrize("distance, sd", [(0.001, 0.0013), (0.0004, 0.0013), (0.01, 0.002)])
def test_runs_needed_is_the_first_number_that_a_t_test_accepts(distance, sd):
    n = runs_needed(distance, sd)
    p = [stats.ttest_1samp(exactly(k, 3.28 - distance, sd), 3.28, alternative="less").pvalue if k > 1 else 1 for k in (n - 1, n)]
    assert p[1] < 0.01 <= p[0]


@pytest.mark.parametrize("distance", [0.02, 0.04])
def test_runs_needed_of_two_groups_is_the_first_number_that_a_two_sided_test_accepts(distance):
    n = runs_needed(distance, 0.015 * 2 ** 0.5, 0.025, df=2)
    p = [stats.ttest_ind(exactly(k, 0, 0.015), exactly(k, distance, 0.015)).pvalue for k in (n - 1, n)]
    assert p[1] < 0.05 <= p[0]


def test_no_number_of_runs_shows_that_a_mean_above_the_target_is_below():
    assert runs_needed(-0.001, 0.0013) is None
    verdict = record([3.281, 3.2805], 3.28)
    assert not verdict.valid and verdict.more is None and "no number of runs" in verdict.verdict


def test_ten_runs_are_a_record_by_the_t_test():
    finals = exactly(10, 3.2785, 0.0013)
    verdict = record(finals, 3.28)
    assert verdict.valid and verdict.p == pytest.approx(stats.t.cdf(-0.0015 / (0.0013 / 10 ** 0.5), 9))


def test_record_4_alone_lacks_runs_up_to_a_t_test(tmp_path):
    [summary] = compare.compare(groups([read_log(record4(tmp_path / "log.txt", "ms"))]), None, 3.28)
    assert summary.record.p == pytest.approx(0.1243, abs=1e-4)  # Phi(-0.0015 / 0.0013)
    assert not summary.record.valid and "if the speedrun's" in summary.record.verdict
    p = [stats.ttest_1samp(exactly(n, 3.2785, 0.0013), 3.28, alternative="less").pvalue for n in (summary.record.more, summary.record.more + 1)]
    assert p[1] < 0.01 <= p[0]  # 5 runs would do for the z-test, (2.326 * 0.0013 / 0.0015)^2 = 4.07, but that is for fewer than 5


def test_a_record_of_few_runs_lacks_some_by_the_z_test():
    verdict = record([3.2782], 3.28, 0.0013)
    p = [stats.norm.cdf(-0.0018 / (0.0013 / n ** 0.5)) for n in (2, 3)]
    assert not verdict.valid and verdict.more == 2 and p[1] < 0.01 <= p[0]


@pytest.mark.parametrize("n, test", [(4, "z-test, sd 0.0013"), (5, "t-test")])
def test_the_z_test_is_for_few_runs(n, test):
    config = {**compare.SPEEDRUN, "val": {**SHARD, "name": "fineweb_val_000000.bin"}}
    [summary] = compare.compare(groups([run_of(3.27 + i / 1e4, seed=i, **config) for i in range(n)]), None, 3.28)
    assert summary.record.valid and test in summary.record.verdict


def test_the_z_test_is_for_the_speedrun_only():
    [summary] = compare.compare(groups([run_of(3.27), run_of(3.279, seed=1)]), None, 3.28)
    assert summary.record.p == pytest.approx(stats.ttest_1samp([3.27, 3.279], 3.28, alternative="less").pvalue)


def test_a_run_that_missed_the_target_leaves_a_bound_and_no_comparison():
    slow = [run_of(0.9, optimizer="adamw"), run_of(1.2, seed=1, optimizer="adamw")]
    fast, adamw = compare.compare(groups([run_of(0.8), run_of(0.82, seed=1), *slow]), "muon", 1.0)
    assert adamw.reached == 1 and adamw.steps.mean is None and adamw.steps.at_least == pytest.approx((100 / 1.1 + 100) / 2)
    assert adamw.saved_steps.mean is None and adamw.saved_seconds.mean is None and adamw.overhead.mean == pytest.approx(0)
    assert fast.reached == 2 and fast.tokens == pytest.approx(256 * np.mean([100 / 1.2, 100 / 1.18]))


def test_savings_are_in_steps_and_in_seconds():
    old = [run_of(0.9, 10.0), run_of(0.9, 10.2, seed=1)]
    new = [run_of(0.8, 11.0, optimizer="newton_muon"), run_of(0.8, 11.3, seed=1, optimizer="newton_muon")]
    newton, muon = compare.compare(groups(old + new), None, 1.0)
    assert (newton.label, muon.label, muon.saved_steps.mean) == ("newton_muon", "muon", None)
    assert newton.saved_steps.mean == pytest.approx(1 - 1.1 / 1.2)  # 100 / 1.2 steps instead of 100 / 1.1
    assert newton.overhead.mean == pytest.approx((11.0 * 11.3 / (10.0 * 10.2)) ** 0.5 - 1)
    assert 1 - newton.saved_seconds.mean == pytest.approx((1 - newton.saved_steps.mean) * (1 + newton.overhead.mean))


# the command


def test_three_single_runs_give_a_compact_table_without_intervals(tmp_path, command):
    for name, final in (("muon", 0.9), ("newton_muon", 0.85), ("adamw", 1.1)):
        write(tmp_path / name, final, optimizer=name)
    done = command(tmp_path, "--png", tmp_path / "p" / "a.png")
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 25 and max(map(len, done.stdout.splitlines())) < 130
    assert re.search(r"^muon +muon +91 +9\.1 +0\.9000 +100 +10\.0 +100\.0$", done.stdout, re.MULTILINE)
    assert re.search(r"^adamw +adamw +not reached +not reached +1\.1000", done.stdout, re.MULTILINE)
    assert re.search(r"^newton_muon +4\.3% +n/a +n/a +4\.3%", done.stdout, re.MULTILINE)
    assert (tmp_path / "p" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_long_labels_are_broken_to_fit(tmp_path, command):
    names = ("hidden_learning_rate", "learning_rate", "weight_decay", "momentum", "num_iterations", "refresh_interval")
    for i in range(4):
        write(tmp_path / f"a_long_name_of_a_run_{i}", 0.9 - i / 100, 1e5 + i, seed=i, **dict.fromkeys(names, 0.123456 + i // 2))
    done = command(tmp_path)
    assert done.returncode == 0 and "refresh_interval=1.123456" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 130


def test_an_unfinished_run_is_named_and_left_out(tmp_path, command):
    write(tmp_path / "a")
    log = write(tmp_path / "b", 0.1) / "log.txt"
    log.write_text(log.read_text().replace("/100", "/200"))
    done = command(tmp_path)
    assert done.returncode == 0 and "b is left out: it ends at step 100 of 200" in done.stdout and "0.1000" not in done.stdout


def test_a_run_that_was_to_stop_at_the_target_is_finished():
    run = run_of(0.9, stop_at_target=True)
    run.total = 200
    [summary] = compare.compare(groups([run]), None, 1.0)
    assert summary.reached == 1 and not summary.record.valid  # its final loss is no evidence


def test_a_copy_of_a_run_or_of_what_it_showed_counts_once(tmp_path, command):
    shutil.copytree(write(tmp_path / "a"), tmp_path / "b")
    shutil.copy(tmp_path / "a" / "log.txt", tmp_path / "terminal.log")
    write(tmp_path / "c", seed=1)  # as good, but another run
    done = command(tmp_path, tmp_path / "a")
    assert "copies of runs left out: 2" in done.stdout and "2 of 2" in done.stdout


def test_several_runs_of_one_seed_and_machines_are_pointed_out(tmp_path, command):
    write(tmp_path / "a")
    write(tmp_path / "b", 0.91, json_of={**facts(), "machine": dict(gpu="H100")})
    done = command(tmp_path)
    assert "several runs of one seed" in done.stdout and "different machines (1 x 1 threads of c; 1 x H100)" in done.stdout


def test_a_target_that_the_first_evaluation_meets_is_pointed_out(tmp_path, command):
    write(tmp_path / "a")
    assert "1 of 1 runs are at the target in their first evaluation" in command(tmp_path, "--target", 3).stdout


def test_different_targets_ask_for_one(tmp_path, command):
    write(tmp_path / "a")
    write(tmp_path / "b", 0.91, target_val_loss=1.5)
    assert "--target" in command(tmp_path).stderr and command(tmp_path, "--target", 1.2).returncode == 0


@pytest.mark.parametrize("arguments, words", [
    (["missing"], ["missing", "No such file"]), (["empty"], ["no log.txt"]), (["binary.pt"], ["binary.pt", "no line such as"]),
    (["a", "--baseline", "muno"], ["'muno'", "nearest is 'muon'"]), (["a", "--target", "0.5"], ["no run reached 0.5", "0.9000"]),
    (["a", "--html", "binary.pt/x.html"], ["binary.pt"]), (["broken"], ["run.json", "cannot be read"])])
def test_an_error_is_a_sentence(tmp_path, command, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a")
    (write(tmp_path / "broken") / "run.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.pt").write_bytes(bytes(range(256)) * 9)
    done = command(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") <= 1
    assert all(word in done.stderr for word in words), done.stderr


# the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two groups: muon, twice, and one of a hostile name."""
    runs = [Run(name, facts(optimizer=name), list(range(0, 101, 10)), [5.0, *np.linspace(2, final, 10)],
                list(np.linspace(0, seconds, 11)), 100)
            for name, final, seconds in (("muon", 0.9, 10.0), ("muon", 0.92, 11.0), ("</script><b>x", 0.8, 12.0))]
    summaries = compare.compare(groups(runs), "muon", 1.0)
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
def test_the_page_loads_without_errors_requests_or_sideways_scrolling(page, browser, width, height, scheme):
    browser.open(page, width, height, scheme)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("document.querySelectorAll('table').length") == 4
    assert browser.js("document.querySelectorAll('b').length") == 2  # those of the legend, none from a name
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    bad = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert bad == [] and requests == [page.as_uri()]


@pytest.mark.parametrize("width", [390, 1280])
def test_each_toggle_draws_other_curves_and_draws_the_same_again_when_pressed_twice(page, browser, width):
    browser.open(page, width, 844)
    before = browser.js(PATHS)
    assert len(before) == 3
    for i in range(4):
        browser.press(CONTROL.format(i))
        assert browser.js(f"{CONTROL.format(i)}.ariaPressed") == "true"
        assert browser.js(PATHS) != before
        browser.press(CONTROL.format(i))
        assert browser.js(PATHS) == before


def test_all_toggles_together_draw_finite_curves(page, browser):
    browser.open(page, 390, 844)
    for i in range(4):
        browser.press(CONTROL.format(i))
    paths = browser.js(PATHS)
    assert len(paths) == 3 and not any("NaN" in d or "Infinity" in d for d in paths)


def test_a_name_hides_its_group_and_shows_it_again(page, browser):
    browser.open(page, 390, 844)
    assert browser.js(f"{GROUP.format(1)}.textContent") == "muon (2 runs)"
    browser.press(GROUP.format(1))
    assert len(browser.js(PATHS)) == 1 and browser.js(f"{GROUP.format(1)}.ariaPressed") == "false"
    browser.press(GROUP.format(1))
    assert len(browser.js(PATHS)) == 3


def test_a_touch_reads_the_mean_losses_of_the_nearest_step(page, browser):
    browser.open(page, 390, 844)
    _, y = browser.centre("document.querySelector('#chart')")
    browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=390 - 16 - 14, y=y)])  # right end: step 100
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert browser.js("document.querySelector('#at').textContent") == "Mean loss of each group at step 100:"
    assert browser.js("[...document.querySelectorAll('#legend b')].map(b => b.textContent)") == ["0.8000", "0.9100"]


def test_the_mouse_reads_seconds_between_the_evaluations_of_the_others(page, browser):
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

"""Records: what add_record files and refuses, the leaderboard, the verdict on the claim, samples of text."""
import json
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import ROOT, TINY
from scripts import add_record, compare, leaderboard, replicate, sample, tune
from train_gpt2 import GPT, Config, UserError, load_config

RECORDS = sorted(path.parent.relative_to(ROOT / "records") for path in ROOT.glob("records/*/*/*/run.json"))


def call(module, monkeypatch, capfd, *arguments):
    """What `python scripts/MODULE.py ARGUMENTS` prints; its UserErrors are raised."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return capfd.readouterr().out


# what is in records/


@pytest.mark.parametrize("run", RECORDS, ids=str)
def test_every_filed_run_is_whole_and_of_its_track(run):
    add_record.check_run(ROOT / "records" / run, add_record.read_track(run.parts[0]))


def test_the_leaderboard_is_up_to_date():
    text, plotted = leaderboard.page()
    assert (ROOT / "records/README.md").read_text() == text, "run python scripts/leaderboard.py"
    assert all((ROOT / f"records/{track}/curves.png").exists() for track in plotted)


@pytest.mark.parametrize("track", ["books", "cpu", "mini", "speedrun"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "newton_muon"])
def test_a_track_is_what_the_command_that_runs_it_trains(track, optimizer):
    fixed = add_record.read_track(track)
    words = shlex.split(fixed["run"])
    fields = {name: value for name, value in zip(words[2::2], words[3::2])}
    config = load_config([str(ROOT / f"configs/{fields.pop('--track')}_{optimizer}.toml"), *(
        word for pair in fields.items() if pair[0] != "--seeds" for word in pair)])
    assert {name: getattr(config, name) for name in fixed["config"]} == fixed["config"]
    assert config.target_val_loss == fixed["target_val_loss"]
    tokens = config.num_iterations * config.batch_size * config.sequence_length
    assert tokens < sum(shard["tokens"] for shard in fixed["train_shards"]) or config.allow_repeat
    assert config.val_tokens < fixed["val_shards"][0]["tokens"]


# filing


@pytest.fixture
def ledger(start, tmp_path):
    """Two finished runs of a tiny track: add(*arguments) files them; runs, the track's folder and its track.toml as a dictionary."""
    for seed in (0, 1):
        assert start(run_name=f"muon_{seed}", seed=seed).returncode == 0
    runs = [tmp_path / f"logs/muon_{seed}" for seed in (0, 1)]
    facts = json.loads((runs[0] / "run.json").read_text())
    folder = tmp_path / "records/tiny"
    folder.mkdir(parents=True)
    shards = "".join("".join(f"\n[[{kind}]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in shard.items()) for shard in facts[kind])
                     for kind in ("train_shards", "val_shards"))
    (folder / "track.toml").write_text('title = "a tiny track"\nrun = "command"\ntarget_val_loss = 5.0\n\n[config]\nallow_repeat = false\n' + "".join(
        f"{name} = {TINY[name]}\n" for name in ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_length", "batch_size", "val_tokens")) + shards)
    return SimpleNamespace(runs=runs, folder=folder, arguments=[*runs, "--track", "tiny", "--name", "first", "--records", folder.parent])


def test_runs_are_filed_with_logs_and_a_table_but_no_weights(ledger, monkeypatch, capfd):
    assert "2 runs filed" in call(add_record, monkeypatch, capfd, *ledger.arguments, "--note", "As it is.")
    record, = ledger.folder.glob("2*_first")
    assert record.name[:10] == json.loads((ledger.runs[1] / "run.json").read_text())["end"][:10]
    assert sorted(str(path.relative_to(record)) for path in record.rglob("*") if path.is_file()) == sorted(
        ["README.md", *(f"muon_{seed}/{name}" for seed in (0, 1) for name in add_record.FILES)])
    text = (record / "README.md").read_text()
    assert text.startswith("# first\n\nAs it is.\n") and "muon" in text and f"torch {torch.__version__}" in text


def test_the_leaderboard_shows_what_was_filed_and_what_others_published(ledger, monkeypatch, capfd):
    text, plotted = leaderboard.section("tiny", ledger.folder.parent)
    assert "Nobody has run this here yet." in "".join(text) and not plotted
    call(add_record, monkeypatch, capfd, *ledger.arguments)
    with open(ledger.folder / "track.toml", "a") as file:
        for loss in (3.5, 3.25):
            file.write(f'\n[[published]]\noptimizer = "X{loss}"\nhardware = "h"\nsteps = 9\nfinal_val_loss = {loss}\nseconds = 3\nsource = "s"\n')
    text, (summary,) = leaderboard.section("tiny", ledger.folder.parent)
    ours, theirs = "".join(text).split("Published by others, not run here")
    losses = [round(json.loads((run / "run.json").read_text())["final_val_loss"], 4) for run in ledger.runs]
    assert "| muon | 2 |" in ours and f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in ours
    assert 0 < theirs.index("X3.25") < theirs.index("X3.5")


def test_one_seed_is_filed_once(ledger, monkeypatch, capfd, tmp_path):
    shutil.copytree(ledger.runs[0], tmp_path / "again")
    with pytest.raises(UserError, match=r"runs of one configuration with the seeds \[0, 0, 1\]|seeds \[0, 1, 0\]"):
        call(add_record, monkeypatch, capfd, tmp_path / "again", *ledger.arguments)


def test_a_run_that_went_on_with_other_free_settings_is_filed(start, ledger, tmp_path):
    done = start(run_name="muon_1", seed=1, resume="auto", collective_timeout=50, save_every=3)
    assert done.returncode == 0
    add_record.check_run(ledger.runs[1], add_record.read_track("tiny", ledger.folder.parent))


def test_what_is_filed_already_or_not_there_is_refused(ledger, monkeypatch, capfd, tmp_path):
    call(add_record, monkeypatch, capfd, *ledger.arguments[:1], *ledger.arguments[2:])
    with pytest.raises(UserError, match="muon_0 is filed already, in .*_first/muon_0"):
        call(add_record, monkeypatch, capfd, *ledger.arguments[:-3], "again", *ledger.arguments[-2:])
    with pytest.raises(UserError, match="_first is there already; choose another --name"):
        call(add_record, monkeypatch, capfd, *ledger.arguments[1:])
    with pytest.raises(UserError, match="nothing: run.json cannot be read"):
        call(add_record, monkeypatch, capfd, tmp_path / "nothing", "--track", "tiny", "--name", "b", *ledger.arguments[-2:])


def test_the_source_of_somebodys_optimizer_is_kept_checked_and_filed(start, ledger, monkeypatch, capfd, tmp_path):
    (tmp_path / "mine.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = start(run_name="mine", optimizer="mine:Mine")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "logs/mine"
    assert (run / "optimizer.py").read_text() == (tmp_path / "mine.py").read_text()
    config = Config(**json.loads((run / "run.json").read_text())["config"])
    assert replicate.finished(run, config)
    call(add_record, monkeypatch, capfd, run, *ledger.arguments[2:])
    filed, = ledger.folder.glob("2*_first/mine/optimizer.py")
    assert filed.read_text() == (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    changed = True\n")
    with pytest.raises(UserError, match="is from another version of .*mine.py"):
        replicate.finished(run, config)
    (run / "optimizer.py").write_text("")
    with pytest.raises(UserError, match="optimizer.py does not have the SHA-256"):
        add_record.check_run(run, add_record.read_track("tiny", ledger.folder.parent))


def test_tune_tries_every_combination_once_and_lists_the_best_first(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(ROOT)
    arguments = ["configs/cpu_adamw.toml", "--num_iterations", 2, "--warmdown_iters", 1, "--val_loss_every", 0, "--val_tokens", 1024, "--n_layer", 1,
                 "--learning_rate", "0.01,1e-9", "--log_dir", tmp_path]
    def call_tune(*more):
        with pytest.raises(SystemExit) as end:
            call(tune, monkeypatch, capfd, *arguments, *more)
        return end.value.code, capfd.readouterr().out.splitlines()
    code, lines = call_tune()
    assert not code and "learning_rate-0.01" in lines[-2] and "learning_rate-1e-9" in lines[-1] and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(tune.subprocess, "run", lambda *args, **kwargs: pytest.fail("trains again"))
    assert call_tune()[1][-2:] == lines[-2:]
    with pytest.raises(UserError, match="has sequence_length = 128, this run 64"):
        config = tmp_path / "other.toml"
        config.write_text((ROOT / "configs/cpu_adamw.toml").read_text().replace("sequence_length = 128", "sequence_length = 64"))
        folder = next(path for path in tmp_path.iterdir() if path.is_dir())
        tune.finished(folder, load_config([str(config), *map(str, arguments[1:11])]))
    with pytest.raises(UserError, match="--jobs 0: must be at least 1"):
        call(tune, monkeypatch, capfd, *arguments, "--jobs", 0)


def test_the_protocol_tunes_every_optimizer_alike_and_leaves_no_best_pair_at_an_edge(monkeypatch, tmp_path):
    asked, bottom = [], {"configs/cpu_muon.toml": (0.08, 0.001), "configs/cpu_adamw.toml": (0.005, 0.0057)}  # the first is 2 steps away

    def bowl(settings, log_dir, jobs):
        asked.extend(settings)
        return {str(i): sum(abs(np.log(fields[rate] / at)) for rate, at in zip(tune.RATES, bottom[path])) + 0.01 * (fields["seed"] - 100)
                for i, (path, fields) in enumerate(settings)}

    monkeypatch.setattr(tune, "train_all", bowl)
    monkeypatch.chdir(ROOT)
    found = tune.protocol(list(bottom), {"num_iterations": "600"}, 12, 2, tmp_path, 1)
    assert all(found[path] == pytest.approx(bottom[path], rel=0.01) for path in bottom)
    counts = [sum(path == each for each, _ in asked) for path in bottom]
    assert counts[0] == counts[1] >= 24 and len({str(point) for point in asked}) == len(asked)
    assert {(fields["seed"], fields["data_seed"]) for _, fields in asked} == {(100, 100), (101, 101)}
    table = (tmp_path / "tuning.csv").read_text().splitlines()
    assert len(table) == 1 + len(asked) / 2 and all(line.startswith("configs/cpu_muon.toml") for line in table[1:1 + counts[0] // 2])
    pairs = {tuple(fields[rate] for rate in tune.RATES) for path, fields in asked if path == "configs/cpu_muon.toml"}
    assert max(pairs)[0] > 0.08 and min(pair[1] for pair in pairs) < 0.001
    for fields in ({"seed": "1"}, {"learning_rate": "0.1"}):
        with pytest.raises(UserError, match=f"leave out {next(iter(fields))}"):
            monkeypatch.setattr(sys, "argv", ["tune.py", "--protocol", "a.toml", *(f"--{k}={v}" for k, v in fields.items())])
            tune.main()


def test_only_the_tracks_target_may_end_a_run_early(start, ledger, tmp_path):
    fields = dict(stop_at_target="true", log_every=4)
    losses = [json.loads(line)["val_loss"] for line in (ledger.runs[0] / "metrics.jsonl").read_text().splitlines() if "val_loss" in line]
    target = (losses[0] + losses[1]) / 2  # met at step 5
    assert start(run_name="early", target_val_loss=target, **fields).returncode == 0
    track = add_record.read_track("tiny", ledger.folder.parent)
    with pytest.raises(UserError, match="it ended at step 5 of 10"):
        add_record.check_run(tmp_path / "logs/early", {**track, "target_val_loss": losses[1] / 2})
    add_record.check_run(tmp_path / "logs/early", {**track, "target_val_loss": target})


def edit_facts(run, **changes):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, **changes}))


def edit(name, old, new):
    def change(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
    return change


@pytest.mark.parametrize("damage, words", [
    (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read"),
    (lambda run: (run / "run.json").write_text("[]"), "not written by train_gpt2.py"),
    (edit("log.txt", "\nclass Muon", "\nclass  Muon"), "code in log.txt does not have the SHA-256"),
    (edit("log.txt", '"learning_rate": 0.01', '"learning_rate": 0.02'), "configuration in log.txt is not that of run.json"),
    (edit("log.txt", "\nstep:5/10 val_loss:", "\nstep:5/10 val_loss:0"), "metrics.jsonl and log.txt do not tell the same"),
    (lambda run: (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(True)[:-1])), "do not tell the same"),
    (edit("run.json", '"end"', '"ended"'), "did not come to its end"),
    (edit("run.json", '"final_val_loss": ', '"final_val_loss": 1'), "final_val_loss in run.json is not the last"),
    (edit("run.json", '"tokens_per_step": 192', '"tokens_per_step": 100'), "tokens_per_step is not batch_size x sequence_length"),
])
def test_a_run_that_is_damaged_or_contradicts_itself_is_refused(ledger, damage, words):
    damage(ledger.runs[1])
    with pytest.raises(UserError, match=f"muon_1: .*{words}"):
        add_record.check_run(ledger.runs[1], add_record.read_track("tiny", ledger.folder.parent))


def test_a_missing_evaluation_is_noticed_where_log_and_metrics_agree(ledger):
    run = ledger.runs[0]
    for name in ("log.txt", "metrics.jsonl"):
        lines = [line for line in (run / name).read_text().splitlines(True)
                 if not line.startswith("step:5/10 val_loss") and not (line.startswith('{"step": 5,') and "val_loss" in line)]
        (run / name).write_text("".join(lines))
    with pytest.raises(UserError, match="does not have one val_loss for every 5 steps up to 10"):
        add_record.check_run(run, add_record.read_track("tiny", ledger.folder.parent))


def test_time_that_goes_back_is_noticed(ledger):
    run = ledger.runs[0]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    log = (run / "log.txt").read_text()
    wrong = records[-3]["train_time_ms"] + 5000
    log = log.replace(f"step:{records[-3]['step']}/10 train_loss:{records[-3]['train_loss']:.4f} train_time:{records[-3]['train_time_ms']:.0f}ms",
                      f"step:{records[-3]['step']}/10 train_loss:{records[-3]['train_loss']:.4f} train_time:{wrong:.0f}ms")
    records[-3]["train_time_ms"] = wrong
    (run / "log.txt").write_text(log)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match="muon_0: steps or times go back in metrics.jsonl$"):
        add_record.check_run(run, add_record.read_track("tiny", ledger.folder.parent))


@pytest.mark.parametrize("old, new, words", [
    ("n_layer = 2", "n_layer = 3", "n_layer = 2, the track has 3"),
    ("batch_size = 12", "batch_size = 24", "batch_size = 12, the track has 24"),
    ("val_tokens = 384", "val_tokens = 368", "val_tokens = 384, the track has 368"),
    ("tokens = 1000", "tokens = 999", "val_shards: val_000000.bin has tokens 1000, the track's val_000000.bin has 999"),
    ('name = "train_000002.bin"', 'name = "other.bin"', "train_shards: train_000002.bin has name train_000002.bin, the track's other.bin has other.bin"),
    ('sha256_of_first_mebibyte = "', 'sha256_of_first_mebibyte = "0', "sha256_of_first_mebibyte"),
])
def test_a_run_of_another_track_is_refused_with_what_differs(ledger, old, new, words):
    track = ledger.folder / "track.toml"
    assert old in track.read_text()
    track.write_text(track.read_text().replace(old, new))
    with pytest.raises(UserError) as raised:
        add_record.check_run(ledger.runs[0], add_record.read_track("tiny", ledger.folder.parent))
    assert words in str(raised.value)


def test_an_unknown_track_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no track 'gpu'; the tracks are books, cpu, mini, speedrun"):
        add_record.read_track("gpu")


# the verdict


def saved(newton, muon):
    return compare.change(newton, muon, -1)


@pytest.mark.parametrize("newton, expected", [
    ([93, 94, 95], "reproduced"),  # the interval holds 6 % and leaves 0 out
    ([88, 88.5, 89], "reproduced"),  # even more than claimed
    ([97.9, 98, 98.1], "not reproduced"),  # fewer steps, but not 6 %
    ([101, 102, 103], "not reproduced"),
    ([92, 99, 94], "undecided"),
])
def test_the_verdict_depends_on_what_the_interval_leaves_out(newton, expected):
    word, text = replicate.verdict(saved(newton, [99.5, 100, 100.5]), 0.06)
    assert word == expected, text


def test_the_number_of_runs_that_an_undecided_verdict_names_would_decide():
    newton, muon = [90, 100, 96, 97], [101, 99, 97, 103]
    word, text = replicate.verdict(saved(newton, muon), 0.06)
    n = int(text.split("about ")[1].split()[0])

    def more(values, n):
        """n values with the mean and the spread of the logarithms of `values`."""
        new = np.linspace(-1, 1, n)
        return list(np.exp(np.mean(np.log(values)) + new / new.std(ddof=1) * np.std(np.log(values), ddof=1)))

    verdicts = [replicate.verdict(saved(more(newton, k), more(muon, k)), 0.06)[0] for k in (n - 1, n)]
    assert word == "undecided" and n > 4 and verdicts[0] == "undecided" != verdicts[1]


def test_one_run_of_each_decides_nothing():
    word, text = replicate.verdict(saved([90], [100]), 0.06)
    assert word == "undecided" and text.startswith("10.0% saved") and "2 or more seeds" in text


@pytest.mark.parametrize("arguments, words", [
    (["--seed", "3"], "--seed: every run here has its own"), (["--optimizer=adamw"], "--seeds and --optimizers say"),
    (["--seeds", "0"], "seeds must be at least 1"), (["--optimizers", "muon,muon"], "each optimizer named once"),
    (["--optimizers", "muon,lion"], "cpu_lion.toml"), (["--val_tokens", "100"], "val_tokens = 100"), (["--track", "mini"], "needs a GPU"),
])
def test_replicate_refuses_what_it_cannot_run_before_the_first_run(monkeypatch, capfd, tmp_path, arguments, words):
    if torch.cuda.is_available() and "mini" in arguments:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as raised:
        call(replicate, monkeypatch, capfd, "--log_dir", tmp_path / "runs", *arguments)
    assert words in str(raised.value) and not (tmp_path / "runs").exists()


def test_a_target_that_only_newton_muon_misses_is_not_reproduced():
    def side(label, reached):
        return SimpleNamespace(label=label, reached=reached, runs=[0] * 3, saved_steps=compare.Change(), saved_seconds=compare.Change())
    assert "verdict: not reproduced: 1 of 3 runs" in replicate.conclude([side("n", 2), side("m", 3)], ("n", "m"))[0]
    assert replicate.conclude([side("n", 2), side("m", 2)], ("n", "m")) == ["verdict: undecided: 1 of 3 runs with Muon missed the target"]


def test_replicate_skips_finished_runs_and_refuses_those_of_other_code(ledger, start, tmp_path):
    run, other = ledger.runs
    config = Config(**json.loads((run / "run.json").read_text())["config"])
    assert replicate.finished(run, config) and not replicate.finished(tmp_path / "nothing", config)
    edit("run.json", '"end"', '"ended"')(other)
    assert not replicate.finished(other, Config(**{**vars(config), "seed": 1, "run_name": "muon_1"}))
    with pytest.raises(UserError, match="has seed = 0, this run 5; choose another --log_dir"):
        replicate.finished(run, Config(**{**vars(config), "seed": 5}))
    edit_facts(run, code_sha256="0")
    with pytest.raises(UserError, match="another version of train_gpt2.py"):
        replicate.finished(run, config)


def test_replicate_trains_compares_and_judges_and_goes_on_where_it_was(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--log_dir", tmp_path / "runs", "--optimizers", "muon,newton_muon", "--num_iterations", 4, "--warmdown_iters", 1, "--val_loss_every", 2,
                 "--val_tokens", 4096, "--target_val_loss", 5, "--log_every", 1]
    call(replicate, monkeypatch, capfd, *arguments, "--seeds", 1)
    done = call(replicate, monkeypatch, capfd, *arguments, "--seeds", 2)
    assert "2 of 4 runs" in done and done.count("$ python train_gpt2.py") == 2
    assert (tmp_path / "runs.png").exists() and done.splitlines()[-1].startswith("verdict: ")
    done = call(replicate, monkeypatch, capfd, *arguments, "--seeds", 2, "--target_val_loss", 5.2)
    assert "steps to 5.2" in done and "$ python" not in done  # another target needs no other runs
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["muon_seed-0", "muon_seed-1", "newton_muon_seed-0", "newton_muon_seed-1"]


# samples


def test_greedy_samples_are_the_most_likely_tokens(tiny):
    torch.manual_seed(0)
    model = GPT(tiny)
    tokens = [1, 2, 3]
    for _ in range(20):  # beyond the context of 16
        with torch.no_grad():
            tokens.append(int(model.logits(torch.tensor([tokens[-16:]]))[0, -1].argmax()))
    assert list(sample.generate(model, [1, 2, 3], 20, 16, temperature=0)) == tokens[3:]
    assert list(sample.generate(model, [1, 2, 3], 20, 16, top_k=1)) == tokens[3:]


def test_samples_have_the_frequencies_of_the_softmax(tiny):
    torch.manual_seed(0)
    model = GPT(tiny)
    with torch.no_grad():
        expected = (model.logits(torch.tensor([[5]]))[0, -1] / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    counts = np.bincount([next(sample.generate(model, [5], 1, 16, 0.7, generator=generator)) for _ in range(2000)], minlength=64)
    wanted = 2000 * expected.double().numpy()
    assert wanted.min() > 5
    assert stats.chisquare(counts, wanted * 2000 / wanted.sum()).pvalue > 0.001


def test_a_sample_of_a_trained_run_is_text(start, tmp_path, monkeypatch, capfd):
    assert start(run_name="a", vocab_size=256).returncode == 0
    arguments = [tmp_path / "logs/a", "--prompt", "Ay, é ", "--tokens", 30, "--device", "cpu"]
    text = call(sample, monkeypatch, capfd, *arguments)
    assert text.startswith("Ay, é ") and len(text) > 8
    assert text == call(sample, monkeypatch, capfd, *arguments)
    assert text != call(sample, monkeypatch, capfd, *arguments, "--seed", 1)


def test_sampling_needs_a_checkpoint_and_a_known_vocabulary(start, tmp_path, monkeypatch, capfd):
    assert start(run_name="a").returncode == 0
    with pytest.raises(UserError, match="vocab_size = 64: neither bytes"):
        call(sample, monkeypatch, capfd, tmp_path / "logs/a")
    shutil.rmtree(tmp_path / "logs/a/checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        call(sample, monkeypatch, capfd, tmp_path / "logs/a")

"""Records: what is filed and what is refused, the leaderboard, samples of text."""
import hashlib
import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from harness import jobs
from scripts import records
from scripts import sample
from conftest import ROOT, TINY, refused
from harness.runs import SPEEDRUN
from train_gpt2 import GPT, Config, UserError, load_config

RUNS = sorted(path.parent.relative_to(ROOT / "records") for path in ROOT.glob("records/*/*/*/run.json"))


# what is in records/


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_filed_run(run):
    records.check_run(ROOT / "records" / run, records.read_track(run.parts[0]))


def test_leaderboard_is_up_to_date(call):
    done = call(records, "page", "--check")
    assert done.returncode == 0, done.stderr
    assert all((ROOT / f"records/{track}/curves.png").exists() for track in records.page()[1])


@pytest.mark.parametrize("track", ["cpu", "mini", "speedrun"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "newton_muon"])
def test_track_is_what_its_command_trains(track, optimizer):
    fixed = records.read_track(track)
    words = shlex.split(fixed["run"])
    fields = {name: value for name, value in zip(words[2::2], words[3::2])}
    arguments = [str(ROOT / f"configs/{fields.pop('--track')}_{optimizer}.toml")]
    for name, value in fields.items():
        if name != "--seeds":
            arguments += [name, value]
    config = load_config(arguments)
    assert {name: getattr(config, name) for name in fixed["config"]} == fixed["config"]
    assert config.target_val_loss == fixed["target_val_loss"]
    tokens = config.num_iterations * config.batch_size * config.sequence_length
    assert tokens < sum(shard["tokens"] for shard in fixed["train_shards"]) or config.allow_repeat
    assert config.val_tokens < fixed["val_shards"][0]["tokens"]


# filing


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def ledger(start, trained, tmp_path, call):
    """Two finished runs of a tiny track, trained once; add(runs, name) and page() call records.py."""
    made = [tmp_path / f"logs/muon_{seed}" for seed in (0, 1)]
    for seed, run in enumerate(made):
        if not (trained / run.name).exists():
            assert start(run_name=run.name, seed=seed).returncode == 0
            run.rename(trained / run.name)
        shutil.copytree(trained / run.name, run)
    first = json.loads((made[0] / "run.json").read_text())
    folder = tmp_path / "records/tiny"
    folder.mkdir(parents=True)
    track = [
        'title = "a tiny track"',
        'run = "command"',
        "target_val_loss = 5.0",
        "",
        "[config]",
        "allow_repeat = false",
    ]
    track += [f"{name} = {TINY[name]}" for name in SPEEDRUN]
    for kind in ("train_shards", "val_shards"):
        for shard in first[kind]:
            track += ["", f"[[{kind}]]"]
            track += [f"{key} = {json.dumps(value)}" for key, value in shard.items()]
    (folder / "track.toml").write_text("\n".join(track) + "\n")

    def add(*runs, name="first", **more):
        options = {"track": "tiny", "name": name, "records": folder.parent, **more}
        words = []
        for key, value in options.items():
            words += [f"--{key}", value]
        return call(records, "add", *runs, *words)

    return SimpleNamespace(
        runs=made,
        folder=folder,
        add=add,
        page=lambda: records.section("tiny", folder.parent)[0],
        read_track=lambda: records.read_track("tiny", folder.parent),
    )


def test_what_is_filed(ledger, tmp_path):
    (tmp_path / "t.csv").write_text("config,mean\n")
    # as an add leaves it that a full disk broke off
    shutil.copytree(ledger.runs[0], ledger.folder / ".adding/muon_0")
    done = ledger.add(*ledger.runs, note="As it is:\ncaf\udce9.", tuning=tmp_path / "t.csv")
    assert "2 runs filed" in done.stdout
    (record,) = ledger.folder.glob("2*_first")
    assert record.name[:10] == json.loads((ledger.runs[1] / "run.json").read_text())["end"][:10]
    filed = {str(path.relative_to(record)) for path in record.rglob("*") if path.is_file()}
    expected = {f"muon_{seed}/{name}" for seed in (0, 1) for name in records.FILES}
    assert filed == {"README.md", "tuning.csv", *expected}
    text = (record / "README.md").read_text()
    assert text.startswith("# first\n\nAs it is:\ncaf\N{REPLACEMENT CHARACTER}.\n")
    assert "muon" in text
    assert f"torch {torch.__version__}" in text


@pytest.mark.parametrize(
    "commit, changes, content, words",
    [
        ("a" * 40, False, None, "code at commit aaaaaaaaaaaa"),
        ("a" * 40, True, None, "unknown code"),
        (None, False, None, "unknown code"),
        ("a" * 40, False, b"other", "unknown code"),
    ],
)
def test_unknown_code(monkeypatch, commit, changes, content, words):
    ours = (ROOT / "train_gpt2.py").read_bytes()
    shown = SimpleNamespace(returncode=0, stdout=content or ours)
    monkeypatch.setattr(records.subprocess, "run", lambda *args, **kwargs: shown)
    machine = dict(git_commit=commit, git_changes=changes)
    facts = dict(machine=machine, code_sha256=hashlib.sha256(ours).hexdigest())
    assert records.code_of(facts).startswith(words)


def test_records_are_pooled(ledger):
    assert "Nobody has run this here yet." in ledger.page()
    assert ledger.add(ledger.runs[0]).returncode == 0
    assert ledger.add(ledger.runs[1], name="second").returncode == 0
    with open(ledger.folder / "track.toml", "a") as file:
        for loss in (3.5, 3.25):
            file.write(f'\n[[published]]\noptimizer = "X{loss}"\nfinal_val_loss = {loss}\n')
            file.write('hardware = "h"\nsteps = 9\nseconds = 3\nsource = "|<s>"\n')
    ours, theirs = ledger.page().split("Published by others, not run here")
    losses = [json.loads((run / "run.json").read_text())["final_val_loss"] for run in ledger.runs]
    assert "| muon | 2 | 10 |" in ours
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in ours
    assert "_first](" in ours
    assert "_second](" in ours
    assert r"\|\<s\>" in theirs
    assert 0 < theirs.index("X3.25") < theirs.index("X3.5")


def test_a_folder_with_a_study_has_a_link_and_no_row(ledger):
    study = ledger.folder / "2026-01-01_question"
    study.mkdir()
    shutil.copytree(ledger.runs[0], study / "run")
    (study / "study.py").touch()
    assert "Studies: [2026-01-01_question](tiny/2026-01-01_question/)" in ledger.page()
    assert "| muon |" not in ledger.page()


def test_superseded_record(ledger):
    ledger.add(*ledger.runs)
    (record,) = ledger.folder.glob("2*_first")
    track = ledger.folder / "track.toml"
    superseded = f'[superseded]\n{record.name} = "because | of this"\n\n[config]'
    track.write_text(track.read_text().replace("[config]", superseded))
    assert "| muon |" not in ledger.page()
    assert f"[{record.name}](tiny/{record.name}/): because \\| of this" in ledger.page()
    assert ledger.add(*ledger.runs, name="again").returncode == 1  # still the same runs


def test_diverged_run_is_filed(start, ledger, tmp_path):
    done = start(run_name="far", seed=2, hidden_learning_rate=1e35)
    assert done.returncode == 1
    assert "loss is" in done.stderr
    assert ledger.add(*ledger.runs, tmp_path / "logs/far").returncode == 0
    assert "| muon hidden_learning_rate=1e+35 | 1 | 10 |" in ledger.page()
    assert "far diverged" in ledger.page()
    loss = (tmp_path / "logs/far/metrics.jsonl").read_text().splitlines()[-1]
    with open(tmp_path / "logs/far/metrics.jsonl", "a") as file:  # as if it had trained on
        file.write(loss.replace("NaN", "3.0") + "\n")
    with pytest.raises(UserError, match="trained on after a loss that is not a number"):
        records.check_run(tmp_path / "logs/far", ledger.read_track())


def test_resumed_run_is_accepted(start, ledger):
    done = start(run_name="muon_1", seed=1, resume="auto", collective_timeout=50, save_every=3)
    assert done.returncode == 0
    records.check_run(ledger.runs[1], ledger.read_track())


def test_what_cannot_be_filed(ledger, tmp_path):
    shutil.copytree(ledger.runs[0], tmp_path / "again")
    done = ledger.add(tmp_path / "again", *ledger.runs)
    assert "runs of one configuration with the seeds" in done.stderr
    ledger.add(ledger.runs[0])
    edit("metrics.jsonl", '{"step": 0', '{"step":  0')(tmp_path / "again")
    assert "again is filed already, in " in ledger.add(tmp_path / "again", name="b").stderr
    assert "_first is there already; choose another --name" in ledger.add(ledger.runs[1]).stderr
    assert "run.json cannot be read" in ledger.add(tmp_path / "nothing", name="b").stderr
    assert "names a folder" in ledger.add(ledger.runs[1], name="a/b").stderr


def test_source_of_an_optimizer_is_filed(start, ledger, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = start(run_name="mine", optimizer="mine:Mine")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "logs/mine"
    config = Config(**json.loads((run / "run.json").read_text())["config"])
    assert jobs.finished(run, config)
    assert ledger.add(run).returncode == 0
    (filed,) = ledger.folder.glob("2*_first/mine/optimizer.py")
    assert filed.read_text() == (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Mine(torch.optim.SGD):\n    changed = True\n"
    )
    with pytest.raises(UserError, match="is from another version of .*mine.py"):
        jobs.finished(run, config)
    (run / "optimizer.py").write_text("")
    with pytest.raises(UserError, match="optimizer.py does not have the SHA-256"):
        records.check_run(run, ledger.read_track())


def test_finished(ledger, tmp_path):
    run, other = ledger.runs
    config = Config(**json.loads((run / "run.json").read_text())["config"])
    assert jobs.finished(run, config)
    assert not jobs.finished(tmp_path / "nothing", config)
    edit("run.json", '"end"', '"ended"')(other)
    assert not jobs.finished(other, Config(**{**vars(config), "seed": 1, "run_name": "muon_1"}))
    with pytest.raises(UserError, match="has seed = 0, this run 5; choose another --log_dir"):
        jobs.finished(run, Config(**{**vars(config), "seed": 5}))
    edit_facts(code_sha256="0")(run)
    with pytest.raises(UserError, match="another version of train_gpt2.py"):
        jobs.finished(run, config)


def test_early_end_needs_the_target(start, ledger, tmp_path):
    rows = records.read_metrics(ledger.runs[0])
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    target = (losses[0] + losses[1]) / 2  # met at step 5
    done = start(run_name="early", target_val_loss=target, stop_at_target="true", log_every=4)
    assert done.returncode == 0
    run = tmp_path / "logs/early"
    with pytest.raises(UserError, match="it ended at step 5 of 10"):
        records.check_run(run, {**ledger.read_track(), "target_val_loss": losses[1] / 2})
    records.check_run(run, {**ledger.read_track(), "target_val_loss": target})


def edit(name, old, new):
    def change(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return change


def edit_facts(**changes):
    def change(run):
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**facts, **changes}))

    return change


def edit_rows(new):
    """An edit of all rows of metrics.jsonl, to new(row), and of log.txt, which tells the same."""

    def change(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in map(new, rows) if row]
        *parts, _ = (run / "log.txt").read_text().split(records.RULER)
        losses = []
        for step, name, loss, time in records.losses_of(rows):
            losses.append(f"step:{step}/10 {name}:{loss:.4f} train_time:{time:.0f}ms step_avg:0ms\n")
        (run / "log.txt").write_text(records.RULER.join([*parts, "".join(losses)]))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return change


def remove_last_row(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-1].rpartition("\n")[0])


def late_step_5(row):
    return {**row, "train_time_ms": row["train_time_ms"] + 5000 * (row["step"] == 5)}


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl cannot be read"),
        (edit_facts(train_shards=[], val_shards=[]), "0 train_shards, the track has 2; 0 val_shards"),
        (edit_facts(end=""), "did not finish"),
        (edit("run.json", '"end"', '"ended"'), "did not finish"),
        (edit("log.txt", "\nclass Muon", "\nclass  Muon"), "code in log.txt does not have the SHA-256"),
        (
            edit("log.txt", '"learning_rate": 0.01', '"learning_rate": 0.02'),
            "configuration in log.txt is not that of run.json",
        ),
        (
            edit("log.txt", "\nstep:5/10 val_loss:", "\nstep:5/10 val_loss:0"),
            "metrics.jsonl and log.txt do not agree on steps",
        ),
        (remove_last_row, "do not agree on steps"),
        (
            edit("run.json", '"final_val_loss": ', '"final_val_loss": 1'),
            "final_val_loss in run.json is not the last",
        ),
        (
            edit("run.json", '"tokens_per_step": 192', '"tokens_per_step": 100'),
            "tokens_per_step is not batch_size x sequence_length",
        ),
        (edit_rows(late_step_5), ": steps or times do not rise"),
        (
            edit_rows(lambda row: {**row, "train_time_ms": 0.0}),
            ": steps or times do not rise in metrics.jsonl$",
        ),
        (
            edit_rows(lambda row: {**row, "train_time_ms": 1000 * row["train_time_ms"]}),
            "closer together than the training time",
        ),
        (
            edit_rows(lambda row: row if row["step"] != 5 or "train_loss" in row else None),
            "not have one val_loss for every 5 steps up to 10",
        ),
    ],
)
def test_damaged_run_is_refused(ledger, damage, words):
    damage(ledger.runs[1])
    with pytest.raises(UserError, match=f"muon_1.*{words}"):
        records.check_run(ledger.runs[1], ledger.read_track())


@pytest.mark.parametrize(
    "line",
    [
        "step:10/10 val_loss:1.1000 train_time:999999ms",  # no step_avg
        "step:10/10 val_loss:1.1000 train_time:999999ms step_avg:1ms and more",
        "step:12/12 val_loss:0.5000 train_time:999999ms step_avg:1ms",
        "step:12/12 lr:0.1 train_loss:0.5 val_loss:0.5 train_time:999s",
        "[default0]:step:10/10 val_loss:1.1000 train_time:999999ms step_avg:1ms",
        "0: step:10/10 val_loss:1.1000 train_time:999999ms step_avg:1ms",
        "\x1b[Kstep:10/10 val_loss:1.1000 train_time:999999ms step_avg:1ms",
        "step:11/11 train_loss:nan train_time:999999ms",
    ],
)
@pytest.mark.parametrize("where", ["code", "machine", "end"])
def test_forged_line_is_refused(ledger, line, where):
    run = ledger.runs[0]
    code, machine, config, losses = (run / "log.txt").read_text().split(records.RULER)
    if where == "code":
        zero = "step:0/10 val_loss:9.0000 train_time:0ms step_avg:nanms"
        code = f"{zero}\n{line}\n{code}"
        edit_facts(code_sha256=hashlib.sha256((code + "\n").encode()).hexdigest())(run)
    elif where == "machine":
        machine += f"\n{line}"
    else:
        losses += line + "\n"
    (run / "log.txt").write_text(records.RULER.join([code, machine, config, losses]))
    with pytest.raises(UserError, match="do not agree on steps|runs in its log.txt|other evaluations"):
        records.check_run(run, ledger.read_track())


def test_steps_of_the_schedule_are_those_of_run_json(ledger):
    edit("log.txt", "\nstep:10/10 val_loss", "\nstep:10/20 val_loss")(ledger.runs[0])
    with pytest.raises(UserError, match="log.txt is of 20 steps, run.json of 10"):
        records.check_run(ledger.runs[0], ledger.read_track())


def under_seed(run, folder, **seeds):
    """A copy of the run that claims other seeds, with other times."""
    shutil.copytree(run, folder)
    facts = json.loads((run / "run.json").read_text())
    facts["config"] |= seeds
    (folder / "run.json").write_text(json.dumps(facts))
    code, machine, _, losses = (run / "log.txt").read_text().split(records.RULER)
    config = json.dumps(facts["config"], indent=1)
    (folder / "log.txt").write_text(records.RULER.join([code, machine, config, losses]))
    edit_rows(lambda row: {**row, "train_time_ms": row["train_time_ms"] + 0.0004 * row["step"]})(folder)
    return folder


@pytest.mark.parametrize("seeds", [dict(seed=5), dict(data_seed=5)])
def test_a_run_under_several_seeds_is_refused(ledger, tmp_path, seeds):
    claimed = under_seed(ledger.runs[0], tmp_path / "claimed", **seeds)
    records.check_run(claimed, ledger.read_track())  # alone it looks right
    words = "have the same losses to the last digit"
    refused(ledger.add(ledger.runs[0], claimed), words)
    refused(ledger.add(claimed, ledger.runs[0]), words)
    assert ledger.add(*ledger.runs).returncode == 0
    refused(ledger.add(claimed, name="second"), words)
    final = records.read_metrics(claimed)[-1]["val_loss"]
    edit("metrics.jsonl", json.dumps(final), json.dumps(final + 1e-9))(claimed)  # one of them changed
    edit_facts(final_val_loss=final + 1e-9)(claimed)
    refused(ledger.add(claimed, name="second"), words)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("n_layer = 2", "n_layer = 3", "n_layer = 2, the track has 3"),
        ("batch_size = 12", "batch_size = 24", "batch_size = 12, the track has 24"),
        ("val_tokens = 384", "val_tokens = 368", "val_tokens = 384, the track has 368"),
        (
            "tokens = 1000",
            "tokens = 999",
            "val_shards: val_000000.bin has tokens 1000, the track's val_000000.bin has 999",
        ),
        (
            'name = "train_000002.bin"',
            'name = "other.bin"',
            "train_000002.bin has name train_000002.bin, the track's other.bin has other.bin",
        ),
        ('sha256_of_first_mebibyte = "', 'sha256_of_first_mebibyte = "0', "sha256_of_first_mebibyte"),
        ("[config]", "[config", "not valid TOML"),
        ("title =", "name =", "it lacks title"),
        (
            "target_val_loss = 5.0",
            "target_val_loss = nan",
            "it.target_val_loss is nan, not a finite number",
        ),
    ],
)
def test_other_or_broken_track_is_refused(ledger, old, new, words):
    edit("track.toml", old, new)(ledger.folder)
    with pytest.raises(UserError) as raised:
        records.check_run(ledger.runs[0], ledger.read_track())
    assert words in str(raised.value)


def test_a_shuffled_order_needs_all_shards(ledger):
    facts = json.loads((ledger.runs[0] / "run.json").read_text())
    track = ledger.read_track()
    facts["train_shards"].append(dict(facts["train_shards"][0], name="train_000003.bin"))
    assert not records.track_faults(facts, track)  # which the files' order does not reach
    facts["config"]["data_seed"] = 1
    assert records.track_faults(facts, track) == ["3 train_shards, the track has 2"]


def test_validation_shard_in_training_is_refused(ledger):
    facts = json.loads((ledger.runs[0] / "run.json").read_text())
    copy = dict(facts["val_shards"][0], name="train_000003.bin")
    edit_facts(train_shards=[*facts["train_shards"], copy])(ledger.runs[0])
    words = "the validation shard val_000000.bin is among the training shards, there as train_000003.bin"
    refused(ledger.add(ledger.runs[0]), words)


def test_unknown_track():
    with pytest.raises(UserError, match="no track 'gpu'; the tracks are cpu, mini, speedrun"):
        records.read_track("gpu")


# samples


def test_greedy_samples(tiny):
    torch.manual_seed(0)
    model = GPT(tiny)
    tokens = [1, 2, 3]
    for _ in range(20):  # beyond the context of 16
        with torch.no_grad():
            tokens.append(int(model.logits(torch.tensor([tokens[-16:]]))[0, -1].argmax()))
    for greedy in (dict(temperature=0), dict(top_k=1), dict(temperature=1e-320)):
        assert list(sample.generate(model, [1, 2, 3], 20, 16, **greedy)) == tokens[3:], greedy
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(sample.UserError, match="had diverged"):
        next(sample.generate(model, [1], 1, 16))


def test_samples_follow_the_softmax(tiny):
    torch.manual_seed(0)
    model = GPT(tiny)
    with torch.no_grad():
        expected = (model.logits(torch.tensor([[5]]))[0, -1] / 0.7).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    tokens = []
    for _ in range(2000):
        tokens.append(next(sample.generate(model, [5], 1, 16, 0.7, generator=generator)))
    counts = np.bincount(tokens, minlength=64)
    wanted = 2000 * expected.double().numpy()
    assert wanted.min() > 5
    assert stats.chisquare(counts, wanted * 2000 / wanted.sum()).pvalue > 0.001


def test_sample_is_text(start, tmp_path, call):
    start(run_name="a", vocab_size=256)
    arguments = [tmp_path / "logs/a", "--prompt", "Ay, é ", "--tokens", 30, "--device", "cpu"]
    text = call(sample, *arguments).stdout
    assert text.startswith("Ay, é ")
    assert len(text) > 8
    assert text == call(sample, *arguments).stdout
    assert text != call(sample, *arguments, "--seed", 1).stdout
    coldest = call(sample, *arguments, "--temperature", 0).stdout
    assert call(sample, *arguments, "--temperature", 1e-40).stdout == coldest


def test_what_cannot_be_sampled(ledger, call):
    refused(call(sample, ledger.runs[0]), "vocab_size = 64: neither bytes")
    shutil.rmtree(ledger.runs[0] / "checkpoints")
    refused(call(sample, ledger.runs[0]), "no checkpoint")

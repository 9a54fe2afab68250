"""File finished runs as a record, after checking that they belong to the track and that what they wrote is whole and agrees.

    python scripts/add_record.py logs/cpu/* --track cpu --name baselines --note "Rates tuned with 16 trials each."

records/TRACK/DATE_NAME/ gets a folder with log.txt, metrics.jsonl and run.json for each run (no weights), and a README.md with the note and the
comparison, to which you may add. DATE is the day on which the last run ended. Then `python scripts/leaderboard.py` takes it into
records/README.md; a record whose NAME ends with `study` is linked there but has no rows in the table.

Checked: data, model, batch and validation are the track's (records/TRACK/track.toml); the run came to its end; the code in log.txt has the
SHA-256 of run.json, and the configuration there is the same; steps and times rise; every evaluation and training loss that the
configuration asks for is there; metrics.jsonl and log.txt tell the same.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import compare
from train_gpt2 import UserError

RECORDS = ROOT / "records"
FILES = ("log.txt", "metrics.jsonl", "run.json")
RULER = "\n" + "=" * 100 + "\n"
MEASURED = re.compile(r"^step:(\d+)/(\d+) (val_loss|train_loss):(\S+) train_time:(\d+)ms step_avg:\S+ms$", re.MULTILINE)


def read_track(name, records=RECORDS):
    """track.toml of the track `name`. Raises UserError if there is none."""
    try:
        return tomllib.loads((records / name / "track.toml").read_text())
    except OSError:
        tracks = ", ".join(sorted(path.parent.name for path in records.glob("*/track.toml")))
        raise UserError(f"there is no track '{name}'; the tracks are {tracks}") from None


def track_faults(facts, track):
    """Sentences on what makes a run with these `facts` (run.json) none of the track (track.toml)."""
    config = facts["config"]
    faults = [f"{name} = {config.get(name)!r}, the track has {value!r}" for name, value in track["config"].items() if config.get(name) != value]
    for kind in ("train_shards", "val_shards"):
        ours, theirs = track[kind], facts[kind]
        if kind == "train_shards" and config["allow_repeat"] and len(theirs) != len(ours):
            faults.append(f"{len(theirs)} training shards, the track has {len(ours)}")
        for mine, other in zip(ours, theirs):
            faults += [f"{kind}: {other['name']} has {key} {other.get(key)}, the track's {mine['name']} has {value}"
                       for key, value in mine.items() if other.get(key) != value]
    if facts["config"]["num_iterations"] * facts["tokens_per_step"] > sum(shard["tokens"] for shard in track["train_shards"]) \
            and not config["allow_repeat"]:
        faults.append("it trained on more tokens than the track has")
    return faults


def log_faults(facts, log, metrics, target, folder):
    """Sentences on what is missing or contradictory in run.json's `facts`, the text of log.txt and the objects of metrics.jsonl in `folder`.

    Only a run that stopped at the track's `target` may have ended early.
    """
    config, parts = facts["config"], log.split(RULER)
    if len(parts) < 4:
        return ["log.txt does not consist of code, machine, configuration and losses"]
    faults = []
    if hashlib.sha256((parts[0] + "\n").encode()).hexdigest() != facts["code_sha256"]:
        faults.append("the code in log.txt does not have the SHA-256 of run.json")
    if json.loads(parts[-2]) != config:
        faults.append("the configuration in log.txt is not that of run.json")
    if "end" not in facts:
        faults.append("the run did not come to its end")
    lines = [(int(step), name, loss, int(ms)) for step, _, name, loss, ms in MEASURED.findall(parts[-1])]
    told = [(r["step"], name, f"{r[name]:.4f}", r["train_time_ms"]) for r in metrics for name in ("train_loss", "val_loss") if name in r]
    if [line[:3] for line in lines] != [line[:3] for line in told] or any(abs(a[3] - b[3]) > 0.501 for a, b in zip(lines, told)):  # rounded
        faults.append("metrics.jsonl and log.txt do not tell the same steps, losses and times")
    if any(a["step"] > b["step"] or a["train_time_ms"] > b["train_time_ms"] for a, b in zip(metrics, metrics[1:])):
        faults.append("steps or times go back in metrics.jsonl")
    last = facts.get("steps", config["num_iterations"])
    for name, every, first in (("val_loss", config["val_loss_every"], 0), ("train_loss", config["log_every"], config["log_every"])):
        wanted = [*range(first, last, every)] if every else []
        if name == "val_loss" or last == config["num_iterations"] or last % every == 0:
            wanted.append(last)
        if [step for step, kind, *_ in lines if kind == name] != wanted:
            faults.append(f"log.txt does not have one {name} for every {every} steps up to {last}")
    finals = [r["val_loss"] for r in metrics if "val_loss" in r][-1:]
    stopped = config["stop_at_target"] and finals and finals[0] <= target
    if last != config["num_iterations"] and not stopped:
        faults.append(f"it ended at step {last} of {config['num_iterations']}")
    if finals != [facts.get("final_val_loss")]:
        faults.append("final_val_loss in run.json is not the last in metrics.jsonl")
    source = facts.get("optimizer_sha256")
    if source and hashlib.sha256((folder / "optimizer.py").read_bytes()).hexdigest() != source:
        faults.append("optimizer.py does not have the SHA-256 of run.json")
    if facts["tokens_per_step"] != config["batch_size"] * config["sequence_length"]:
        faults.append("tokens_per_step is not batch_size x sequence_length")
    return faults


def check_run(folder, track):
    """Raises UserError, naming all that is wrong, unless the run in `folder` is complete, consistent and of the track. Returns run.json."""
    try:
        facts = json.loads((folder / "run.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        faults = track_faults(facts, track) + log_faults(facts, (folder / "log.txt").read_text(), metrics, track["target_val_loss"], folder)
    except OSError as error:
        raise UserError(f"{folder}: {Path(error.filename).name} cannot be read ({error.strerror}); is it the folder of a run?") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: what it holds was not written by train_gpt2.py ({type(error).__name__}: {error})") from None
    if faults:
        raise UserError(f"{folder}: " + "; ".join(faults))
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--track", required=True, help="cpu, mini, books, speedrun")
    parser.add_argument("--name", required=True, help="what was run, in a few words joined by _")
    parser.add_argument("--note", default="", help="a sentence or two for the record's README.md")
    parser.add_argument("--records", type=Path, default=RECORDS, help=argparse.SUPPRESS)  # for the tests
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+", args.name):
        raise UserError(f"--name '{args.name}': letters, digits, _ . and - only, since it names a folder")
    folders = [run for run in args.run if not run.is_file()]  # a shell's * may bring plots along
    names = [run.resolve().name for run in folders]
    if not folders or len(set(names)) < len(names):
        raise UserError("the runs must be folders of different names: " + ", ".join(map(str, args.run)))
    track = read_track(args.track, args.records)
    facts = [check_run(run, track) for run in folders]
    filed = {path.read_bytes(): path.parent for path in (args.records / args.track).glob("*/*/metrics.jsonl")}
    for run in folders:
        place = filed.get((run / "metrics.jsonl").read_bytes())
        if place:
            raise UserError(f"{run} is filed already, in {place}")
    target = args.records / args.track / f"{max(fact['end'] for fact in facts)[:10]}_{args.name}"
    if target.exists():
        raise UserError(f"{target} is there already; choose another --name")

    runs = [compare.read_log(run) for run in folders]
    groups = compare.groups(runs)
    for group in groups:
        seeds = [run.config["seed"] for run in group.runs]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{', '.join(run.name for run in group.runs)} are runs of one configuration with the seeds {seeds}: file each seed once")
    summaries = compare.compare(groups, None, track["target_val_loss"])
    results = compare.tables(summaries, compare.find_baseline(groups).label, track["target_val_loss"])
    commits = {(fact["machine"]["git_commit"] or "unknown")[:12] + " with changes" * fact["machine"]["git_changes"] for fact in facts}
    text = [f"# {args.name.replace('_', ' ')}", *filter(None, [args.note]),
            f"{'; '.join(compare.machines(runs))}; torch {', '.join(sorted({fact['machine']['torch'] for fact in facts}))}; "
            f"code at commit {', '.join(sorted(commits))}.",
            *(f"```\n{title}\n{compare.plain(rows)}\n```\n{meaning}" for title, rows, meaning in results[1:]),
            *(f"Note: {remark}." for remark in compare.notes(runs, runs, track["target_val_loss"]))]
    partial = target.with_name(".adding")
    shutil.rmtree(partial, ignore_errors=True)
    for run, name in zip(folders, names):
        (partial / name).mkdir(parents=True)
        for file in (*FILES, "optimizer.py"):  # the last where somebody's own optimizer was trained
            if (run / file).exists():
                shutil.copyfile(run / file, partial / name / file)
    (partial / "README.md").write_text("\n\n".join(text) + "\n")
    os.rename(partial, target)
    print(f"{target}: {len(folders)} runs filed; now run `python scripts/leaderboard.py`, and commit both")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")

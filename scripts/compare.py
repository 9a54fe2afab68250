"""Compare runs: steps and training seconds to the target loss, as a table and a plot.

    python scripts/compare.py logs/cpu_20261122-031500 [--target 1.7] [--png logs/compare.png]

PATH is a run's folder, a folder of such folders, or a log in the speedrun's text format. The first evaluation at or below the target and
the one before it are joined by a straight line; where that line meets the target is the time to target.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

EVALUATION = re.compile(r"^step:(\d+)/(\d+) val_loss:(\S+) train_time:([\d.]+)(ms|s)\b", re.MULTILINE)


@dataclass
class Run:
    """A run's evaluations: step, loss and training seconds of each, in order."""
    name: str
    facts: dict  # run.json, empty without one
    steps: list
    losses: list
    seconds: list

    def to_target(self, target):
        """(steps, seconds) at which the loss first met `target`, by linear interpolation; None if it never did."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return self.steps[0], self.seconds[0]
                part = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                return tuple(values[i - 1] + part * (values[i] - values[i - 1]) for values in (self.steps, self.seconds))
        return None


def read_log(path):
    """The Run in a log.txt, or a folder that has one, whatever stands before its lines. SystemExit if there is none."""
    path = Path(path)
    log = path / "log.txt" if path.is_dir() else path
    facts = log.with_name("run.json")
    try:
        found = EVALUATION.findall(log.read_text(encoding="utf-8", errors="replace"))
        facts = json.loads(facts.read_text()) if facts.exists() else {}
    except (OSError, ValueError) as error:
        sys.exit(f"error: {log} or the run.json beside it cannot be read: {error}")
    if not found:
        sys.exit(f"error: {log} has no line such as 'step:125/6200 val_loss:5.2017 train_time:24564ms'; is it the log of a run?")
    rows = [(int(step), float(loss), float(time) / (1000 if unit == "ms" else 1)) for step, _, loss, time, unit in found]
    return Run(log.parent.name if log.name == "log.txt" else log.stem, facts, *map(list, zip(*rows)))


def find_logs(path):
    path = Path(path)
    if not path.is_dir() or (path / "log.txt").exists():
        return [path]
    logs = sorted(log.parent for log in path.glob("**/log.txt"))
    return logs or sys.exit(f"error: no log.txt in {path} or below it")


def table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]) for row in rows)


def plot(runs, target, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    lowest = min(min(run.losses) for run in runs)
    top = max(run.losses[len(run.losses) // 5] for run in runs)  # the first fifth would hide the differences of the rest
    for axis, what in zip(axes, ("steps", "seconds")):
        for run in runs:
            axis.plot(getattr(run, what), run.losses, marker=".", markersize=4, label=run.name)
        axis.axhline(target, color="grey", linestyle=":", linewidth=1, label=f"target {target:g}")
        axis.set_xlabel({"steps": "step", "seconds": "training time (s)"}[what])
        axis.set_ylim(lowest - 0.05 * (top - lowest), top)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("validation loss")
    axes[1].legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+", help="runs or logs")
    parser.add_argument("--target", type=float, help="target loss (default: target_val_loss of the first run, else 3.28)")
    parser.add_argument("--png", type=Path, help="write a plot of loss against steps and seconds")
    args = parser.parse_args()
    runs = sorted((read_log(log) for path in args.path for log in find_logs(path)), key=lambda run: run.losses[-1])
    target = args.target or runs[0].facts.get("config", {}).get("target_val_loss", 3.28)
    rows = [("run", f"steps to {target:g}", f"seconds to {target:g}", "final loss", "steps", "seconds", "ms/step")]
    for run in runs:
        reached = run.to_target(target)
        rows.append((run.name, *([f"{reached[0]:.0f}", f"{reached[1]:.1f}"] if reached else ["not reached"] * 2), f"{run.losses[-1]:.4f}",
                     str(run.steps[-1]), f"{run.seconds[-1]:.1f}", f"{1000 * run.seconds[-1] / max(1, run.steps[-1]):.1f}"))
    print(table(rows))
    if args.png:
        plot(runs, target, args.png)
        print(f"\nplot: {args.png}")


if __name__ == "__main__":
    main()

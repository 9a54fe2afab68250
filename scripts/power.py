"""Write records/power/README.md: how many seeds the verdict of scripts/replicate.py takes.

    python scripts/power.py                 two minutes
    python scripts/power.py --trials 100    coarser, in half a minute

Final losses are simulated with the noise of the tracks, and judged as replicate.py judges them. The noise of
the CPU track comes from its filed records, that of the speedrun from its published rules. It is written to
noise.json, from which replicate.py says before it starts how small a saving its seeds can show.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command, markdown
import numpy as np

from harness import runs
from harness.estimates import SPEEDRUN_SD, SPEEDRUN_SLOPE
from harness.sequential import Noise, detectable, is_wrong, levels, simulate
from train_gpt2 import UserError

RECORDS = ROOT / "records" / "power"
CPU_RECORDS = ("2026-11-25_muon_newton_muon_adamw", "2026-11-28_momentum_0.9")
SEEDS = (3, 5, 10, 20)
SAVINGS = (0, 0.01, 0.02, 0.03, 0.04, 0.045, 0.05, 0.055, 0.06, 0.07)
LOOKS = tuple(range(3, 31))
WORDS = ("reproduced", "partly", "not reproduced", "undecided")


def filed_noise(folder):
    """Noise of the filed comparison in `folder`: Muon and Newton-Muon at N steps, Newton-Muon at fewer."""
    arms = {}
    for path in folder.glob("*/run.json"):
        facts = runs.read_facts(path.parent)
        config = facts["config"]
        arm = arms.setdefault((config["optimizer"], config["num_iterations"]), {})
        arm[config["seed"]] = facts["final_val_loss"]
    N = max(steps for optimizer, steps in arms if optimizer == "newton_muon")
    short = min(steps for optimizer, steps in arms if optimizer == "newton_muon")
    chosen = [arms["muon", N], arms["newton_muon", N], arms["newton_muon", short]]
    seeds = sorted(set.intersection(*map(set, chosen)))
    losses = np.array([[arm[seed] for seed in seeds] for arm in chosen])
    sd = np.sqrt(losses.var(1, ddof=1).mean())
    correlation = np.corrcoef(losses)[np.triu_indices(3, 1)].mean()
    slope = (losses[2].mean() - losses[1].mean()) / (1 - short / N)
    return Noise(float(sd), float(correlation), float(slope))


def measure_noise():
    """{track: Noise}."""
    filed = [filed_noise(ROOT / "records/cpu" / name) for name in CPU_RECORDS]
    return {"cpu": Noise(*(float(np.mean(values)) for values in zip(*filed))),
            "speedrun": Noise(SPEEDRUN_SD, 0.0, 6200 * SPEEDRUN_SLOPE)}


def percent(share):
    return f"{share:.0%}".replace("%", " %")


def smallest_savings(noise):
    """Table: the saving that is told from none in 80 % of comparisons, by seeds and plan."""
    rows = [("seeds", "planned, one look", "of 10 planned, first look", "of 30 planned, first look")]
    for seeds in (*SEEDS, 30):
        cells = [f"{100 * detectable(noise, seeds):.1f} %"]
        for planned in (10, 30):
            if seeds > planned:
                cells.append("")
                continue
            level = levels((seeds,), planned)[-1]
            cells.append(f"{100 * detectable(noise, seeds, level):.1f} %")
        rows.append((str(seeds), *cells))
    return markdown(rows)


def shares_of_words(noise, trials):
    """Table: how often the first answer is yes, and the verdict each of WORDS, for one planned look."""
    rows = [("true saving", *(f"{seeds} seeds: fewer steps; verdict" for seeds in SEEDS))]
    for saving in SAVINGS:
        cells = [f"{100 * saving:.1f} %"]
        for seeds in SEEDS:
            answers = [answer for answer, _ in simulate(noise, saving, (seeds,), seeds, trials)]
            fewer = sum(answer.fewer.word == "yes" for answer in answers) / trials
            count = Counter(answer.word for answer in answers)
            shares = " / ".join(f"{count[word] / trials:.0%}".rstrip("%") for word in WORDS)
            cells.append(f"{percent(fewer)}; {shares}")
        rows.append(tuple(cells))
    return markdown(rows)


def repeated_looks(noise, trials):
    """Table: what comes of adding seeds until both questions are decided, corrected for the looks or not."""
    rows = [("true saving", "wrong, corrected", "wrong, not corrected", "undecided, corrected",
             "seeds, corrected", "seeds, not corrected")]
    for saving in (0, 0.02, 0.03, 0.04, 0.055, 0.06):
        corrected = simulate(noise, saving, LOOKS, LOOKS[-1], trials)
        naive = simulate(noise, saving, LOOKS, None, trials)
        wrong = []
        for found in (corrected, naive):
            wrong.append(np.mean([is_wrong(answer, saving) for answer, _ in found]))
        undecided = np.mean([answer.word == "undecided" for answer, _ in corrected])
        seeds = [np.mean([seeds for _, seeds in found]) for found in (corrected, naive)]
        rows.append((f"{100 * saving:.1f} %", *(f"{100 * share:.1f} %" for share in wrong),
                     percent(undecided), *(f"{mean:.1f}" for mean in seeds)))
    return markdown(rows)


HEAD = """# How many seeds does a verdict take?

`python scripts/power.py` writes this page: final losses simulated with the noise of a track, and judged as
`scripts/replicate.py` judges them. {trials:,} comparisons for each figure, so a share is known to about
{error:.0f} percentage points (95 %).

**Looking again.** A 95 % interval is for one look, after a number of seeds that was fixed beforehand.
Somebody who adds seeds and looks until the question is decided is wrong more often: see "Adding seeds until
it is decided". So replicate.py fixes the largest number of seeds before the first run (`--planned_seeds`, 10
if nothing is said; kept in `plan.json` in the folder of the runs) and notes every look. After n of N planned
seeds, n / N of the 5 % may have been spent; the interval of each look is wider accordingly
(`harness/sequential.py`). All looks together miss the truth in 5 % of comparisons. If all planned seeds are
run before the first look, it is the plain 95 % interval.

How to read the tables:

- **Smallest saving**: the true saving that is told from none in 80 % of comparisons.
- **Fewer steps; verdict**: how often "Does Newton-Muon need fewer steps than Muon?" is answered yes; then how
  often, in percent, the verdict is reproduced / partly / not reproduced / undecided.
- **Adding seeds**: from 3 seeds on, one more for each arm until both questions are decided or 30 are reached.
  *Wrong* is a verdict with an answer that is not so: fewer steps without a saving, or the reverse; "saves as
  much as claimed" at a true saving of 3 % or less, or "does not" at 5.5 % or more.
"""
SECTION = """## {track}

The standard deviation of the final loss is {sd:.4f}, its correlation over shared seeds {correlation:.2f}.
1 % of the steps is worth {percent:.4f} in final loss.

Smallest saving:

{smallest}
{told}

Fewer steps; verdict, after one planned look:

{words}
Adding seeds until it is decided:

{repeated}"""


def what_can_be_told(noise):
    """Sentences on 3, 5 and 10 seeds, from the same formula as the table."""
    lines = []
    for seeds in (3, 5, 10):
        smallest = detectable(noise, seeds)
        line = f"- With {seeds} seeds a saving of {100 * smallest:.1f} % or more can be detected."
        if smallest > 0.06:
            line += " That is more than the claim: most verdicts are undecided."
        elif smallest > 0.03:
            line += " A true saving of half the claim would mostly be missed."
        lines.append(line)
    lines.append("- Between 4 and 5.5 % true saving the verdict depends on chance. "
                 "\"Saves as much as claimed\" needs an interval above 3 %, \"does not\" an interval below "
                 "5.5 %, and such a saving can give either.")
    return "\n".join(lines)


def page(tracks, trials):
    parts = [HEAD.format(trials=trials, error=100 * 1.96 * 0.5 / trials ** 0.5)]
    for track, noise in tracks.items():
        parts.append(SECTION.format(
            track=track, sd=noise.sd, correlation=noise.correlation, percent=noise.slope / 100,
            smallest=smallest_savings(noise), told=what_can_be_told(noise),
            words=shares_of_words(noise, trials), repeated=repeated_looks(noise, trials)))
        print(f"{track}: done", flush=True)
    return "\n".join(parts)


@command()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400,
                        help="simulated comparisons for each figure (default: 400)")
    parser.add_argument("--out", type=Path, default=RECORDS,
                        help="folder of the page (default: records/power)")
    args = parser.parse_args()
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: must be at least 1")
    tracks = measure_noise()
    args.out.mkdir(parents=True, exist_ok=True)
    noise = {track: noise._asdict() for track, noise in tracks.items()}
    (args.out / "noise.json").write_text(json.dumps(noise, indent=1) + "\n")
    (args.out / "README.md").write_text(page(tracks, args.trials), encoding="utf-8")
    print(args.out / "README.md")


if __name__ == "__main__":
    main()

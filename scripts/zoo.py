"""Compare the optimizers of optimizers/ with Muon, all tuned alike: records/zoo/README.md.

    python scripts/zoo.py --jobs 2                     all on the CPU track, half an hour each on two cores
    python scripts/zoo.py --optimizers soap,normuon    these, and Muon, with which all are compared
    python scripts/zoo.py --optimizers soap --refine   this, and Muon, tuned until no value is at an end
    python scripts/zoo.py --track mini                 the same on a GPU, with configs/mini_*.toml
    python scripts/zoo.py --page                       only write the page of what has been run
    python scripts/zoo.py --records logs/wide --n_embd 128    a comparison of your own

Tuning tries 12 points of an optimizer, each with the seeds 100 and 101 (seed and data_seed alike),
and takes the one with the lowest mean final loss. The second seed is skipped where the first ends
0.02 above the best. That is three standard deviations of Muon's runs on the CPU track, so such a
point would hardly win. The 12 points are
- 9: 3 x 3 pairs of learning_rate and hidden_learning_rate, a factor of 2 apart;
- 2: other values of the setting that matters most, at the best pair;
- 1: a neighbour of the best of these 11, the first that was not tried, at a factor of 2 or else of
  the square root of 2.
The centre of the pairs is set for the CPU track; elsewhere it scales with the rates of the track's
Muon configuration.

The best of them may have a rate or setting at an end of what was tried. With --refine the tuning goes
on until the best point is inside: until, along both rates and the setting, points were tried on both
sides of it that differ in nothing else, or the axis ends there (a momentum of 0, a power of 1). The next
to try is always a neighbour of the best, on an axis and side without one, first on an axis whose other
side was tried: half or twice a rate or setting, and of 1 - value for a beta or momentum. It stops after
12 more points, the same for all. Then the results are run again where the best point has changed; the
older ones stay in runs.csv, and in a sentence of the page.

Results: the best point with the seeds 1 to 6. Muon is also run at 0.5 to 1.5 of the steps: that
says how many steps a difference in loss is worth. Time: scripts/bench.py alternates 10 steps of the
optimizer with 10 of Muon's, before anything is trained.

Every finished run is a line of records/zoo/TRACK/runs.csv and is not run again. The same command
continues, on any machine that has that file. To run something again, after a change of its code,
remove its lines there and its folders in logs/zoo_TRACK/. A run that diverges has the loss nan and
stays.
"""
import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import ROOT, command
from harness.jobs import PLANNED_FIELDS, fetch_data
from harness.zoo.optimizers import ZOO
from harness.zoo.page import RECORDS, write_page
from harness.zoo.page import mean_loss  # noqa: F401  for study.py of the width study, as are the next
from harness.zoo.table import TUNING_SEEDS, Point, Table  # noqa: F401
from harness.zoo.training import Track
from train_gpt2 import MAY_CHANGE_ON_RESUME, UserError


def compare_all(track, names, records, refine=False):
    """Measures, tunes and runs the optimizers, and writes the page after each.

    UserError if some of them are not complete.
    """
    for name in names:
        track.measure(name)
    failed = []
    # several at once: while one optimizer waits for a run that decides its next, another trains
    with ThreadPoolExecutor(track.jobs) as pool:
        try:
            endings = [(name, pool.submit(track.compare, name, refine)) for name in names]
            for name, ending in endings:
                error = ending.exception()  # waits
                if error and not isinstance(error, (UserError, OSError)):
                    raise error
                if error:
                    failed.append(f"{name}: {error}")
                    print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
                write_page(records)
        except BaseException:
            track.training.stop()
            raise
    if failed:
        raise UserError(f"not complete: {'; '.join(failed)}")


def check_fields(given, records):
    """UserError if a field from the command line would make the runs others than those that are filed."""
    harmless = MAY_CHANGE_ON_RESUME.difference(PLANNED_FIELDS)
    for field in given:
        if field.startswith("--") and field[2:].split("=")[0] not in harmless and records == RECORDS:
            raise UserError(f"{field} makes this a different comparison from {RECORDS}; "
                            "give it a folder of its own with --records FOLDER")


def parse():
    """(options, fields of the configuration as they were given) of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options] [--field value ...]")
    parser.add_argument("--optimizers", default=",".join(ZOO), metavar="NAME,...",
                        help=f"of {', '.join(ZOO)} (default: all)")
    parser.add_argument("--track", choices=("cpu", "mini"), default="cpu", help="(default: cpu)")
    parser.add_argument("--refine", action="store_true",
                        help="go on tuning until no best value is at an end, with 12 more points at most")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at a time; they share the CPU cores (default: 1)")
    parser.add_argument("--log_dir", type=Path,
                        help="folder of the runs, relative to the repository (default: logs/zoo_TRACK)")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER",
                        help="of the page and its tables, for one choice of fields (default: records/zoo)")
    return parser.parse_known_args()


@command()
def main():
    args, given = parse()
    args.records = args.records.resolve()
    os.chdir(ROOT)  # configurations name their data from there
    names = args.optimizers.split(",")
    unknown = [name for name in names if name not in ZOO]
    if unknown:
        raise UserError(f"there is no optimizer '{unknown[0]}' here; there are {', '.join(ZOO)}")
    check_fields(given, args.records)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if args.page or args.check:
        write_page(args.records, args.check)
        return
    logs = args.log_dir or Path("logs") / f"zoo_{args.track}"
    table = Table(args.records / args.track / "runs.csv")
    track = Track(args.track, args.jobs, logs, given, table)
    fetch_data(args.track, given)
    with_muon = dict.fromkeys(["muon", *names])  # all are compared with it
    compare_all(track, list(with_muon), args.records, args.refine)


if __name__ == "__main__":
    main()

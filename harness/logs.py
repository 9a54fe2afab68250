"""The lines of a log in the speedrun's text format.

    step:125/6200 val_loss:5.2017 train_time:24564ms step_avg:213.60ms

is an evaluation, wherever it stands in the log and whatever stands between its fields.
"""
import math
import re
from typing import NamedTuple

LINE = re.compile(r"^step:(\d{1,12})/(\d{1,12}) (.*\btrain_time:.*)$", re.MULTILINE)
NUMBER = r"([-+]?(?:nan|inf|infinity|\d+(?:\.\d*)?(?:e[-+]?\d+)?))"
RULER = re.compile(r"^={20,}$", re.MULTILINE)  # stands between the parts of a log: code, machine, evaluations


class Evaluation(NamedTuple):
    step: int
    loss: float
    seconds: float  # of training until then; NaN if the log does not say
    planned: int  # steps of the schedule
    step_avg: float  # seconds; None if the log does not say


def number(text, unit=""):
    """The number in a field such as 3.2785 or, with the unit s, in 24564ms or 24.564s.

    None if there is none.
    """
    pattern = NUMBER
    if unit:
        pattern += f"(m?){unit}"
    found = re.fullmatch(pattern, text or "", re.IGNORECASE)
    if not found:
        return None
    value = float(found[1])
    return value / 1000 if unit and found[2] else value


def read_evaluation(step, planned, rest, loss):
    """The Evaluation in a line, given its parts by LINE; None if it has no loss of that name."""
    fields = dict(re.findall(r"(\w+):(\S+)", rest))
    value = number(fields.get(loss))
    training = number(fields.get("train_loss"))
    if value is None and training is not None and not math.isfinite(training):
        value = training  # the last that a run says before it ends
    if value is None:
        return None
    seconds = number(fields.get("train_time"), "s")
    if seconds is None or not abs(seconds) < 1e12:
        seconds = 0.0 if int(step) <= 10 else math.nan
    return Evaluation(int(step), value, seconds, int(planned), number(fields.get("step_avg"), "s"))


def evaluations(text, loss):
    """The evaluations in a log's `text` with the loss of that name: a list of Evaluations for each run."""
    runs = []
    for line in LINE.findall(text):
        evaluation = read_evaluation(*line, loss)
        if evaluation is None:
            continue
        if not runs or evaluation.step <= runs[-1][0].step:
            runs.append([])
        while runs[-1] and runs[-1][-1].step >= evaluation.step:  # what a resumed run did again
            runs[-1].pop()
        runs[-1].append(evaluation)
    kept = []
    for i, run in enumerate(runs):
        # a single early evaluation followed by more runs is an example in the logged code
        if len(run) > 1 or run[0].step == run[0].planned or i == len(runs) - 1:
            kept.append(run)
    return kept


def losses_in(text):
    """The names of the losses that a log's lines have, sorted."""
    names = set()
    for _, _, rest in LINE.findall(text):
        names.update(re.findall(r"(\w+loss):", rest))
    return sorted(names)


def logged_code(text):
    """The code that a log begins with; "" if it has none."""
    parts = RULER.split(text)
    if len(parts) == 1:
        return text[:LINE.search(text).start()].strip()
    for part in parts[:-1]:
        if part.strip():
            return part.strip()
    return ""

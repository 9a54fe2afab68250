"""The lines of a log in the speedrun's text format.

    step:125/6200 val_loss:5.2017 train_time:24564ms step_avg:213.60ms

is an evaluation, wherever it stands in the log and whatever stands between its fields. So is the same line as
`torchrun --tee` or `srun --label` show it, with the process in front, or `script`, with a terminal's codes.
read_lines() decides what such a line is, for all who read logs.
"""
import math
import re
from typing import NamedTuple

PROCESS = r"(?:\[[^][\n]{1,60}\]: ?|\d{1,6}: )?"  # "[default0]:" or "0: "
LINE = re.compile(rf"^{PROCESS}step:(\d{{1,12}})/(\d{{1,12}}) (.*\btrain_time:.*)$", re.MULTILINE)
# colours and cursor movements, titles of a window
TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
NUMBER = r"([-+]?(?:nan|inf|infinity|\d+(?:\.\d*)?(?:e[-+]?\d+)?))"
PLAIN = re.compile(NUMBER, re.IGNORECASE)
SECONDS = re.compile(NUMBER + "(m?)s", re.IGNORECASE)
RULER = re.compile(r"^={20,}$", re.MULTILINE)  # stands between the parts of a log: code, machine, evaluations


class Line(NamedTuple):
    """A line with the training time: a step and its fields, {name: text}."""
    step: int
    planned: int  # steps of the schedule
    fields: dict


class Evaluation(NamedTuple):
    step: int
    loss: float
    seconds: float  # of training until then; NaN if the log does not say
    planned: int
    step_avg: float  # seconds; None if the log does not say


def number(text):
    """The number in a field such as 3.2785; None if there is none."""
    found = PLAIN.fullmatch(text or "")
    return float(found[1]) if found else None


def seconds(text):
    """The seconds in a field such as 24564ms or 24.564s; None if there are none."""
    found = SECONDS.fullmatch(text or "")
    if not found:
        return None
    return float(found[1]) / 1000 if found[2] else float(found[1])


def read_fields(text):
    """{name: value} of the words such as val_loss:5.2017 in `text`; of equal names the last."""
    fields = {}
    for word in text.split():
        before, colon, value = word.partition(":")
        name = re.split(r"\W", before)[-1]
        if colon and name and value:
            fields[name] = value
    return fields


def without_terminal_codes(text):
    return TERMINAL_CODE.sub("", text) if "\x1b" in text else text


def has_lines(text):
    """Whether read_lines() finds any."""
    return LINE.search(without_terminal_codes(text)) is not None


def read_lines(text):
    """The Lines in a log's `text`, in order."""
    for step, planned, rest in LINE.findall(without_terminal_codes(text)):
        yield Line(int(step), int(planned), read_fields(rest))


def read_evaluation(line, loss):
    """The Evaluation in a Line; None if it has no loss of that name."""
    value = number(line.fields.get(loss))
    training = number(line.fields.get("train_loss"))
    if value is None and training is not None and not math.isfinite(training):
        value = training  # the last that a run says before it ends
    if value is None:
        return None
    time = seconds(line.fields.get("train_time"))
    if time is None or not abs(time) < 1e12:
        time = 0.0 if line.step <= 10 else math.nan
    return Evaluation(line.step, value, time, line.planned, seconds(line.fields.get("step_avg")))


def evaluations(text, loss):
    """The evaluations in a log's `text` with the loss of that name: a list of Evaluations for each run."""
    runs = []
    for line in read_lines(text):
        evaluation = read_evaluation(line, loss)
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
    for line in read_lines(text):
        names.update(name for name in line.fields if name.endswith("loss"))
    return sorted(names)


def logged_code(text):
    """The code that a log begins with; "" if it has none."""
    text = without_terminal_codes(text)
    parts = RULER.split(text)
    if len(parts) == 1:
        return text[:LINE.search(text).start()].strip()
    for part in parts[:-1]:
        if part.strip():
            return part.strip()
    return ""

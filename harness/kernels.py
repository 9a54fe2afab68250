"""Where a training step goes: the events of a torch.profiler trace, added up by groups of kernels.

bench.py --profile shows it.
"""
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import record_function

from train_gpt2 import synchronized_time

GROUPS = ("matrix products", "attention", "loss", "norms and elementwise", "optimizer", "statistics",
          "communication")
COMMUNICATION = re.compile("nccl|gloo|c10d", re.IGNORECASE)
ATTENTION = re.compile("flash|fmha|attention|sdpa", re.IGNORECASE)
PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk|triton_tem|^aten::(add|b|baddb)?mm$",
                     re.IGNORECASE)
LOSS = re.compile("loss|softmax|logsumexp|entropy", re.IGNORECASE)
GENERATED = re.compile("triton_(poi|per|red|for)_")  # Inductor's names also hold the operations nearby


def group(name, operations, phase):
    """The one of GROUPS in which a kernel counts.

    name: the kernel's. operations: those that launched it, from the outermost on. phase: of the step.
    """
    if COMMUNICATION.search(name):
        return "communication"
    if phase in GROUPS:
        return phase
    if GENERATED.match(name):
        return "loss" if LOSS.search(name) else "norms and elementwise"
    if ATTENTION.search(f"{name} {operations}"):
        return "attention"
    if PRODUCT.search(name):
        return "matrix products"
    return "loss" if LOSS.search(f"{name} {operations}") else "norms and elementwise"


def nest(calls):
    """Adds to each event of a thread `own`, its time without the events inside it, and `operations`, those
    around it."""
    stack = []
    for event in sorted(calls, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        event["own"] = event["dur"]
        event["operations"] = " ".join(outer["name"] for outer in stack)
        if stack:
            stack[-1]["own"] -= event["dur"]
        stack.append(event)


def covered(spans):
    """The length of the union of [(start, end), ...]."""
    total = until = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def executed(events):
    """[(event, call that launched it), ...]: a GPU's kernels or, without any, the operations of the CPU."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver"):
            threads[event["pid"], event["tid"]].append(event)
    for calls in threads.values():
        nest(calls)
    calls = [call for thread in threads.values() for call in thread]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return [(call, call) for call in calls]

    def correlation(event):
        return event.get("args", {}).get("correlation")
    launches = {correlation(call): call for call in calls if call["cat"] != "cpu_op"}
    return [(kernel, launches.get(correlation(kernel), kernel)) for kernel in kernels]


def where_it_goes(events):
    """The mean step in the events of a Chrome trace.

    Returns {groups: {group: ms}, with idle and wall; kernels: [{group, kernel, launches, ms}, ...], the
    longest first}. Steps and phases are the ranges bench:step, bench:optimizer and bench:statistics; a kernel
    belongs to those in which it was launched.
    """
    steps, phases = [], []
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith("bench:"):
            name = event["name"].removeprefix("bench:")
            span = (event["ts"], event["ts"] + event["dur"])
            if name == "step":
                steps.append(span)
            else:
                phases.append((name, *span))

    launches = defaultdict(int)  # by (group, kernel)
    microseconds = defaultdict(float)
    spans = []
    for event, call in executed(events):
        if not any(start <= call["ts"] < end for start, end in steps):
            continue
        phase = next((name for name, start, end in phases if start <= call["ts"] < end), "")
        key = group(event["name"], call.get("operations", ""), phase), event["name"]
        launches[key] += 1
        microseconds[key] += event.get("own", event["dur"])
        spans.append((event["ts"], event["ts"] + event["dur"]))

    def ms_a_step(microseconds):
        return round(microseconds / 1000 / len(steps), 4)
    groups = dict.fromkeys(GROUPS, 0.0)
    for (name, _), time in microseconds.items():
        groups[name] += time
    wall = sum(end - start for start, end in steps)
    groups.update(idle=wall - covered(spans), wall=wall)
    kernels = []
    for (name, kernel), count in launches.items():
        time = ms_a_step(microseconds[name, kernel])
        kernels.append(dict(group=name, kernel=kernel, launches=count / len(steps), ms=time))
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return dict(groups={name: ms_a_step(time) for name, time in groups.items()}, kernels=kernels)


def profiled(step, device, steps=2):
    """where_it_goes() of `steps` calls of step()."""
    with torch.profiler.profile() as profiler:
        step()  # the first one starts the profiler on the GPU, too
        for _ in range(steps):
            synchronized_time(device)
            with record_function("bench:step"):
                step()
                synchronized_time(device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    return where_it_goes(trace["traceEvents"])


def show(columns):
    """The table of {column: groups}."""
    width = max(map(len, columns)) + 2
    print("where a step goes, in ms")
    print(" " * 21 + "".join(f"{name:>{width}}" for name in columns))
    for name in next(iter(columns.values())):
        print(f"{name:21}" + "".join(f"{groups[name]:{width}.2f}" for groups in columns.values()))

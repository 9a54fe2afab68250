"""Where a training step goes: the events of a torch.profiler trace, added up by groups of kernels. bench.py --profile shows it."""
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import record_function

from train_gpt2 import synchronized_time

GROUPS = ("matrix products", "attention", "loss", "norms and elementwise", "optimizer", "statistics", "communication")


def group(name, operations, phase):
    """The one of GROUPS in which a kernel counts, by its name, the operations that launched it and the phase of the step."""
    if re.search("nccl|gloo|c10d", name, re.IGNORECASE):
        return "communication"
    if phase in GROUPS:
        return phase
    if not re.match("triton_(poi|per|red|for)_", name):  # Inductor names what it generates after the operations around it, too
        if re.search("flash|fmha|attention|sdpa", f"{name} {operations}", re.IGNORECASE):
            return "attention"
        if re.search(r"gemm|gemv|nvjet|cutlass|xmma|splitk|triton_tem|^aten::(add|b|baddb)?mm$", name, re.IGNORECASE):
            return "matrix products"
        name = f"{name} {operations}"
    return "loss" if re.search("loss|softmax|logsumexp|entropy", name, re.IGNORECASE) else "norms and elementwise"


def where_it_goes(events):
    """The mean step in the events of a Chrome trace: `groups`, {group: ms} with idle and wall, and `kernels`, the longest first.

    Steps and phases are the ranges bench:step, bench:optimizer and bench:statistics; a kernel belongs to those in which it was launched.
    """
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("bench:")]
    spans = [(e["name"][6:], e["ts"], e["ts"] + e["dur"]) for e in ranges]
    steps = [(start, end) for name, start, end in spans if name == "step"]
    threads, launched, work, rows = defaultdict(list), {}, [], defaultdict(lambda: [0, 0.0])
    for e in events:
        if e.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver"):
            threads[e["pid"], e["tid"]].append(e)
    for calls in threads.values():
        stack = []
        for e in sorted(calls, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"]:
                stack.pop()
            e["own"], e["operations"] = e["dur"], " ".join(outer["name"] for outer in stack)
            if stack:
                stack[-1]["own"] -= e["dur"]
            stack.append(e)
            if e["cat"] != "cpu_op":
                launched[e.get("args", {}).get("correlation")] = e
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    for e in kernels or [e for calls in threads.values() for e in calls]:
        call = launched.get(e.get("args", {}).get("correlation"), e) if kernels else e
        if not any(start <= call["ts"] < end for start, end in steps):
            continue
        phase = next((name for name, start, end in spans if name != "step" and start <= call["ts"] < end), "")
        row = rows[group(e["name"], call.get("operations", ""), phase), e["name"]]
        row[0] += 1 / len(steps)
        row[1] += e.get("own", e["dur"]) / 1000 / len(steps)
        work.append((e["ts"], e["ts"] + e["dur"]))
    busy, until = 0.0, 0.0
    for start, end in sorted(work):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    wall = sum(end - start for start, end in steps)
    groups = {name: sum(ms for key, (_, ms) in rows.items() if key[0] == name) for name in GROUPS}
    groups.update(idle=(wall - busy) / 1000 / len(steps), wall=wall / 1000 / len(steps))
    kernels = [dict(group=group, kernel=name, launches=launches, ms=round(ms, 4)) for (group, name), (launches, ms) in rows.items()]
    return dict(groups={name: round(ms, 4) for name, ms in groups.items()}, kernels=sorted(kernels, key=lambda kernel: -kernel["ms"]))


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
        return where_it_goes(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])


def show(columns):
    """The table of {column: groups}."""
    width = max(map(len, columns)) + 2
    print("where a step goes, in ms")
    print(" " * 21 + "".join(f"{name:>{width}}" for name in columns))
    for group in next(iter(columns.values())):
        print(f"{group:21}" + "".join(f"{totals[group]:{width}.2f}" for totals in columns.values()))

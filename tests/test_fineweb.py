"""data/fineweb.py against a local hub and its faults: `fetch` in this process, with a clock that only notes the waits, or `script`."""
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pty
import re
import signal
import termios
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import fineweb
from fake_hub import FakeHub
from faults import full_disk
from fineweb import shards_needed
from train_gpt2 import Config

VAL, ONE, TWO, THREE = NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
MB = 1_000_000
UNREACHABLE = "http://127.0.0.1:1"


def shard_bytes(tokens):
    return np.array([20240520, 1, len(tokens), *[0] * 253], "<i4").tobytes() + np.asarray(tokens, "<u2").tobytes()


def random_shard(n, seed):
    return shard_bytes(np.random.default_rng(seed).integers(0, 50257, n, np.uint16))


GOOD, OTHER = random_shard(5001, 1), random_shard(5001, 7)


@pytest.fixture
def hub():
    with FakeHub({name: random_shard(5000 + i, i) for i, name in enumerate(NAMES)}) as hub:
        yield hub


@pytest.fixture
def out(tmp_path):
    """The folder of the shards: present, so that tests can put files there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def fetch(hub, out, monkeypatch, call):
    """fetch(*arguments) runs main() in this process; returns its error or None, stdout, stderr and the seconds it waited."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes that an interruption loses at most
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def fetch(*arguments, url=hub.url):
        waits = []
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        hub.requests.clear()
        huggingface_hub.close_session()
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", waits.append)
            done = call(fineweb, "--out", out, *arguments)
        error = re.search(r"(?ms)^error: (.*)\Z", done.stderr)
        assert done.returncode == bool(error) and "Traceback" not in done.stderr
        return SimpleNamespace(error=error and error[1], stdout=done.stdout, stderr=done.stderr, waits=waits)
    return fetch


@pytest.fixture
def script(hub, out, launch, tmp_path):
    """script(*arguments, **Popen's) starts data/fineweb.py."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    return lambda *arguments, **options: launch("data/fineweb.py", *arguments, "--out", out, env=environment, **options)


def whole_files(out):
    """{name: content} of what carries a final name, without the manifest."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix not in (".json", ".partial")}


def partials(out):
    return sorted(path.name for path in out.glob("*.partial"))


def only(hub, *names):
    return {name: hub.files[name] for name in names}


# what is downloaded


def test_n_shards_are_fetched_and_listed(hub, fetch, out):
    done = fetch(2)
    assert done.error is None and whole_files(out) == only(hub, VAL, ONE, TWO) and partials(out) == []
    assert [done.stdout.count(f"] {name}: downloaded, good\n") for name in NAMES] == [1, 1, 1, 0]
    manifest = json.loads((out / "fineweb.json").read_text())
    assert manifest["shards"] == [dict(file=name, tokens=n, bytes=1024 + 2 * n, sha256=hashlib.sha256(hub.files[name]).hexdigest())
                                  for name, n in ((ONE, 5001), (TWO, 5002), (VAL, 5000))]
    assert manifest["tokenizer"] == "gpt2" and "kjj0/fineweb10B-gpt2" in manifest["source"]


def test_later_runs_fetch_only_what_is_missing(hub, fetch, out):
    fetch(1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    done = fetch(1)
    assert done.error is None and "all 2 files are there and good, 10,001 tokens" in done.stdout
    assert {request.method for request in hub.requests} == {"HEAD"} and {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / VAL).write_bytes(b"damaged")
    assert fetch(3).error is None and whole_files(out) == only(hub, *NAMES)
    assert {request.name for request in hub.requests if request.method == "GET"} == {VAL, TWO, THREE}
    assert [shard["file"] for shard in json.loads((out / "fineweb.json").read_text())["shards"]] == [ONE, TWO, THREE, VAL]


@pytest.mark.parametrize("content", ['{"shards": [', "[1]", "[" * 100_000, '{"shards": [{"file": 5}, {"file": "../out"}]}'])
def test_an_invalid_manifest_is_rewritten(hub, fetch, out, content):
    fetch(1)
    good = (out / "fineweb.json").read_text()
    (out / "fineweb.json").write_text(content)
    assert fetch(1).error is None and (out / "fineweb.json").read_text() == good


def test_several_files_are_fetched_together(hub, fetch):
    barrier = threading.Barrier(3)
    hub.faults = {("GET", name): iter([{"barrier": barrier}]) for name in (VAL, ONE, TWO)}
    assert fetch(2, "--jobs", 3).error is None
    assert not barrier.broken and len(hub.requests) == 1 + 3 + 3


def test_configurations_say_how_many_shards(hub, fetch, out, tmp_path):
    assert shards_needed(Config()) == 33
    assert shards_needed(SimpleNamespace(num_iterations=900, batch_size=128, sequence_length=1024)) == 2
    (tmp_path / "c.toml").write_text("num_iterations = 380\nwarmdown_iters = 0\n")  # 199,229,440 tokens
    done = fetch(tmp_path / "c.toml")
    assert done.error is None and "c.toml needs 2 training shards" in done.stdout and whole_files(out) == only(hub, VAL, ONE, TWO)
    (tmp_path / "c.toml").write_text("num_iterations = 20000\nallow_repeat = true")
    assert len(fineweb.file_names(str(tmp_path / "c.toml"))) == 104


@pytest.mark.parametrize("argument, words", [
    ("0", "0 training shards: the data set has 1 to 103"),
    ("104", "104 training shards"),
    ("-3", "-3 training shards"),
    ("three", "'three' is neither a number"),
    ("none.toml", "cannot read the configuration none.toml"),
    ("sequence_length = 0", "sequence_length = 0"),
    ("input_bin = 'data/shakespeare/shakespeare_train_*.bin'", "not FineWeb"),
    ("num_iterations = 20000", "105 training shards: the data set has 1 to 103; lower num_iterations"),
])
def test_impossible_arguments_are_refused(fetch, hub, out, tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    out.rmdir()
    if "=" in argument:
        (tmp_path / "c.toml").write_text(argument)
        argument = "c.toml"
    done = fetch(argument)
    assert words in done.error and "\n" not in done.error and not hub.requests and not out.exists()
    out.touch()
    done = fetch(1)
    assert done.error.startswith(f"{out}: cannot be used (File exists)") and "--out" in done.error and not hub.requests


# faults of the hub and of the connection


PART = f"{ONE}.partial"


@pytest.mark.parametrize("name, left, faults, starts", [  # what is there; faults of the downloads; their first bytes, or their number
    pytest.param(ONE, GOOD[:-10], [], [None], id="short"),
    pytest.param(ONE, GOOD + b"more", [], [None], id="long"),
    pytest.param(ONE, b"x" + GOOD[1:], [], [None], id="magic"),
    pytest.param(ONE, GOOD[:-1] + b"?", [], [None], id="last byte"),
    pytest.param(ONE, b"", [], [None], id="empty"),
    pytest.param(PART, GOOD[:7000], [], [7000], id="part"),
    pytest.param(PART, GOOD, [], [], id="all but the name"),
    pytest.param(PART, b"wrong" * 1000, [], [5000, None], id="wrong part"),
    pytest.param(PART, GOOD * 2, [], [len(GOOD) * 2, None], id="too long a part"),
    pytest.param(PART, b"", [dict(cut=6500), dict(cut=2500)], [None, 6000, 8000], id="cut"),
    pytest.param(PART, b"", [dict(stall=6500), dict(stall=2500)], [None, 6000, 8000], id="stall"),
    pytest.param(PART, b"", [dict(reset=6500)], 2, id="reset"),  # what was on its way is lost
    pytest.param(PART, b"", [dict(length=1000, cut=1000)] * 10, 11, id="little by little"),
    pytest.param(PART, b"", [dict(content=GOOD[:-1000])], 2, id="sent short"),
    pytest.param(PART, b"", [dict(content=GOOD + b"more")], 3, id="sent long"),
    pytest.param(PART, b"", [dict(content=GOOD[:-3] + b"???")], 2, id="sent changed"),
])
def test_passing_faults_are_survived(hub, fetch, out, monkeypatch, name, left, faults, starts):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults[("GET", ONE)] = iter(faults)
    (out / name).write_bytes(left)
    done = fetch(1)
    assert done.error is None and whole_files(out) == only(hub, VAL, ONE) and partials(out) == []
    assert name == PART or re.search(f"{ONE}: (damaged|not a token shard).*; downloading it again", done.stderr)
    assert starts in ([request.start for request in hub.gets(ONE)], len(hub.gets(ONE)))
    assert starts != [7000] or hub.gets(ONE)[0].sent == len(GOOD) - 7000


@pytest.mark.parametrize("name, fault, words", [  # in every request (a list), or in the file itself (bytes, None)
    (ONE, [dict(content=OTHER)], "damaged: SHA-256"),
    (ONE, [dict(content=b"")], "size 11026 but has size 0"),
    (ONE, [dict(cut=0)], "closed connection"),
    (ONE, [dict(content=OTHER, length=1000, cut=1000), dict(content=OTHER)], "damaged: SHA-256"),
    (ONE, [dict(status=503)], "localhost answers 503"),
    (ONE, [dict(status=429, headers={"Retry-After": 1})], "answers 429"),
    (ONE, [dict(status=403)], "answers 403"),
    (ONE, None, "answers 404 Not Found; check HF_ENDPOINT"),
    (VAL, None, "127.0.0.1 answers 404 Not Found; check HF_ENDPOINT"),
    (ONE, b"not a shard" * 1000, "not a token shard"),
    (ONE, GOOD[:-2], "damaged"),
    (ONE, b"", "not a token shard"),
    (ONE, shard_bytes([50257]), "outside GPT-2's vocabulary"),
])
def test_lasting_faults_cost_one_file(hub, fetch, out, name, fault, words):
    others = only(hub, *set(NAMES) - {name})
    if isinstance(fault, list):
        hub.faults[("GET", name)] = iter(fault * 50)
    elif fault is None:
        del hub.files[name]
    else:
        hub.files[name] = fault
    done = fetch(3)
    assert done.error.startswith(f"{name}: ") and words in done.error and "\n" not in done.error
    assert done.error.endswith(", then run the script again to resume")
    assert whole_files(out) == others and (isinstance(fault, list) or partials(out) == [])


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("faults, growth", [
    ([dict(status=429, headers={"Retry-After": 77})], [1]),
    ([dict(status=503, headers={"Retry-After": 77})], [1]),
    ([dict(status=503)] * 4, [1, 2, 4, 8]),
])
def test_waits_follow_the_hub_or_double(hub, fetch, out, method, faults, growth):
    hub.faults[(method, ONE)] = iter(faults)
    done = fetch(1)
    assert done.error is None and whole_files(out) == only(hub, VAL, ONE)
    assert len(done.waits) == len(growth) and (growth != [1] or 77 <= done.waits[0] <= 78)
    assert [wait / done.waits[0] for wait in done.waits] == growth


@pytest.mark.parametrize("status, words", [(401, "HF_TOKEN"), (403, "account that may"), (429, "--jobs"), (500, "wait a few")])
def test_a_refusal_is_reported_once(hub, fetch, out, status, words):
    hub.faults = {("HEAD", name): itertools.repeat(dict(status=status)) for name in NAMES}
    done = fetch(3)
    assert done.error.endswith("run the script again to resume") and done.error.count(f"127.0.0.1 answers {status}") == 1
    assert words in done.error and " and 1 more: " in done.error and not whole_files(out)
    assert len(hub.requests) <= 6  # the other files do not wait for the same


def test_different_failures_are_all_reported(hub, fetch, out):
    del hub.files[ONE]
    (out / TWO).mkdir()
    hub.faults[("GET", THREE)] = itertools.repeat(dict(status=503))
    done = fetch(3)
    assert sorted(line.partition(":")[0] for line in done.error.splitlines()) == [ONE, TWO, THREE]
    assert f"{TWO}: Is a directory; move it away" in done.error and (out / TWO).is_dir()
    assert (out / VAL).read_bytes() == hub.files[VAL]


def test_another_server_is_not_the_hub(hub, fetch, out):
    hub.lfs = hub.is_a_hub = False
    done = fetch(1)
    assert "does not answer like the hub" in done.error and "HF_ENDPOINT" in done.error and not whole_files(out)


def test_without_sha256_size_and_content_count(hub, fetch, out):
    hub.lfs = False
    hub.faults[("GET", ONE)] = iter([dict(content=b"x" + GOOD[1:]), dict(content=GOOD[:-2])])
    assert fetch(1).error is None and whole_files(out) == only(hub, VAL, ONE)
    assert [request.start for request in hub.gets(ONE)] == [None, None, len(GOOD) - 2]


# without the hub


def test_an_unreachable_hub_is_reported_once(fetch):
    done = fetch(3, url=UNREACHABLE)
    assert f"a request to {UNREACHABLE} failed" in done.error and "and 1 more" in done.error and "\n" not in done.error
    assert sum(done.waits) < 60


def test_the_manifest_verifies_without_the_hub(hub, fetch, out):
    for name in (VAL, ONE):
        (out / name).write_bytes(hub.files[name])
    done = fetch(1, url=UNREACHABLE)
    assert done.error is None and f"{ONE}: header and tokens are good; its SHA-256 is not known here" in done.stdout
    assert not (out / "fineweb.json").exists()
    fetch(1)
    done = fetch(1, url=UNREACHABLE)
    assert f"a request to {UNREACHABLE} failed" in done.stdout and "fineweb.json" in done.stdout and done.waits == []
    assert done.error is None and f"{ONE}: good\n" in done.stdout and "all 2 files are there and good" in done.stdout
    (out / ONE).write_bytes(damaged := GOOD[:-1] + b"?")
    done = fetch(1, url=UNREACHABLE)
    assert done.error.startswith(f"{ONE}: damaged") and UNREACHABLE in done.error and (out / ONE).read_bytes() == damaged


# the folder


def test_room_is_checked_first(hub, fetch, out, monkeypatch):
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * MB))
    done = fetch(2)
    assert "3 files need 0.6 GB more, 0.5 GB are free" in done.error and "--out" in done.error and not hub.requests
    (out / VAL).write_bytes(hub.files[VAL])
    (out / f"{ONE}.partial").write_bytes(GOOD[:9000])
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=200_001_024 - 9000))
    assert fetch(1).error is None


def test_a_full_disk_keeps_the_part(hub, fetch, out):
    hub.files[ONE] = random_shard(50_000, 1)
    with full_disk(60_000):
        done = fetch(2)
    assert done.error == f"{ONE}: File too large; make room, then run the script again to resume"
    assert whole_files(out) == only(hub, VAL, TWO) and (out / f"{ONE}.partial").stat().st_size == 60_000
    assert fetch(2).error is None
    assert whole_files(out) == only(hub, VAL, ONE, TWO) and [request.start for request in hub.gets(ONE)] == [60_000]


def test_a_second_process_waits(hub, fetch, out, monkeypatch):
    first = os.open(out, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    requests = []

    def flock(folder, operation, flock=fcntl.flock):
        if operation == fcntl.LOCK_EX:  # it is about to wait: now the first one ends
            requests.extend(hub.requests)
            os.close(first)
        flock(folder, operation)
    monkeypatch.setattr(fcntl, "flock", flock)
    done = fetch(1)
    assert done.error is None and "another process" in done.stdout and requests == [] and whole_files(out) == only(hub, VAL, ONE)


# as a script


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_script_resumes(hub, script, fetch, out, how):
    hub.files[ONE] = random_shard(15 * MB, 1)  # 30 MB, written in pieces of 10 MiB; the connection buffers fewer than 15 MB
    hub.faults[("GET", ONE)] = iter([dict(stall=28 * MB)])
    process = script(1)
    assert hub.stalled.wait(timeout=60)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=20)  # at once, though a download is under way
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 1}[how] and "Traceback" not in stderr
    assert how == signal.SIGKILL or "interrupted; run the script again to resume" in stderr
    assert whole_files(out) == only(hub, VAL) and partials(out) == [f"{ONE}.partial"]
    assert fetch(1).error is None
    assert whole_files(out) == only(hub, VAL, ONE) and not hub.gets(VAL)
    assert [request.start >= 10 * MB and request.sent <= 20 * MB for request in hub.gets(ONE)] == [True]


def test_only_the_hub_gets_the_token(hub, script, out):
    stdout, stderr = (process := script(1)).communicate(timeout=60)
    assert process.returncode == 0 and stderr == ""
    assert len(stdout.splitlines()) == 4 and whole_files(out) == only(hub, VAL, ONE)
    assert {(request.host, request.token) for request in hub.requests} == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_a_terminal_shows_bars(script):
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    process = script(1, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal's way to say that nobody writes to it any more
        while piece := os.read(ours, 65536):
            shown += piece
    assert process.wait(timeout=60) == 0
    assert b"%|" in shown and ONE.encode() in shown and b"downloaded, good" in shown

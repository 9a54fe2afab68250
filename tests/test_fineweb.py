"""data/fineweb.py against a local hub and its faults.

In this process, with a clock that only notes the waits, and once as a script in a terminal.
"""
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pty
import re
import signal
import sys
import termios
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from data import fineweb
from conftest import ROOT, fork
from fake_hub import FakeHub
from faults import full_disk
from train_gpt2 import Config, UserError

VAL, ONE, TWO, THREE = NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
PART = f"{ONE}.partial"
MB = 1_000_000
UNREACHABLE = "http://127.0.0.1:1"
RESUME = ", then run the script again to resume"  # every error ends with it


def random_shard(n, seed):
    tokens = np.random.default_rng(seed).integers(0, 50257, n, np.uint16)
    return np.array([20240520, 1, n, *[0] * 253], "<i4").tobytes() + tokens.tobytes()


GOOD = random_shard(5001, 1)
OTHER = random_shard(5001, 7)
SIZE = len(GOOD)


@pytest.fixture
def hub():
    with FakeHub({name: random_shard(5000 + i, i) for i, name in enumerate(NAMES)}) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.fixture
def out(tmp_path):
    """The folder of the shards: present, so that tests can put files there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def fetch(hub, out, monkeypatch, call):
    """fetch(*arguments) runs main() in this process.

    Returns its error or None, stdout, stderr and the list of the seconds it waited.
    """
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes that an interruption loses at most
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def fetch(*arguments, url=hub.url):
        waits = []
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")
        hub.requests.clear()
        huggingface_hub.close_session()
        monkeypatch.setattr(time, "sleep", waits.append)
        done = call(fineweb, "--out", out, *arguments)
        error = re.search(r"(?ms)^error: (.*)\Z", done.stderr)
        assert done.returncode == bool(error)
        assert "Traceback" not in done.stderr
        return SimpleNamespace(error=error and error[1], stdout=done.stdout, stderr=done.stderr, waits=waits)
    return fetch


def files(out):
    """{name: content} of the folder without the manifest."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".json"}


def only(hub, *names):
    return {name: hub.files[name] for name in names}


# what is downloaded


def test_shards_are_fetched(hub, fetch, out):
    done = fetch(1)
    assert done.error is None
    assert done.stderr == ""
    assert files(out) == only(hub, VAL, ONE)
    assert len(done.stdout.splitlines()) == 4
    assert [done.stdout.count(f"] {name}: downloaded, good\n") for name in NAMES] == [1, 1, 0, 0]


def test_shards_that_are_there_are_only_verified(hub, fetch, out):
    def times():
        return {path: path.stat().st_mtime_ns for path in out.iterdir()}
    fetch(1)
    before = times()
    done = fetch(1)
    assert done.error is None
    assert "all 2 files are there and good, 10,001 tokens" in done.stdout
    assert {request.method for request in hub.requests} == {"HEAD"}
    assert times() == before


def test_the_manifest_lists_what_is_there(hub, fetch, out):
    fetch(1)
    (out / VAL).write_bytes(b"damaged")
    assert fetch(3).error is None
    assert files(out) == only(hub, *NAMES)
    assert not hub.starts(ONE)
    manifest = json.loads((out / "fineweb.json").read_text())
    assert manifest["tokenizer"] == "gpt2"
    assert "kjj0/fineweb10B-gpt2" in manifest["source"]
    assert manifest["shards"] == [
        dict(file=name, tokens=n, bytes=1024 + 2 * n, sha256=hashlib.sha256(hub.files[name]).hexdigest())
        for name, n in ((ONE, 5001), (TWO, 5002), (THREE, 5003), (VAL, 5000))]


def test_an_invalid_manifest_is_rewritten(hub, fetch, out):
    fetch(1)
    good = (out / "fineweb.json").read_text()
    for content in ('{"shards": [', "[1]", "[" * 100_000, '{"shards": [{"file": 5}, {"file": "../out"}]}'):
        (out / "fineweb.json").write_text(content)
        assert fetch(1).error is None, content
        assert (out / "fineweb.json").read_text() == good, content


def test_jobs_run_at_the_same_time(hub, fetch):
    barrier = threading.Barrier(3)

    def wait_for_others():
        barrier.wait(timeout=300)
        yield {}
    hub.faults = {("GET", name): wait_for_others() for name in (VAL, ONE, TWO)}
    assert fetch(2, "--jobs", 3).error is None
    assert not barrier.broken
    assert len(hub.requests) == 1 + 3 + 3


def test_configurations_say_how_many_shards(hub, fetch, out, tmp_path):
    assert fineweb.shards_needed(Config()) == 33
    (tmp_path / "c.toml").write_text("num_iterations = 380\nwarmdown_iters = 0\n")  # 199,229,440 tokens
    done = fetch(tmp_path / "c.toml")
    assert done.error is None
    assert "c.toml needs 2 training shards" in done.stdout
    assert files(out) == only(hub, VAL, ONE, TWO)
    (tmp_path / "c.toml").write_text("num_iterations = 20000\nallow_repeat = true")
    assert len(fineweb.file_names(str(tmp_path / "c.toml"))) == 104


@pytest.mark.parametrize("argument, words", [  # an argument with " = " is the text of c.toml
    ("0", "0 training shards: the data set has 1 to 103"),
    ("104", "104 training shards"),
    ("-3", "-3 training shards"),
    ("9" * 5000, "a number of 5000 digits: the data set has 1 to 103 training shards; choose"),
    ("three", "'three' is neither a number"),
    ("none.toml", "cannot read the configuration none.toml"),
    ("sequence_length = 0", "sequence_length = 0"),
    ("input_bin = 'data/shakespeare/shakespeare_train_*.bin'", "not FineWeb"),
    ("val_tokens = 100000000\nsequence_length = 100000000",
     "sequence_length = 100000000: a shard has 100000000 tokens"),
    ("num_iterations = 20000", "105 training shards: the data set has 1 to 103; lower num_iterations"),
    ("1 --out c.toml", "c.toml: cannot be used (File exists); choose another folder with --out"),
])
def test_impossible_arguments_are_refused(fetch, hub, out, tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    out.rmdir()
    (tmp_path / "c.toml").write_text(argument)
    arguments = ["c.toml"] if " = " in argument else argument.split()
    done = fetch(*arguments)
    assert words in done.error
    assert "\n" not in done.error
    assert not hub.requests
    assert not out.exists()


# faults of the hub and of the connection

BUSY = dict(status=503)


@pytest.fixture
def faulty(hub, fetch, out, monkeypatch):
    """faulty(there={name: content}, gets=[...], heads=[...], ...) fetches VAL, ONE and TWO from a faulty hub.

    gets and heads are the faults (see FakeHub) of the requests for the file `name`, whose content is `file`.
    """
    def faulty(there={}, gets=(), heads=(), lfs=True, file=GOOD, name=ONE):
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        hub.files[name] = file
        hub.lfs = lfs
        hub.faults = {("GET", name): iter(gets), ("HEAD", name): iter(heads)}
        for left, content in there.items():
            (out / left).write_bytes(content)
        return fetch(2)
    return faulty


def named(value):
    """The test's name for a dict of faults, without their content."""
    return " ".join(value) if isinstance(value, dict) else None


@pytest.mark.parametrize("starts, fault", [  # the first bytes of the downloads of ONE, or their number
    ([0], dict(there={ONE: GOOD[:-1] + b"?"})),
    ([7000], dict(there={PART: GOOD[:7000]})),
    ([], dict(there={PART: GOOD})),
    ([5000, 0], dict(there={PART: b"wrong" * 1000})),
    ([SIZE * 2, 0], dict(there={PART: GOOD * 2})),
    ([0, 6500, 9000], dict(gets=[dict(cut=6500), dict(cut=2500)])),
    ([0, 6500, 9000], dict(gets=[dict(stall=6500), dict(stall=2500)])),
    (2, dict(gets=[dict(reset=6500)])),  # what was on its way is lost
    (2, dict(gets=[dict(content=GOOD + b"more")])),
    (11, dict(gets=[dict(content=GOOD[:i]) for i in range(1000, 11000, 1000)])),  # little by little
    ([0], dict(lfs=False, there={ONE: random_shard(4000, 1)})),  # good, but not the hub's
    ([0, 0, SIZE - 2], dict(lfs=False, gets=[dict(content=b"x" + GOOD[1:]), dict(content=GOOD[:-2])])),
], ids=named)
def test_a_fault_costs_one_file_at_most(hub, faulty, out, starts, fault):
    done = faulty(**fault)
    assert done.error is None
    assert files(out) == only(hub, VAL, ONE, TWO)
    assert starts in (hub.starts(ONE), len(hub.starts(ONE)))
    if ONE in fault.get("there", {}):
        assert re.search(f"{ONE}: damaged.*; downloading it again", done.stderr)


@pytest.mark.parametrize("waits, fault", [
    ([1, 2, 4, 8], dict(heads=[BUSY] * 4)),
    ([2, 4, 8, 16], dict(gets=[BUSY] * 4)),
    *(([77], {how: [dict(status=status, headers={"Retry-After": 77})]})
      for how in ("heads", "gets") for status in (429, 503)),
], ids=named)
def test_a_busy_hub_is_asked_again(hub, faulty, out, waits, fault):
    done = faulty(**fault)
    assert done.error is None
    assert files(out) == only(hub, VAL, ONE, TWO)
    assert len(hub.starts(ONE)) == 1 + len(fault.get("gets", ()))
    assert done.waits == pytest.approx(waits, abs=1)


@pytest.mark.parametrize("how", ["heads", "gets"])
@pytest.mark.parametrize("headers, seconds", [
    ({"Retry-After": 301}, "301"),
    ({"Retry-After": 100_000}, "100,000"),
    ({"Retry-After": "9" * 5000}, "inf"),
    ({"RateLimit": '"api";r=0;t=400'}, "400"),
])
def test_a_long_wait_is_left_to_the_user(hub, faulty, how, headers, seconds):
    done = faulty(**{how: itertools.repeat(dict(status=429, headers=headers))})
    host = "127.0.0.1" if how == "heads" else "localhost"
    assert done.error == (f"{ONE}: {host} answers 429 Too Many Requests and asks to wait {seconds} s; "
                          f"wait that long{RESUME}")
    assert done.waits == []


def test_a_wait_until_a_date(faulty):
    date = {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}
    done = faulty(gets=itertools.repeat(dict(status=429, headers=date)))
    assert re.search(r"asks to wait [\d,]{15} s", done.error)  # 250,000,000,000 and more
    assert done.waits == []


@pytest.mark.parametrize("text", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", ""])
def test_a_wait_that_is_not_understood_is_a_short_one(faulty, text):
    done = faulty(gets=[dict(status=429, headers={"Retry-After": text})])
    assert done.error is None
    assert done.waits == [2]


@pytest.fixture
def endless(monkeypatch):
    """A function that does not return before the test ends, as a request does whose answer drips."""
    end = threading.Event()
    monkeypatch.setattr(fineweb, "PATIENCE", 0)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0)
    yield lambda *values: end.wait()
    end.set()


def test_the_head_of_an_answer_may_not_drip(fetch, out, monkeypatch, endless):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(fineweb, "get_hf_file_metadata", endless)
    monkeypatch.setattr(fineweb, "request_file", endless)
    answer = fineweb.query_hub(ONE)
    assert isinstance(answer, fineweb.TooSlow)
    assert "failed (no complete answer within 0 s); check the connection" in fineweb.explain(answer)
    assert waits == []
    with pytest.raises(fineweb.TooSlow, match="no complete answer within 0 s"):
        fineweb.download(ONE, out, SIZE, None)
    assert waits == [2]


def test_an_error_of_the_request_is_not_taken_for_slowness():
    def time_out():
        raise TimeoutError("its own")
    with pytest.raises(TimeoutError, match="its own"):
        fineweb.soon(time_out)


def clock(*seconds):
    times = itertools.accumulate(seconds)
    return SimpleNamespace(monotonic=lambda: next(times), sleep=lambda seconds: None)


def test_a_body_may_not_drip(monkeypatch):
    def pieces(*sizes):
        return [bytes(size) for size in sizes]
    monkeypatch.setattr(fineweb, "time", clock(0, 59, 1))
    passed = fineweb.fast_enough(pieces(30_000, 30_000))  # 60,000 bytes in a minute are enough
    assert len(list(passed)) == 2
    monkeypatch.setattr(fineweb, "time", clock(0, 59, 1))
    with pytest.raises(fineweb.TooSlow, match="too slow, 59,999 bytes in 60 s"):
        list(fineweb.fast_enough(pieces(30_000, 29_999)))
    monkeypatch.setattr(fineweb, "time", clock(0, 60, 59, 1))
    with pytest.raises(fineweb.TooSlow, match="too slow, 2 bytes in 60 s"):  # each minute counts for itself
        list(fineweb.fast_enough(pieces(1_000_000, 1, 1)))


def test_a_slow_download_ends_and_keeps_its_part(hub, fetch, out, monkeypatch):
    assert fetch(1).error is None
    (out / ONE).unlink()
    hub.requests.clear()
    monkeypatch.setattr(fineweb, "time", clock(*[1000] * 100))
    with pytest.raises(fineweb.TooSlow, match="too slow, [0-9,]+ bytes in 1000 s"):
        hub.faults[("GET", ONE)] = iter([dict(stall=4000), dict(stall=2000)])
        fineweb.download(ONE, out, SIZE, None)
    starts = hub.starts(ONE)
    assert len(starts) == fineweb.SLOW_ATTEMPTS
    assert (out / PART).read_bytes() == GOOD[:(out / PART).stat().st_size]
    assert 0 < starts[1] <= 4000


@pytest.mark.parametrize("words, fault", [
    ("damaged: SHA-256",  # in spite of progress
     dict(gets=itertools.cycle([dict(content=OTHER[:1000]), dict(content=OTHER)]))),
    ("closed connection", dict(gets=itertools.repeat(dict(cut=0)))),
    ("localhost answers 503", dict(gets=itertools.repeat(BUSY))),
    ("answers 429", dict(gets=itertools.repeat(dict(status=429, headers={"Retry-After": 1})))),
    ("answers 403", dict(gets=[dict(status=403)])),
    ("127.0.0.1 answers 404 Not Found; check HF_ENDPOINT", dict(file=None, name=VAL)),
    ("not a token shard", dict(file=b"not a shard" * 1000)),
    ("outside GPT-2's vocabulary", dict(file=GOOD[:-2] + np.uint16(50257).tobytes())),
], ids=named)
def test_a_lasting_fault_fails_one_file(hub, faulty, out, words, fault):
    done = faulty(**fault)
    name = fault.get("name", ONE)
    assert done.error.startswith(f"{name}: ")
    assert words in done.error
    assert "\n" not in done.error
    assert done.error.endswith(RESUME)
    found = files(out)
    part = found.pop(PART, None)
    assert part is None or "gets" in fault
    assert found == only(hub, *{VAL, ONE, TWO} - {name})


@pytest.mark.parametrize("status, words", [
    (401, "127.0.0.1 answers 401 Unauthorized; log in with `hf auth login`, or set HF_TOKEN"),
    (403, "127.0.0.1 answers 403 Forbidden; log in with `hf auth login` to an account that may"),
    (429, "127.0.0.1 answers 429 Too Many Requests; wait a few minutes, use fewer --jobs"),
    (500, "127.0.0.1 answers 500 Internal Server Error; wait a few minutes"),
    (200, "does not answer like the hub; check HF_ENDPOINT"),
    (None, f"a request to {UNREACHABLE} failed"),
])
def test_a_refusal_is_reported_once(hub, fetch, out, status, words):
    hub.faults = {("HEAD", name): itertools.repeat(dict(status=status)) for name in NAMES}
    done = fetch(3, url=hub.url if status else UNREACHABLE)
    assert done.error.count(words) == 1
    assert " and 1 more: " in done.error
    assert "\n" not in done.error
    assert done.error.endswith(RESUME)
    assert files(out) == {}
    assert len(hub.requests) <= 6  # the other files do not wait for the same
    assert sum(done.waits) < 60


def test_different_failures_are_all_reported(hub, fetch, out):
    del hub.files[ONE]
    (out / TWO).mkdir()
    hub.faults[("GET", THREE)] = itertools.repeat(BUSY)
    done = fetch(3)
    assert sorted(line.partition(":")[0] for line in done.error.splitlines()) == [ONE, TWO, THREE]
    assert f"{TWO}: Is a directory; move it away" in done.error
    assert (out / TWO).is_dir()
    assert (out / VAL).read_bytes() == hub.files[VAL]


@pytest.mark.parametrize("name, words", [
    (ONE, f"{ONE}: not a regular file; move it away"),
    (PART, f"{ONE}: not a regular file; move it away"),
    ("fineweb.json", "fineweb.json is in the way, and not a file; move it elsewhere"),
])
def test_a_pipe_in_the_place_of_a_file_is_refused(hub, fetch, out, name, words):
    os.mkfifo(out / name)
    done = fetch(2)
    assert words in done.error
    assert "\n" not in done.error
    assert (out / name).is_fifo()
    if name != "fineweb.json":
        assert (out / TWO).read_bytes() == hub.files[TWO]


BASIC = "Basic dXNlcjpnZWhlaW0="  # user:geheim


@pytest.mark.parametrize("address, wanted", [
    ("http://localhost:80", ("http://localhost:80", None)),
    ("http://user:geheim@[::1]:65535/hub", ("http://[::1]:65535/hub", BASIC)),
    ("https://user:%67eheim@example.org", ("https://example.org", BASIC)),
    ("http://u:p@s/s#:9@example.org", ("http://example.org", "Basic dTpwQHMvcyM6OQ==")),
])
def test_a_password_is_taken_from_the_address(address, wanted):
    assert fineweb.split_credentials(address) == wanted


@pytest.mark.parametrize("address, shown", [
    ("http://user:geheim@127.0.0.1:99999", "http://127.0.0.1:99999"),
    ("http://user:geheim@127.0.0.1:0", "http://127.0.0.1:0"),
    ("http://user:geheim@127.0.0.1:port", "http://127.0.0.1:port"),
    ("http://user:geheim@127.0.0.1:" + "9" * 5000, "http://127.0.0.1:" + "9" * 83),
    ("http://user:geheim@[::1", "http://[::1"),
    ("http://user:geheim@", "http://"),
    ("ftp://user:geheim@127.0.0.1", "ftp://127.0.0.1"),
    ("hub", "hub"),
])
def test_an_impossible_address_is_refused(address, shown):
    with pytest.raises(UserError) as error:
        fineweb.split_credentials(address)
    assert str(error.value).startswith(f"HF_ENDPOINT = '{shown}' is not an address, http(s)://HOST")


def test_the_password_goes_to_the_hub_only(hub, fetch, monkeypatch):
    monkeypatch.setattr(fineweb, "BASIC_AUTHORIZATION", BASIC)
    assert fetch(1).error is None
    senders = {(request.host, request.token) for request in hub.requests}
    assert senders == {("127.0.0.1", BASIC), ("localhost", None)}


@pytest.mark.parametrize("port, words", [
    (None, "127.0.0.1 answers 404 Not Found; check HF_ENDPOINT"),
    (99999, "HF_ENDPOINT = 'http://127.0.0.1:99999' is not an address"),
])
def test_the_script_does_not_show_the_password(hub, out, tmp_path, port, words):
    hub.files.clear()
    environment = {"HF_ENDPOINT": f"http://user:geheim@127.0.0.1:{port or hub.server_port}",
                   "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    done = fork(ROOT / "data/fineweb.py", 1, "--out", out, env=environment)
    assert done.returncode == 1
    assert words in done.stderr
    assert "geheim" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert {request.token for request in hub.requests} == (set() if port else {BASIC})


def test_the_manifest_verifies_without_the_hub(hub, fetch, out):
    for name in (VAL, ONE):
        (out / name).write_bytes(hub.files[name])
    done = fetch(1, url=UNREACHABLE)
    assert done.error is None
    assert f"{ONE}: header and tokens are good; its SHA-256 is not known here" in done.stdout
    assert not (out / "fineweb.json").exists()
    fetch(1)
    done = fetch(1, url=UNREACHABLE)
    assert done.error is None
    assert done.waits == []
    assert f"a request to {UNREACHABLE} failed" in done.stdout
    assert "fineweb.json" in done.stdout
    assert f"{ONE}: good\n" in done.stdout
    assert "all 2 files are there and good" in done.stdout
    damaged = GOOD[:-1] + b"?"
    (out / ONE).write_bytes(damaged)
    done = fetch(1, url=UNREACHABLE)
    assert done.error.startswith(f"{ONE}: damaged")
    assert UNREACHABLE in done.error
    assert (out / ONE).read_bytes() == damaged


# the folder


def test_room_is_checked_first(hub, fetch, out, monkeypatch):
    def leave(free):
        monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    leave(500 * MB)
    done = fetch(2)
    assert "3 files need 0.6 GB more, 0.5 GB are free" in done.error
    assert "--out" in done.error
    assert not hub.requests
    (out / VAL).write_bytes(hub.files[VAL])
    (out / PART).write_bytes(GOOD[:9000])
    leave(200_001_024 - 9000)
    assert fetch(1).error is None
    leave(200_001_024 - 1)
    assert "1 files need 0.2 GB" in fetch(2).error


def test_a_full_disk_keeps_the_part(hub, fetch, out):
    hub.files[ONE] = random_shard(50_000, 1)
    with full_disk(60_000):
        done = fetch(2)
    assert done.error == f"{ONE}: File too large; make room{RESUME}"
    assert files(out) == {**only(hub, VAL, TWO), PART: hub.files[ONE][:60_000]}
    assert fetch(2).error is None
    assert files(out) == only(hub, VAL, ONE, TWO)
    assert hub.starts(ONE) == [60_000]


def test_a_second_process_waits(hub, fetch, out, monkeypatch):
    first = os.open(out, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    requests = []

    def flock(folder, operation, flock=fcntl.flock):
        if operation == fcntl.LOCK_EX:  # it is about to wait: now the first one ends
            requests.append(len(hub.requests))
            os.close(first)
        flock(folder, operation)
    monkeypatch.setattr(fcntl, "flock", flock)
    done = fetch(1)
    assert done.error is None
    assert "another process" in done.stdout
    assert requests == [0]
    assert files(out) == only(hub, VAL, ONE)


def read_terminal(descriptor):
    """Everything that is written to the terminal, until nobody has it open any more."""
    shown = b""
    with contextlib.suppress(OSError):  # a terminal's way to say so
        while piece := os.read(descriptor, 65536):
            shown += piece
    return shown


def test_script_stopped_in_a_terminal(hub, fetch, launch, out, tmp_path):
    # 30 MB, written in pieces of 10 MiB; the connection buffers fewer than 15 MB
    hub.files[ONE] = random_shard(15 * MB, 1)
    hub.faults[("GET", ONE)] = iter([dict(stall=28 * MB)])
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret",
                   "NO_PROXY": "*"}
    process = launch(sys.executable, ROOT / "data/fineweb.py", 1, "--out", out, stdout=its, stderr=its,
                     env=environment)
    os.close(its)

    def stop_when_stalled():
        if hub.stalled.wait(300):
            process.send_signal(signal.SIGINT)
    threading.Thread(target=stop_when_stalled).start()
    shown = read_terminal(ours)
    os.close(ours)
    assert process.wait(timeout=300) == 1
    assert b"Traceback" not in shown
    assert b"interrupted; run the script again to resume" in shown, shown
    assert b"%|" in shown
    assert ONE.encode() in shown
    assert f"{VAL}: downloaded, good".encode() in shown
    assert set(files(out)) == {VAL, PART}  # it stopped at once, though a download was under way
    senders = {(request.host, request.token) for request in hub.requests}
    assert senders == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}
    assert fetch(1).error is None
    assert files(out) == only(hub, VAL, ONE)
    assert not hub.starts(VAL)
    assert [start >= 10 * MB for start in hub.starts(ONE)] == [True]

"""data/fineweb.py against a local hub, with its faults: in this process with a clock that only notes the waits, or, where it says
`script`, as the script itself."""
import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from conftest import ROOT
from data import fineweb
from data.fineweb import shards_needed
from fake_hub import FakeHub
from train_gpt2 import Config, UserError

VAL, ONE, TWO, THREE = NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
MB = 1_000_000


def shard_bytes(tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def random_shard(n, seed):
    return shard_bytes(np.random.default_rng(seed).integers(0, 50257, n, np.uint16))


@pytest.fixture
def hub():
    with FakeHub({name: random_shard(5000 + i, i) for i, name in enumerate(NAMES)}) as hub:
        yield hub


@pytest.fixture
def fetch(hub, tmp_path, monkeypatch, capsys):
    """fetch(*arguments) runs main() in this process; returns its error or None, stdout, stderr and the seconds it waited."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes that an interruption loses at most
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def fetch(*arguments, url=hub.url):
        waits = []
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(sys, "argv", ["fineweb.py", "--out", str(fetch.out), *map(str, arguments)])
        hub.requests.clear()
        huggingface_hub.close_session()
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", waits.append)
            try:
                fineweb.main()
                error = None
            except UserError as raised:
                error = str(raised)
        captured = capsys.readouterr()
        return SimpleNamespace(error=error, stdout=captured.out, stderr=captured.err, waits=waits)
    fetch.out = tmp_path / "out"
    return fetch


@pytest.fixture
def script(hub, tmp_path):
    """script(*arguments, **Popen's) starts the script as a process, which an end of the test ends."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    with contextlib.ExitStack() as stack:
        def start(*arguments, **options):
            command = [sys.executable, ROOT / "data/fineweb.py", *map(str, arguments), "--out", tmp_path / "out"]
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
            process = subprocess.Popen(command, env=environment, text=True, **options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process
        yield start


def whole_files(out):
    """{name: content} of what carries a final name, without the manifest."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix not in (".json", ".partial")}


def partials(out):
    return sorted(path.name for path in out.glob("*.partial"))


def only(hub, *names):
    return {name: hub.files[name] for name in names}


# what is fetched


def test_the_validation_shard_and_the_first_n_are_fetched(hub, fetch):
    done = fetch(2)
    assert done.error is None
    assert {path.name for path in fetch.out.iterdir()} == {VAL, ONE, TWO, "fineweb.json"}
    assert whole_files(fetch.out) == only(hub, VAL, ONE, TWO)
    assert [done.stdout.count(f"] {name}: fetched, good\n") for name in NAMES] == [1, 1, 1, 0]


def test_fetched_shards_are_listed_with_their_hashes(hub, fetch):
    fetch(1)
    expected = [dict(file=name, tokens=tokens, bytes=1024 + 2 * tokens, sha256=hashlib.sha256(hub.files[name]).hexdigest())
                for name, tokens in ((ONE, 5001), (VAL, 5000))]
    manifest = json.loads((fetch.out / "fineweb.json").read_text())
    assert manifest["shards"] == expected and manifest["tokenizer"] == "gpt2" and "kjj0/fineweb10B-gpt2" in manifest["source"]


def test_run_again_nothing_is_fetched_or_written(hub, fetch):
    fetch(2)
    before = {path: path.stat().st_mtime_ns for path in fetch.out.iterdir()}
    done = fetch(2)
    assert done.error is None and "all 3 files are there and good, 15,003 tokens" in done.stdout
    assert {request.method for request in hub.requests} == {"HEAD"}
    assert {path: path.stat().st_mtime_ns for path in fetch.out.iterdir()} == before


def test_a_larger_number_fetches_only_the_rest_and_adds_it_to_the_list(hub, fetch):
    fetch(1)
    assert fetch(3).error is None
    assert {request.name for request in hub.requests if request.method == "GET"} == {TWO, THREE}
    assert [shard["file"] for shard in json.loads((fetch.out / "fineweb.json").read_text())["shards"]] == [ONE, TWO, THREE, VAL]


@pytest.mark.parametrize("damage", [lambda good: good[:-10], lambda good: good + b"more", lambda good: b"x" + good[1:],
                                    lambda good: good[:-1] + bytes([good[-1] ^ 1]), lambda good: b""])
def test_only_a_damaged_file_is_fetched_again(hub, fetch, damage):
    fetch(2)
    (fetch.out / ONE).write_bytes(damage(hub.files[ONE]))
    done = fetch(2)
    assert done.error is None and whole_files(fetch.out) == only(hub, VAL, ONE, TWO)
    assert f"{ONE}: damaged" in done.stderr
    assert [request.name for request in hub.requests if request.method == "GET"] == [ONE]


def test_a_list_that_cannot_be_read_is_written_anew(hub, fetch):
    fetch(1)
    good = (fetch.out / "fineweb.json").read_text()
    (fetch.out / "fineweb.json").write_text('{"shards": [')
    assert fetch(1).error is None
    assert (fetch.out / "fineweb.json").read_text() == good


def test_several_files_are_fetched_at_a_time(hub, fetch):
    barrier = threading.Barrier(3)
    hub.faults = {("GET", name): iter([{"barrier": barrier}]) for name in (VAL, ONE, TWO)}
    assert fetch(2, "--jobs", 3).error is None
    assert not barrier.broken and len(hub.requests) == 1 + 3 + 3


def test_files_without_a_sha256_on_the_hub_are_checked_by_size_and_content(hub, fetch):
    hub.lfs = False
    hub.faults[("GET", ONE)] = iter([{"content": b"x" + hub.files[ONE][1:]}, {"content": hub.files[ONE][:-2]}])
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE)
    assert [request.start for request in hub.gets(ONE)] == [None, None, len(hub.files[ONE]) - 2]


def test_a_configuration_says_how_many_shards_it_needs():
    assert shards_needed(Config()) == 33
    assert shards_needed(SimpleNamespace(num_iterations=900, batch_size=128, sequence_length=1024)) == 2


def test_a_configuration_fetches_the_shards_it_needs(hub, fetch, tmp_path):
    (tmp_path / "c.toml").write_text("num_iterations = 380\nwarmdown_iters = 0\n")  # 199,229,440 tokens
    done = fetch(tmp_path / "c.toml")
    assert done.error is None and "c.toml needs 2 training shards" in done.stdout
    assert whole_files(fetch.out) == only(hub, VAL, ONE, TWO)


@pytest.mark.parametrize("argument, words", [
    ("0", "0 training shards: the data set has 1 to 103"),
    ("104", "104 training shards"),
    ("-3", "-3 training shards"),
    ("three", "'three' is neither a number"),
    ("none.toml", "cannot read the configuration none.toml"),
    ("sequence_length = 0", "sequence_length = 0"),
    ("input_bin = 'data/shakespeare/shakespeare_train_*.bin'", "does not read FineWeb"),
    ("num_iterations = 20000", "105 training shards: the data set has 1 to 103; lower num_iterations"),
])
def test_numbers_and_configurations_that_cannot_be_met_are_refused(fetch, hub, tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    if "=" in argument:
        (tmp_path / "c.toml").write_text(argument)
        argument = "c.toml"
    done = fetch(argument)
    assert words in done.error and "\n" not in done.error and not hub.requests and not fetch.out.exists()


def test_a_configuration_that_repeats_its_data_gets_all_there_is(tmp_path):
    (tmp_path / "c.toml").write_text("num_iterations = 20000\nallow_repeat = true")
    assert len(fineweb.file_names(str(tmp_path / "c.toml"))) == 104


# interruptions


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_a_connection_that_ends_in_mid_file_is_resumed_there(hub, fetch, monkeypatch, how):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults[("GET", ONE)] = iter([{how: 6500}, {how: 2500}])
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE)
    assert [request.start for request in hub.gets(ONE)] == [None, 6000, 8000]


def test_a_connection_that_is_reset_is_tried_again(hub, fetch):
    hub.faults[("GET", ONE)] = iter([{"reset": 6500}])  # what was on its way is lost, so nobody knows where it goes on
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE) and len(hub.gets(ONE)) == 2


def test_many_interruptions_are_survived_as_long_as_each_brings_something(hub, fetch):
    hub.faults[("GET", ONE)] = iter([{"length": 1000, "cut": 1000}] * 10)
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE) and len(hub.gets(ONE)) == 11


def test_what_an_earlier_process_left_is_not_fetched_again(hub, fetch):
    fetch.out.mkdir()
    (fetch.out / f"{ONE}.partial").write_bytes(hub.files[ONE][:7000])
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE) and partials(fetch.out) == []
    assert [(request.start, request.sent) for request in hub.gets(ONE)] == [(7000, len(hub.files[ONE]) - 7000)]


@pytest.mark.parametrize("left", [b"wrong" * 1000, b"longer than the file" * 1000])
def test_a_part_that_does_not_fit_is_thrown_away(hub, fetch, left):
    fetch.out.mkdir()
    (fetch.out / f"{ONE}.partial").write_bytes(left)
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE)
    assert [request.start for request in hub.gets(ONE)] == [len(left), None]


def test_a_whole_file_that_only_lacks_its_name_is_not_fetched(hub, fetch):
    fetch.out.mkdir()
    (fetch.out / f"{ONE}.partial").write_bytes(hub.files[ONE])
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE) and not hub.gets(ONE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_script_that_is_stopped_goes_on_where_it_was(hub, script, fetch, tmp_path, how):
    hub.files[ONE] = random_shard(15 * MB, 1)  # 30 MB, written in pieces of 10 MiB; the connection buffers fewer than 15 MB
    hub.faults[("GET", ONE)] = iter([{"stall": 28 * MB}])
    process = script(1)
    assert hub.stalled.wait(timeout=60)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=20)  # at once, though a download is under way
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 1}[how] and "Traceback" not in stderr
    assert how == signal.SIGKILL or "interrupted; run the script again to go on" in stderr
    assert whole_files(tmp_path / "out") == only(hub, VAL) and partials(tmp_path / "out") == [f"{ONE}.partial"]
    assert fetch(1).error is None
    assert whole_files(tmp_path / "out") == only(hub, VAL, ONE) and not hub.gets(VAL)
    assert [request.start >= 10 * MB and request.sent <= 20 * MB for request in hub.gets(ONE)] == [True]


def test_script_that_meets_a_full_disk_keeps_what_it_has_and_the_other_files(hub, script, fetch, tmp_path):
    hub.files[ONE] = random_shard(12 * MB, 1)
    process = script(2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15 * MB, resource.RLIM_INFINITY)))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("error: ") and f"{ONE}: {os.strerror(errno.EFBIG)}" in stderr and stderr.count("\n") == 1
    assert whole_files(tmp_path / "out") == only(hub, VAL, TWO)
    assert (tmp_path / "out" / f"{ONE}.partial").stat().st_size == 15 * MB
    assert fetch(2).error is None
    assert whole_files(tmp_path / "out") == only(hub, VAL, ONE, TWO) and [request.start for request in hub.gets(ONE)] == [15 * MB]


def test_a_second_process_waits_for_the_one_that_works_in_the_same_folder(hub, fetch, monkeypatch):
    fetch.out.mkdir()
    first = os.open(fetch.out, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    requests = []

    def flock(folder, operation, flock=fcntl.flock):
        if operation == fcntl.LOCK_EX:  # it is about to wait: now the first one ends
            requests.extend(hub.requests)
            os.close(first)
        flock(folder, operation)
    monkeypatch.setattr(fcntl, "flock", flock)
    done = fetch(1)
    assert done.error is None and "another process" in done.stdout and requests == []
    assert whole_files(fetch.out) == only(hub, VAL, ONE)


# answers that are not what they should be


@pytest.mark.parametrize("content", [lambda good: good[:-1000], lambda good: good + b"more", lambda good: good[:-3] + b"???"])
def test_a_wrong_file_is_fetched_anew(hub, fetch, content):
    hub.faults[("GET", ONE)] = iter([{"content": content(hub.files[ONE])}])
    assert fetch(1).error is None
    assert whole_files(fetch.out) == only(hub, VAL, ONE)


@pytest.mark.parametrize("fault, words", [
    (dict(content=random_shard(5001, 7)), "its SHA-256 is"),
    (dict(content=b""), "size 11026 but has size 0"),
    (dict(cut=0), "closed connection"),
    (dict(status=503), "localhost answers 503"),
    (dict(status=429, headers={"Retry-After": 1}), "answers 429"),
    (dict(status=403), "answers 403"),
])
def test_what_never_comes_right_gets_no_name_and_does_not_stop_the_others(hub, fetch, fault, words):
    hub.faults[("GET", ONE)] = itertools.repeat(fault)
    done = fetch(3)
    assert done.error.startswith(f"{ONE}: ") and words in done.error and "again" in done.error and "\n" not in done.error
    assert whole_files(fetch.out) == only(hub, VAL, TWO, THREE)


@pytest.mark.parametrize("content, words", [
    (b"not a shard" * 1000, "not a token shard"),
    (shard_bytes([50257]), "outside GPT-2's vocabulary"),
    (random_shard(10, 0)[:-2], "damaged"),
    (b"", "not a token shard"),
])
def test_a_file_that_is_no_shard_on_the_hub_gets_no_name(hub, fetch, content, words):
    hub.files[ONE] = content
    done = fetch(1)
    assert done.error.startswith(ONE) and words in done.error
    assert whole_files(fetch.out) == only(hub, VAL) and partials(fetch.out) == []


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(hub, fetch, method, status):
    hub.faults[(method, ONE)] = iter([dict(status=status, headers={"Retry-After": 77})])
    done = fetch(1)
    assert done.error is None and whole_files(fetch.out) == only(hub, VAL, ONE)
    assert len(done.waits) == 1 and 77 <= done.waits[0] <= 78


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_waits_grow_while_the_hub_is_unavailable(hub, fetch, method):
    hub.faults[(method, ONE)] = iter([dict(status=503)] * 4)
    done = fetch(1)
    assert done.error is None and len(done.waits) == 4
    assert all(later == 2 * earlier for earlier, later in zip(done.waits, done.waits[1:]))


@pytest.mark.parametrize("status, words", [(401, "HF_TOKEN"), (403, "account that may"), (429, "--jobs"), (500, "wait some")])
def test_a_hub_that_refuses_is_reported_once_with_the_remedy(hub, fetch, status, words):
    hub.faults = {("HEAD", name): itertools.repeat(dict(status=status)) for name in NAMES}
    done = fetch(3)
    assert done.error.endswith("run the script again to go on") and done.error.count(f"127.0.0.1 answers {status}") == 1
    assert words in done.error and " and 1 more: " in done.error and not whole_files(fetch.out)
    assert len(hub.requests) <= 6  # the other files do not wait for the same


def test_a_file_that_the_hub_lacks_does_not_stop_the_others(hub, fetch):
    del hub.files[VAL]
    done = fetch(2)
    assert done.error == f"{VAL}: 127.0.0.1 answers 404 Not Found; check HF_ENDPOINT, then run the script again to go on"
    assert whole_files(fetch.out) == only(hub, ONE, TWO)


def test_different_failures_are_all_reported(hub, fetch):
    del hub.files[ONE]
    (fetch.out / TWO).mkdir(parents=True)
    hub.faults[("GET", THREE)] = itertools.repeat(dict(status=503))
    done = fetch(3)
    assert sorted(line.partition(":")[0] for line in done.error.splitlines()) == [ONE, TWO, THREE]
    assert (fetch.out / VAL).read_bytes() == hub.files[VAL]


def test_another_server_is_not_taken_for_the_hub(hub, fetch):
    hub.lfs = hub.is_a_hub = False
    done = fetch(1)
    assert "does not answer as the hub does" in done.error and "HF_ENDPOINT" in done.error and not whole_files(fetch.out)


# without the hub


UNREACHABLE = "http://127.0.0.1:1"


def test_an_unreachable_hub_is_named_once_for_all_files(fetch):
    done = fetch(3, url=UNREACHABLE)
    assert f"a request to {UNREACHABLE} failed" in done.error and "and 1 more" in done.error and "\n" not in done.error
    assert sum(done.waits) < 60


def test_files_are_verified_by_the_list_if_the_hub_cannot_be_reached(hub, fetch):
    fetch(2)
    done = fetch(2, url=UNREACHABLE)
    assert done.error is None and f"a request to {UNREACHABLE} failed" in done.stdout and "fineweb.json" in done.stdout
    assert "all 3 files are there and good" in done.stdout and done.waits == []


def test_a_damaged_file_is_found_and_kept_if_the_hub_cannot_be_reached(hub, fetch):
    fetch(1)
    (fetch.out / ONE).write_bytes(damaged := hub.files[ONE][:-1] + b"?")
    done = fetch(1, url=UNREACHABLE)
    assert done.error.startswith(f"{ONE}: damaged") and UNREACHABLE in done.error and (fetch.out / ONE).read_bytes() == damaged


def test_a_file_that_is_not_listed_is_not_called_verified_without_the_hub(hub, fetch):
    fetch.out.mkdir()
    for name in (VAL, ONE):
        (fetch.out / name).write_bytes(hub.files[name])
    done = fetch(1, url=UNREACHABLE)
    assert done.error is None and f"{ONE}: header and tokens are good, its SHA-256 is not known here" in done.stdout
    assert not (fetch.out / "fineweb.json").exists()


# the folder


def test_too_little_room_is_noticed_before_anything_is_fetched(hub, fetch, monkeypatch):
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=500 * MB))
    done = fetch(2)
    assert "3 files need 0.6 GB more, 0.5 GB are free" in done.error and "--out" in done.error and not hub.requests


def test_what_is_there_needs_no_room(hub, fetch, monkeypatch):
    fetch.out.mkdir()
    (fetch.out / VAL).write_bytes(hub.files[VAL])
    (fetch.out / f"{ONE}.partial").write_bytes(hub.files[ONE][:9000])
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: SimpleNamespace(free=200_001_024 - 9000))
    assert fetch(1).error is None


def test_a_folder_in_the_way_is_named_and_left(hub, fetch):
    (fetch.out / ONE).mkdir(parents=True)
    done = fetch(2)
    assert done.error.startswith(f"{ONE}: Is a directory") and "\n" not in done.error
    assert (fetch.out / TWO).read_bytes() == hub.files[TWO] and (fetch.out / ONE).is_dir()


def test_a_folder_that_cannot_be_made_is_named(hub, fetch, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = fetch(1)
    assert done.error.startswith(f"{tmp_path / 'out'}: ") and "--out" in done.error and not hub.requests


# what the user sees and sends


def test_script_shows_lines_in_a_file_and_sends_the_token_to_the_hub_only(hub, script, tmp_path):
    stdout, stderr = (process := script(1)).communicate(timeout=60)
    assert process.returncode == 0 and stderr == ""
    assert len(stdout.splitlines()) == 4 and whole_files(tmp_path / "out") == only(hub, VAL, ONE)
    assert {(request.host, request.token) for request in hub.requests} == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_script_shows_bars_on_a_terminal(hub, script):
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    process = script(1, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # which is how a terminal says that nobody writes to it any more
        while piece := os.read(ours, 65536):
            shown += piece
    assert process.wait(timeout=60) == 0
    assert b"%|" in shown and ONE.encode() in shown and b"fetched, good" in shown

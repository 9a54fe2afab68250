"""Download FineWeb in GPT-2's tokens, as the speedrun uses it: the public data set kjj0/fineweb10B-gpt2.

    python data/fineweb.py 33                            the validation shard and the first 33 training shards
    python data/fineweb.py configs/speedrun_muon.toml    as many as this configuration needs

A shard holds 100 million tokens in 200 MB; there are 103 for training. Each is downloaded as NAME.partial,
compared with the hub (size, SHA-256), checked (header, tokens), and only then renamed; fineweb.json, beside
the shards, lists them. Run the script again to resume after an interruption, or to verify: shards that are
there are compared with the hub or, without a connection, with fineweb.json, and only missing or damaged ones
are downloaded. HF_ENDPOINT, HF_HOME, HF_TOKEN and proxies work as usual in huggingface_hub.
"""
import argparse
import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from base64 import b64encode
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import NOT_INSTALLED, command, locked, printable  # first: it says what is not installed
from data.shards import VOCABULARY, manifest_entry, write_manifest
from train_gpt2 import Config, UserError, check_config, open_shard, read_toml


def split_credentials(address):
    """(the address without them, Authorization header or None) for http://USER:PASSWORD@HOST.

    Raises UserError, which does not show the password, if it is not the address of a server.
    """
    scheme, slashes, rest = address.partition("//")
    credentials, at, host = rest.rpartition("@")
    address = scheme + slashes + host
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number or out of range, an unfinished IPv6 address
        valid = False
    if not valid:
        raise UserError(f"HF_ENDPOINT = '{address[:100]}' is not an address, http(s)://HOST or "
                        "http(s)://HOST:PORT with a port from 1 to 65535; correct or unset it")
    basic = "Basic " + b64encode(unquote(credentials).encode()).decode()
    return address, basic if at else None


BASIC_AUTHORIZATION = None
try:
    if os.environ.get("HF_ENDPOINT"):
        # before the import: the library would show a password in its messages
        os.environ["HF_ENDPOINT"], BASIC_AUTHORIZATION = split_credentials(os.environ["HF_ENDPOINT"])
    else:
        os.environ.pop("HF_ENDPOINT", None)
    from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm
except ImportError as error:
    sys.exit(NOT_INSTALLED.format(error))
except UserError as error:
    sys.exit(f"error: {printable(str(error))}")
except ValueError as error:
    sys.exit(f"error: huggingface_hub: {error}; correct or unset the variable HF_... that has this value")

HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version uses
REPOSITORY = "kjj0/fineweb10B-gpt2"
SHARD_TOKENS = 100_000_000
SHARD_BYTES = 200_001_024
SHARDS = 103  # for training
NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, SHARDS + 1))]
ATTEMPTS = 5  # at one file: in a row without progress, or in all with a damaged result
SLOW_ATTEMPTS = 2  # at one file, each of which takes PATIENCE
QUERY_WAITS = (1, 2, 4, 8, 8)  # seconds, before the hub is asked again about a file
BUSY = (408, 429, 500, 502, 503, 504)  # answers after which it is worth to ask again
LONGEST_WAIT = 300  # seconds that a server may ask for
PATIENCE = 60  # seconds for the head of an answer, and over which the speed of a download is measured
SLOWEST = 1000  # bytes a second
REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "log in with `hf auth login` to an account that may read the data set",
    404: "check HF_ENDPOINT",
    429: "wait a few minutes, use fewer --jobs, or log in with `hf auth login` for a higher limit",
}


class TooSlow(Exception):
    """A server that sends nothing, or a byte now and then."""


# What to download


def shards_needed(config):
    """Training shards that `config` reads without repeating any."""
    per_shard = (SHARD_TOKENS - 1) // config.sequence_length
    return math.ceil(config.num_iterations * config.batch_size / per_shard)


def file_names(argument):
    """The shards, validation first, that N or CONFIG.toml asks for. Raises UserError for anything else."""
    if re.fullmatch(r"[+-]?\d{1,20}", argument):
        number = int(argument)
        remedy = "choose a number in that range"
    elif re.fullmatch(r"[+-]?\d+", argument):
        raise UserError(f"a number of {len(argument)} digits: the data set has 1 to {SHARDS} training "
                        "shards; choose a number in that range")
    elif argument.endswith(".toml"):
        number = shards_of_configuration(argument)
        remedy = "lower num_iterations, or set allow_repeat = true"
    else:
        raise UserError(f"'{argument}' is neither a number of training shards, 1 to {SHARDS}, "
                        "nor a configuration, NAME.toml")
    if not 1 <= number <= SHARDS:
        raise UserError(f"{number} training shards: the data set has 1 to {SHARDS}; {remedy}")
    return NAMES[:1 + number]


def shards_of_configuration(path):
    """Training shards that the configuration in the file `path` needs. Raises UserError if it is invalid."""
    config = Config(**read_toml(path))
    check_config(config)
    if not fnmatch(NAMES[1], os.path.basename(config.input_bin)):
        raise UserError(f"{path} reads '{config.input_bin}', not FineWeb; pass a number of shards instead")
    if config.sequence_length >= SHARD_TOKENS:
        raise UserError(f"{path}: sequence_length = {config.sequence_length}: "
                        f"a shard has {SHARD_TOKENS} tokens; lower it")
    number = shards_needed(config)
    print(f"{path} needs {number} training shards")
    return min(number, SHARDS) if config.allow_repeat else number


# The hub


def authorize(request):
    """Adds the user and password of HF_ENDPOINT to a request for that server, and no other."""
    if BASIC_AUTHORIZATION and str(request.url).startswith(f"{constants.ENDPOINT}/"):
        request.headers["Authorization"] = BASIC_AUTHORIZATION


def client():
    """The library's HTTP client."""
    client = get_session()
    if authorize not in client.event_hooks["request"]:
        client.event_hooks["request"].append(authorize)
    return client


def soon(function, *arguments):
    """function(*arguments). Raises TooSlow if that takes longer than PATIENCE.

    The library's timeouts are for a single byte. A server that sends one now and then is left to a thread
    that nobody waits for.
    """
    seconds = max(PATIENCE, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    future = Future()

    def run():
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # it is the function's own
            raise
        raise TooSlow(f"no complete answer within {seconds:g} s") from None


def fast_enough(pieces):
    """Yields the pieces, bytes. Raises TooSlow if, over PATIENCE, they come at less than SLOWEST."""
    start = time.monotonic()
    received = 0
    for piece in pieces:
        yield piece
        received += len(piece)
        seconds = time.monotonic() - start
        if seconds >= PATIENCE:
            if received < SLOWEST * seconds:
                raise TooSlow(f"too slow, {received:,} bytes in {seconds:.0f} s")
            start += seconds
            received = 0


def asked_wait(error):
    """The seconds that the server asks to wait before the next request; None if it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return None
    after = error.response.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]+", after):
        return float(after)  # of any length, unlike int
    with contextlib.suppress(ValueError):  # no date either
        seconds = parsedate_to_datetime(after).timestamp() - time.time()
        return seconds if seconds > 0 else None
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]+)", error.response.headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def wait_after(error, name, otherwise):
    """Waits as long as the server asks for, or `otherwise` seconds. Raises the error if that is too long."""
    seconds = asked_wait(error)
    if seconds is None:
        seconds = otherwise
    if seconds > LONGEST_WAIT:
        raise error
    tqdm.write(f"{name}: {cause(error)}; trying again in {seconds:.0f} s", file=sys.stderr)
    time.sleep(seconds)


def query_hub(name, retry=True):
    """(bytes, SHA-256 or None if unknown) of the hub's file `name`, or the exception of the request."""
    for wait in QUERY_WAITS if retry else ():
        answer = query_hub_once(name)
        status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else 0
        passing = status in BUSY if status else isinstance(answer, HTTPError)
        if not passing:
            return answer
        try:
            wait_after(answer, name, wait)
        except Exception:
            return answer
    return query_hub_once(name)


def query_hub_once(name):
    try:
        client()
        url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
        metadata = soon(get_hf_file_metadata, url)
        if metadata.commit_hash is None:
            return UserError(f"{constants.ENDPOINT} does not answer like the hub")
        sha256 = metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None
        return metadata.size, sha256
    except Exception as error:  # the library and its transports raise many kinds
        return error


def explain(error):
    """What went wrong, without the name of the file, and after a semicolon the remedy."""
    if isinstance(error, HfHubHTTPError):
        response = error.response
        what = f"{response.url.host} answers {response.status_code} {response.reason_phrase}"
        remedy = REMEDIES.get(response.status_code, "wait a few minutes")
        wait = asked_wait(error) or 0
        if wait > LONGEST_WAIT:
            what += f" and asks to wait {wait:,.0f} s"
            remedy = "wait that long"
    elif isinstance(error, OSError) and error.errno:
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = error.strerror
        remedy = "make room" if no_room else "move it away, or correct its permissions"
    elif isinstance(error, UserError):
        what = str(error)
        remedy = "check HF_ENDPOINT and the proxy"
    else:
        lines = str(error).splitlines() or [""]
        what = f"a request to {constants.ENDPOINT} failed ({lines[0] or type(error).__name__})"
        remedy = "check the connection"
    return f"{what}; {remedy}, then run the script again to resume"


def cause(error):
    """What went wrong, without the remedy."""
    return explain(error).partition(";")[0]


# One shard


def refuse_special(path):
    """Raises OSError if `path` is a pipe or a device, from which reading might never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "not a regular file")


def verify_shard(path, size=None, sha256=None):
    """The manifest entry of the shard at `path`.

    Raises UserError if it is damaged: not `size` bytes or not this SHA-256, where given, or not a shard of
    GPT-2 tokens. Raises OSError if it cannot be read.
    """
    refuse_special(path)
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
    if size is not None and found != size:
        raise UserError(f"damaged: {found:,} bytes instead of {size:,}")
    try:
        entry = manifest_entry(path)
        tokens = open_shard(path)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(reason.partition(";")[0]) from None  # without its remedy, which is another script's
    if sha256 and entry["sha256"] != sha256:
        raise UserError(f"damaged: SHA-256 {entry['sha256']} instead of {sha256}")
    if len(tokens) and tokens.max() >= VOCABULARY["gpt2"]:
        raise UserError(
            f"damaged: token {tokens.max()} is outside GPT-2's vocabulary of {VOCABULARY['gpt2']}")
    return {**entry, "file": path.name.removesuffix(".partial")}


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def request_file(name, start):
    """The hub's response with the file `name` from the byte `start` on. Raises HfHubHTTPError."""
    headers = build_hf_headers()
    headers["Accept-Encoding"] = "identity"
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(REPOSITORY, name, repo_type="dataset")
    request = client().build_request("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    response = client().send(request, stream=True, follow_redirects=True)
    hf_raise_for_status(response)
    return response


def receive(name, file, start, size):
    """Appends the hub's file `name` from the byte `start` on to the open file.

    Raises EOFError if the file then has fewer than `size` bytes, TooSlow, and what the library raises.
    """
    with contextlib.closing(soon(request_file, name, start)) as response:
        if response.status_code != 206:
            file.truncate(0)  # the whole file comes
            start = 0
        # None: only in a terminal
        with tqdm(total=size, initial=start, desc=name, unit="B", unit_scale=True, leave=False,
                  disable=None) as bar:
            for piece in fast_enough(response.iter_bytes()):
                file.write(piece)
                bar.update(len(piece))
    file.flush()
    os.fsync(file.fileno())  # the content is on the disk before the name is
    received = os.fstat(file.fileno()).st_size
    if size is not None and received < size:
        raise EOFError(f"it ended after {received:,} of {size:,} bytes")


def download(name, out, size, sha256):
    """Downloads the shard `name` into the folder `out`, resuming NAME.partial. Returns its manifest entry.

    Not with the library's functions for it: hf_hub_download (and Xet) would start over where another process
    was stopped, and http_get waits as long as a server wants.
    """
    partial = out / f"{name}.partial"
    failed = 0  # attempts in a row without progress
    damaged = 0  # attempts with a damaged result
    slow = 0  # attempts that were ended because of that
    while True:
        refuse_special(partial)
        before = size_of(partial)
        try:
            if before != size:
                with open(partial, "ab") as file:
                    receive(name, file, before, size)
            entry = verify_shard(partial, size, sha256)
            os.replace(partial, out / name)
            return entry
        except Exception as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            refused = 400 <= status < 500 and status not in (416, *BUSY)
            no_room = isinstance(error, OSError) and error.errno
            if refused or no_room:
                raise
            if isinstance(error, UserError) or status == 416:  # what is there cannot be completed
                partial.unlink()
                damaged += 1
            failed = 1 if size_of(partial) > before else failed + 1
            slow += isinstance(error, TooSlow)
            if ATTEMPTS in (failed, damaged) or slow == SLOW_ATTEMPTS:
                raise
            wait_after(error, name, 2 ** failed)


def fetch(name, out, recorded, answer=None):
    """Verifies or downloads the shard `name`.

    `recorded` is its manifest entry of an earlier run, or {}; `answer`, if given, replaces that of query_hub.
    Returns its manifest entry, what was done, and whether the hub confirmed it. Raises whatever prevents the
    shard from being there.
    """
    answer = answer or query_hub(name)
    answered = isinstance(answer, tuple)
    size, sha256 = answer if answered else (None, None)
    try:
        entry = verify_shard(out / name, size, sha256 or recorded.get("sha256"))
        known = answered or recorded
        what = "good" if known else "header and tokens are good; its SHA-256 is not known here"
        return entry, what, answered
    except FileNotFoundError:
        pass
    except UserError as error:
        if not answered:
            raise UserError(f"{error}, and {cause(answer)}") from None
        tqdm.write(f"{name}: {error}; downloading it again", file=sys.stderr)
    if not answered:
        raise answer
    return download(name, out, size, sha256), "downloaded, good", True


# All shards


def read_manifest(out):
    """{file: entry} of the data set's shards in out/fineweb.json; empty if that cannot be read.

    Raises UserError if it is not a file.
    """
    path = out / "fineweb.json"
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is in the way, and not a file; move it elsewhere")
    try:
        entries = json.loads(path.read_text())["shards"]
        return {entry["file"]: entry for entry in entries if entry["file"] in NAMES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def update_manifest(out, manifest):
    """Lists those of the shards in `manifest`, {file: entry}, that are there in out/fineweb.json."""
    shards = [manifest[file] for file in sorted(manifest) if (out / file).exists()]
    try:
        write_manifest(out, "fineweb", "gpt2", f"data set {REPOSITORY} of the Hugging Face hub", shards)
    except (UserError, OSError) as error:
        tqdm.write(f"note: {error}; the shards themselves are good", file=sys.stderr)


def check_room(names, out):
    """Raises UserError if the disk has no room for what is missing of the shards `names` in `out`."""
    missing = [name for name in names if not (out / name).exists()]
    parts = sum(min(SHARD_BYTES, size_of(out / f"{name}.partial")) for name in missing)
    need = len(missing) * SHARD_BYTES - parts
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(f"{out}: {len(missing)} files need {need / 1e9:.1f} GB more, "
                        f"{free / 1e9:.1f} GB are free; make room, or choose another folder with --out")
    print(f"{out}: {len(names) - len(missing)} of {len(names)} files to verify, "
          f"{len(missing)} to download ({need / 1e9:.1f} GB)")


def fetch_all(names, out, jobs):
    """Verifies or downloads the shards `names` in `out`, `jobs` at a time, and lists them in fineweb.json.

    Raises UserError, with a line for each reason, if any is missing in the end.
    """
    manifest = read_manifest(out)
    present = sum((out / name).exists() for name in names)
    answer = query_hub(names[0], retry=present < len(names))
    if isinstance(answer, (tuple, EntryNotFoundError)):
        answer = None  # else it holds for all: the other files would only wait for the same
    elif present:
        print(f"{cause(answer)}: comparing the files with {out / 'fineweb.json'} only")
    failures = {}  # {reason: names}
    done = 0
    tokens = 0
    pool = ThreadPoolExecutor(jobs)  # no `with`: that would wait for the downloads after Ctrl-C
    futures = {pool.submit(fetch, name, out, manifest.get(name, {}), answer): name for name in names}
    for future in as_completed(futures):
        name = futures[future]
        try:
            entry, what, confirmed = future.result()
        except Exception as error:  # see query_hub
            failures.setdefault(explain(error), []).append(name)
            continue
        done += 1
        tokens += entry["tokens"]
        tqdm.write(f"[{done}/{len(names)}] {name}: {what}")
        if confirmed:
            manifest[name] = entry
            update_manifest(out, manifest)
    if failures:
        raise UserError("\n".join(f"{some_of(failed)}: {reason}" for reason, failed in failures.items()))
    print(f"{out}: all {len(names)} files are there and good, {tokens:,} tokens")


def some_of(names):
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


@command()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="N|CONFIG.toml",
                        help=f"number of training shards, 1 to {SHARDS}, or a configuration file")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "fineweb10B",
                        help="folder of the shards (default: data/fineweb10B)")
    parser.add_argument("--jobs", type=int, choices=range(1, 33), default=4, metavar="N",
                        help="downloads at a time, 1 to 32 (default: 4)")
    args = parser.parse_args()
    names = file_names(args.shards)
    try:
        with locked(args.out):
            check_room(names, args.out)
            fetch_all(names, args.out, args.jobs)
    except KeyboardInterrupt:
        print("\ninterrupted; run the script again to resume", file=sys.stderr, flush=True)
        os._exit(1)  # at once: sys.exit would wait for the downloads; their parts are kept


if __name__ == "__main__":
    main()

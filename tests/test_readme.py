"""README.md: its code is the trainer's, its example works, and its links lead somewhere."""
import re
import tomllib

import pytest

from conftest import ROOT, checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def block(language, start):
    """The one block of that language that has this text."""
    found, = [text for kind, text in BLOCKS if kind == language and start in text]
    return found


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_step_is_the_trainers():
    assert block("python", "gather_rows") in (ROOT / "train_gpt2.py").read_text(encoding="utf-8")


def test_an_optimizer_of_ones_own(start, tmp_path, monkeypatch):
    (tmp_path / "readme_example.py").write_text(block("python", "class SignDescent"))
    monkeypatch.syspath_prepend(tmp_path)
    fields = tomllib.loads(block("toml", "SignDescent"))
    fields["optimizer"] = fields["optimizer"].replace("optimizers.mine", "readme_example")
    done = start(run_name="a", **fields)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"val_loss:(\S+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.1


def test_a_model_of_ones_own(start, tmp_path, monkeypatch):
    code = "import torch\nimport train_gpt2\n" + block("python", "class ScaledGPT")
    (tmp_path / "readme_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    done = start(run_name="a", model="readme_model:ScaledGPT", optimizer="newton_muon", refresh_interval=4)
    assert done.returncode == 0, done.stderr
    model = checkpoint(tmp_path / "logs/a", 10)["model"]
    assert model["scale"].shape == (16,) and (model["scale"] != 1).all()  # AdamW has trained it


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https://)([^)]+)\)", README))))
def test_links_lead_somewhere(path):
    file, _, anchor = path.partition("#")
    assert (ROOT / file).exists()
    if anchor:
        text = (ROOT / (file or "README.md")).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]

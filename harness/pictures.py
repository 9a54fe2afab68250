"""What all pictures share: a colour, a line and a name for each optimizer, readable in greyscale too."""
from harness.command import printable

NAMES = {"muon": "Muon", "newton_muon": "Newton-Muon", "adamw": "AdamW", "sgd": "SGD"}
COLORS = {"muon": "#0072b2", "newton_muon": "#d55e00", "adamw": "#8c8c8c", "sgd": "#000000"}
LINES = {"muon": "-", "newton_muon": "--", "adamw": "-.", "sgd": ":"}
OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5d3a9b", "#4b0d0d")  # any further optimizers, in turn


def short_name(optimizer):
    """What a picture calls an optimizer of a configuration: Muon, or the class of module:Class."""
    return printable(NAMES.get(optimizer, optimizer.rpartition(":")[2]))


def styles(optimizers):
    """{optimizer: dict(color, linestyle)}: its own if it has them, so that every picture shows it alike."""
    others = [name for name in dict.fromkeys(optimizers) if name not in COLORS]
    chosen = {name: dict(color=OTHERS[i % len(OTHERS)], linestyle=(0, (5, 1 + i))) for i, name in enumerate(others)}
    return chosen | {name: dict(color=COLORS[name], linestyle=LINES[name]) for name in COLORS}

"""The optimizers that scripts/zoo.py compares, and around which values each of them is tuned."""
import importlib
import inspect
import json
import math
from dataclasses import dataclass, field

from harness.pictures import short_name
from harness.tuning import RATES, open_sides
from train_gpt2 import Config


@dataclass
class Entry:
    """An optimizer of the comparison."""
    optimizer: str  # as in a configuration
    setting: str  # the setting that matters most, besides the learning rates
    values: tuple  # what is tried for it, besides its default
    source: str
    arguments: dict = field(default_factory=dict)
    rates: tuple = (0.02, 0.002)  # learning_rate, hidden_learning_rate: where tuning starts on the CPU track
    title: str = ""  # in the picture, where the name of the class would not do
    groups: dict = field(default_factory=dict)  # the field `groups` of the configuration
    most: float = math.inf  # that the setting may be

    @property
    def label(self):
        return self.title or short_name(self.optimizer)

    @property
    def default(self):
        """Value of the setting where a point names none."""
        if self.setting in self.arguments:
            return self.arguments[self.setting]
        module, _, kind = self.optimizer.partition(":")
        if kind:
            own = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
            if self.setting in own:
                return own[self.setting].default
        return getattr(Config(), self.setting)

    def value(self, setting):
        """The number that `setting` of a line of runs.csv stands for."""
        return json.loads(setting) if setting else self.default

    def next_value(self, value, side):
        """The next larger (side 1) or smaller (-1) value of the setting to try; None where its range ends.

        For a momentum or beta 1 - value changes by a factor of 2, until the value is 0; for all others the
        value does, up to `most`.
        """
        if self.setting.startswith(("beta", "momentum")):
            rest = float(f"{(1 - value) * 2.0 ** -side:.3g}")
            found = round(1 - min(rest, 1.0), 9)
        else:
            found = min(float(f"{value * 2.0 ** side:.3g}"), self.most)
        return None if found == value else found

    def neighbours(self, point, tried):
        """[(name, side, neighbour), ...] of `point` that must be tried before it is known to be inside.

        It is inside if, along both rates and the setting, points lie on both sides of it that differ in
        nothing else, or the axis ends there. `name` is what changes: a rate by a factor of 2, the setting as
        in next_value(). Points are (optimizer, steps, learning_rate, hidden_learning_rate, setting).
        """
        def numbers(point):
            return (*point[2:4], self.value(point[4]))

        found = []
        for axis, side in open_sides(numbers(point), [numbers(other) for other in tried]):
            changed = list(point)
            if axis < len(RATES):
                changed[2 + axis] = float(f"{point[2 + axis] * 2.0 ** side:.3g}")
                found.append((RATES[axis], side, tuple(changed)))
                continue
            value = self.next_value(self.value(point[4]), side)
            if value is not None:
                changed[4] = "" if value == self.default else json.dumps(value)
                found.append((self.setting, side, tuple(changed)))
        return found


# No optimizer starts with a longer memory than this, unless that is its tuned setting.
# records/zoo/notes.md says why.
SHORTER_MEMORY = {"momentum": 0.9}

ZOO = {
    "muon": Entry(
        "muon", source="K. Jordan et al., 2024",
        setting="momentum", values=(0.9, 0.98)),
    "newton_muon": Entry(
        "newton_muon", source="arXiv:2604.01472",
        setting="momentum", values=(0.9, 0.98), rates=(0.014, 0.002)),
    "adamw": Entry(
        "adamw", source="arXiv:1711.05101",
        setting="beta2", values=(0.9, 0.99), rates=(0.01, 0.0057)),
    "torch_muon": Entry(
        "torch.optim:Muon", source="torch", title="Muon of torch",
        arguments={"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
        setting="momentum", values=(0.9, 0.98), rates=(0.02, 0.01)),
    "polar_muon": Entry(
        "optimizers.polar_muon:PolarMuon", source="arXiv:2505.16932",
        setting="momentum", values=(0.9, 0.98)),
    "exact_muon": Entry(
        "optimizers.polar_muon:PolarMuon", source="Muon, by SVD", title="Muon by SVD",
        arguments={"exact": True},
        setting="momentum", values=(0.9, 0.98)),
    "normuon": Entry(
        "optimizers.normuon:NorMuon", source="arXiv:2510.05491",
        arguments=SHORTER_MEMORY,
        setting="beta2", values=(0.9, 0.99)),
    "sf_normuon": Entry(
        "optimizers.sf_normuon:SFNorMuon", source="arXiv:2605.23061",
        setting="beta1", values=(0.8, 0.95), rates=(0.02, 0.008)),
    "muon_igt": Entry(
        "optimizers.muon_igt:MuonIGT", source="arXiv:2605.05577",
        setting="momentum", values=(0.8, 0.95)),
    "scion": Entry(
        "optimizers.scion:Scion", source="arXiv:2502.07529",
        setting="radius", values=(10.0, 250.0)),
    "stiefel_muon": Entry(
        "optimizers.stiefel_muon:StiefelMuon", source="arXiv:2605.09238",
        setting="momentum", values=(0.9, 0.98), rates=(0.02, 0.0005)),
    "low_rank_muon": Entry(
        "optimizers.low_rank_muon:LowRankMuon", source="arXiv:2509.11983",
        arguments=SHORTER_MEMORY,
        setting="rank_fraction", values=(0.125, 0.5), most=1.0),
    "dion": Entry(
        "optimizers.dion:Dion", source="arXiv:2504.05295",
        arguments=SHORTER_MEMORY,
        setting="rank_fraction", values=(0.125, 0.5), most=1.0),
    "orth_dion": Entry(
        "optimizers.dion:OrthDion", source="arXiv:2605.16341",
        arguments=SHORTER_MEMORY,
        setting="rank_fraction", values=(0.125, 0.5), most=1.0),
    "ef_muon": Entry(
        "optimizers.ef_muon:EFMuon", source="arXiv:2605.08980",
        setting="momentum", values=(0.9, 0.98), rates=(0.02, 4.0)),
    "dp_muon": Entry(
        "optimizers.dp_muon:DPMuon", source="arXiv:2605.12994",
        arguments=SHORTER_MEMORY,
        setting="noise_multiplier", values=(0.003, 0.03)),
    "power_newton_muon": Entry(
        "optimizers.power_newton_muon:PowerNewtonMuon", source="arXiv:2604.01472",
        arguments=SHORTER_MEMORY,
        setting="power", values=(0.25, 0.75), most=1.0),
    "shampoo": Entry(
        "optimizers.shampoo:Shampoo", source="arXiv:1802.09568",
        setting="beta2", values=(0.9, 0.98)),
    "soap": Entry(
        "optimizers.soap:SOAP", source="arXiv:2409.11321",
        arguments={"beta1": 0.9},
        setting="beta2", values=(0.9, 0.98), rates=(0.02, 0.004)),
    "soap_one_sided": Entry(
        "optimizers.soap:SOAP", source="arXiv:2409.11321", title="SOAP, one-sided",
        arguments={"beta1": 0.9, "one_sided": True},
        setting="beta2", values=(0.9, 0.98), rates=(0.02, 0.004)),
    "pmuon": Entry(
        "optimizers.pmuon:PMuon", source="modded-nanogpt, optimizer track, record 18",
        arguments=SHORTER_MEMORY,
        setting="power", values=(0.2, 0.4), most=0.5),
    "soap_muon": Entry(
        "optimizers.soap_muon:SOAPMuon", source="modded-nanogpt, optimizer track, record 44",
        arguments=SHORTER_MEMORY,
        setting="beta2", values=(0.8, 0.95)),
    "signum": Entry(
        "optimizers.signum:Signum", source="signSGD, ICML 2018",
        setting="momentum", values=(0.9, 0.98)),
    "lion": Entry(
        "optimizers.lion:Lion", source="arXiv:2302.06675",
        setting="beta2", values=(0.95, 0.995), rates=(0.02, 0.001)),
    "adopt": Entry(
        "optimizers.adopt:ADOPT", source="arXiv:2411.02853",
        arguments={"beta2": 0.99},
        setting="beta2", values=(0.95, 0.999), rates=(0.02, 0.004)),
}

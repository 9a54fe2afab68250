from dataclasses import dataclass, field


@dataclass
class Entry:
    """An optimizer of the comparison."""
    optimizer: str  # as in a configuration
    setting: str  # the setting that ../shared/reference/RULES.md calls most sensitive
    values: tuple  # two others than the default, to try
    source: str
    arguments: dict = field(default_factory=dict)
    rates: tuple = (0.02, 0.002)  # centre of the tuned learning rates


ZOO = {
    "signum": Entry("optimizers.signum:Signum", "momentum", (0.9, 0.98), "signSGD, ICML 2018"),
    "normuon": Entry("optimizers.normuon:NorMuon", "beta2", (0.9, 0.99), "arXiv:2510.05491"),
    "ef_muon": Entry("optimizers.ef_muon:EFMuon", "momentum", (0.9, 0.98), "arXiv:2605.08980", rates=(0.02, 4.0)),
}

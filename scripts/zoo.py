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
    "power_newton_muon": Entry("optimizers.power_newton_muon:PowerNewtonMuon", "power", (0.25, 0.75), "arXiv:2604.01472",
                               {"refresh_interval": 8}),
    "polar_muon": Entry("optimizers.polar_muon:PolarMuon", "momentum", (0.9, 0.98), "arXiv:2505.16932"),
    "exact_muon": Entry("optimizers.polar_muon:PolarMuon", "momentum", (0.9, 0.98), "Muon, by SVD", {"exact": True}),
    "low_rank_muon": Entry("optimizers.low_rank_muon:LowRankMuon", "rank_fraction", (0.125, 0.5), "arXiv:2509.11983"),
    "dion": Entry("optimizers.dion:Dion", "rank_fraction", (0.125, 0.5), "arXiv:2504.05295"),
    "orth_dion": Entry("optimizers.dion:OrthDion", "rank_fraction", (0.125, 0.5), "arXiv:2605.16341"),
    "scion": Entry("optimizers.scion:Scion", "radius", (10.0, 250.0), "arXiv:2502.07529"),
    "muon_igt": Entry("optimizers.muon_igt:MuonIGT", "momentum", (0.8, 0.95), "arXiv:2605.05577"),
    "dp_muon": Entry("optimizers.dp_muon:DPMuon", "noise_multiplier", (0.003, 0.03), "arXiv:2605.12994"),
    "stiefel_muon": Entry("optimizers.stiefel_muon:StiefelMuon", "momentum", (0.9, 0.98), "arXiv:2605.09238"),
}

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
    "soap": Entry("optimizers.soap:SOAP", "beta2", (0.9, 0.98), "arXiv:2409.11321", rates=(0.02, 0.004)),
    "soap_one_sided": Entry("optimizers.soap:SOAP", "beta2", (0.9, 0.98), "arXiv:2409.11321", arguments={"one_sided": True},
                            rates=(0.02, 0.004)),
    "shampoo": Entry("optimizers.shampoo:Shampoo", "beta2", (0.9, 0.98), "arXiv:1802.09568"),
    "sf_normuon": Entry("optimizers.sf_normuon:SFNorMuon", "beta1", (0.8, 0.95), "arXiv:2605.23061"),
    "lion": Entry("optimizers.lion:Lion", "beta2", (0.95, 0.995), "arXiv:2302.06675", rates=(0.02, 0.001)),
    "adopt": Entry("optimizers.adopt:ADOPT", "beta2", (0.95, 0.999), "arXiv:2411.02853", arguments={"beta2": 0.99}, rates=(0.02, 0.004)),
    "pmuon": Entry("optimizers.pmuon:PMuon", "power", (0.2, 0.4), "modded-nanogpt, optimizer track, record 18"),
    "soap_muon": Entry("optimizers.soap_muon:SOAPMuon", "beta2", (0.8, 0.95), "modded-nanogpt, optimizer track, record 44"),
    "torch_muon": Entry("torch.optim:Muon", "momentum", (0.9, 0.98), "torch",
                        arguments={"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}, rates=(0.02, 0.01)),
    "power_newton_muon": Entry("optimizers.power_newton_muon:PowerNewtonMuon", "power", (0.25, 0.75), "arXiv:2604.01472"),
}

"""SOAP: Adam in the eigenbasis of Shampoo's two second moments (Vyas et al., arXiv:2409.11321).

    the first step only sets L and R (as below, from 0), and Q_L and Q_R, all singular vectors of G; step t = 1, 2, ... after it does
    M <- beta1 M + (1 - beta1) G
    v <- beta2 v + (1 - beta2) (Q_L^T G Q_R)^2
    N =  (Q_L^T M Q_R / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    W <- (1 - lr weight_decay) W - lr Q_L N Q_R^T
    L <- beta2 L + (1 - beta2) G G^T,  R <- beta2 R + (1 - beta2) G^T G
    and where t is a multiple of refresh_interval, for Q = Q_L, A = L and for Q = Q_R, A = R: sort the columns of Q, and v with
    them, by falling diag(Q^T A Q), then Q <- orthogonal factor of the QR decomposition of (A + 1e-4 (tr(A) / m) I) Q

lr is about the root-mean-square of an element's update, as in Adam and Muon. one_sided: the larger side's basis is I.
M is kept unrotated, which is the same as changing its basis at each refresh. eps is where torch.optim.Adam has it, decay comes before the
step, and no side counts as too large. The 1e-4 is ours: without it rounding would choose the directions that no gradient has had yet.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.soap:SOAP --hidden_learning_rate 0.004
"""
import torch

from optimizers import MatrixOptimizer, average

RIDGE = 1e-4


def observe(state, G, beta, sides, refresh):
    """Averages G G^T in state["left"] and G^T G in state["right"], of those in `sides`, and moves "left_basis" and "right_basis", at first
    the singular vectors of G, towards their eigenvectors by a step of orthogonal iteration if `refresh`."""
    for side in sides:
        X, basis = G if side == "left" else G.mT, f"{side}_basis"
        A = average(state, side, X @ X.mT, beta)
        if basis not in state:
            state[basis] = torch.linalg.svd(X)[0]
        elif refresh:
            Q, v = state[basis], state["mean_squares"]
            order = (Q * (A @ Q)).sum(-2).argsort(-1, descending=True)  # (blocks, size)
            v.copy_(v.take_along_dim(order.unsqueeze(-1), -2) if side == "left" else v.take_along_dim(order.unsqueeze(-2), -1))
            Q = Q.take_along_dim(order.unsqueeze(-2), -1)
            state[basis] = torch.linalg.qr(A @ Q + RIDGE * A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * Q)[0]


def rotate(X, state, back=False):
    """Q_L^T X Q_R, or Q_L X Q_R^T to go back."""
    for side in ("left", "right"):
        if (Q := state.get(f"{side}_basis")) is not None:
            X = (Q if back else Q.mT) @ X if side == "left" else X @ (Q.mT if back else Q)
    return X


class SOAP(MatrixOptimizer):
    def __init__(self, params, lr=3e-3, beta1=0.95, beta2=0.95, eps=1e-8, weight_decay=0.0, refresh_interval=10, one_sided=False):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, refresh_interval=refresh_interval,
                         one_sided=one_sided)

    def update(self, W, G, state, group):
        m, n = G.shape[-2:]
        sides = ("left" if m <= n else "right",) if group["one_sided"] else ("left", "right")
        t = state["step"] = state.get("step", -1) + 1
        if t:
            M = average(state, "momentum_buffer", G, group["beta1"])
            v = average(state, "mean_squares", rotate(G, state).square(), group["beta2"])
            N = rotate(M, state) / (1 - group["beta1"] ** t) / ((v / (1 - group["beta2"] ** t)).sqrt() + group["eps"])
            W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rotate(N, state, back=True), alpha=group["lr"])
        observe(state, G, group["beta2"], sides, refresh=t % group["refresh_interval"] == 0)

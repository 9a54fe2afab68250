"""SOAP: Adam in the eigenbasis of Shampoo's two second moments (Vyas et al., arXiv:2409.11321).

    first step: set L and R as below, from 0, and Q_L and Q_R to all singular vectors of G; W stays as it
    is. Then, for t = 1, 2, ...
    M <- beta1 M + (1 - beta1) G
    v <- beta2 v + (1 - beta2) (Q_L^T G Q_R)^2
    N =  (Q_L^T M Q_R / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    W <- (1 - lr weight_decay) W - lr Q_L N Q_R^T
    L <- beta2 L + (1 - beta2) G G^T
    R <- beta2 R + (1 - beta2) G^T G
    if t is a multiple of refresh_interval, for Q = Q_L, A = L and for Q = Q_R, A = R:
        sort the columns of Q, and v with them, by falling diag(Q^T A Q)
        Q <- orthogonal factor of (A + 1e-4 (tr(A) / m) I) Q, by QR

With one_sided, the basis of the larger side is I.

lr is about the root mean square of an element's update, as in Adam and Muon. eps is where torch.optim.Adam
has it, decay comes before the step, and no side counts as too large. Keeping M unrotated is the same as
changing its basis at each refresh. The 1e-4 is not in the paper: without it, rounding would choose the
directions that no gradient has had yet.

    python train_gpt2.py configs/cpu_muon.toml --optimizer optimizers.soap:SOAP \\
        --hidden_learning_rate 0.004
"""
import torch

from optimizers import MatrixOptimizer, apply_update, average

RIDGE = 1e-4


def observe(state, G, beta, sides, refresh):
    """Averages G G^T in state["left"] and G^T G in state["right"], for each of `sides`. The first call
    sets state["left_basis"] and state["right_basis"] to the singular vectors of G. With `refresh`, later
    calls move them towards the eigenvectors of the averages."""
    for side in sides:
        basis = f"{side}_basis"
        X = G if side == "left" else G.mT
        A = average(state, side, X @ X.mT, beta)
        if basis not in state:
            state[basis], _, _ = torch.linalg.svd(X)
        elif refresh:
            state[basis] = refreshed_basis(state[basis], A, state["mean_squares"], side)


def refreshed_basis(Q, A, v, side):
    """One step of orthogonal iteration from the basis Q (blocks, size, size) towards the eigenvectors of A.

    It first sorts the columns of Q by falling diag(Q^T A Q), and in place the rows (side "left") or
    columns ("right") of the mean squares v (blocks, m, n) with them.
    """
    order = (Q * (A @ Q)).sum(-2).argsort(-1, descending=True)  # (blocks, size)
    columns = order.unsqueeze(-2)
    if side == "left":
        v.copy_(v.take_along_dim(order.unsqueeze(-1), -2))
    else:
        v.copy_(v.take_along_dim(columns, -1))
    Q = Q.take_along_dim(columns, -1)
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    Q, _ = torch.linalg.qr(A @ Q + RIDGE * mean * Q)
    return Q


def rotate(X, state):
    """Q_L^T X Q_R, where a basis that is not in the state counts as I."""
    if "left_basis" in state:
        X = state["left_basis"].mT @ X
    if "right_basis" in state:
        X = X @ state["right_basis"]
    return X


def rotate_back(X, state):
    """Q_L X Q_R^T, where a basis that is not in the state counts as I."""
    if "left_basis" in state:
        X = state["left_basis"] @ X
    if "right_basis" in state:
        X = X @ state["right_basis"].mT
    return X


class SOAP(MatrixOptimizer):
    def __init__(self, params, lr=3e-3, beta1=0.95, beta2=0.95, eps=1e-8, weight_decay=0.0,
                 refresh_interval=10, one_sided=False):
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
                         refresh_interval=refresh_interval, one_sided=one_sided)

    def update(self, W, G, state, group):
        beta1 = group["beta1"]
        beta2 = group["beta2"]
        state["step"] = state.get("step", -1) + 1
        t = state["step"]
        if t > 0:
            M = average(state, "momentum_buffer", G, beta1)
            v = average(state, "mean_squares", rotate(G, state).square(), beta2)
            mean = rotate(M, state) / (1 - beta1 ** t)
            root = (v / (1 - beta2 ** t)).sqrt()
            N = mean / (root + group["eps"])
            apply_update(W, rotate_back(N, state), group)
        sides = ("left", "right")
        if group["one_sided"]:
            m, n = G.shape[-2:]
            sides = ("left",) if m <= n else ("right",)
        observe(state, G, beta2, sides, refresh=t % group["refresh_interval"] == 0)

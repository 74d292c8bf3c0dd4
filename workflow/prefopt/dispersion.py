"""How much preferences disperse over a prompt: from the reference's token entropies, an ensemble's votes, or known.

Arrays are numpy, one entry per pair. E is a normalised entropy in (0, 1); c = -phi_star log E is the dispersion
weight (mean 1 on train, large where the model is sure); lambda = -log phi is the dispersion of the Mallows law.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import BadInput, FailedCheck, nearest

Norm = Literal["per_response_mean", "sum_over_max_len"]
Mapping = Literal["identity", "half"]
Control = Literal["shuffled", "constant", "inverse"]
Floats = NDArray[np.float64]

_CLAMP = 1e-6


def normalised_entropy(
    chosen_entropy: ArrayLike,
    rejected_entropy: ArrayLike,
    chosen_tokens: ArrayLike,
    rejected_tokens: ArrayLike,
    vocab_size: int,
    *,
    norm: Norm = "per_response_mean",
) -> Floats:
    """Entropy of the reference on both responses as a fraction of its maximum, in [1e-6, 1 - 1e-6].

    ``per_response_mean``: E = (H_chosen + H_rejected) / (2 log V);
    ``sum_over_max_len``:  E = (n_chosen H_chosen + n_rejected H_rejected) / (2 max(n_chosen, n_rejected) log V).
    H in nats per response token, n in tokens, V the last dimension of the logits.

    Raises BadInput for entropies outside [0, log V], empty responses or an unknown norm.

    Source: 2405.14953, section 3.3; the default follows the authors' code.
    """
    _known("norm", norm, Norm)
    chosen, rejected = np.asarray(chosen_entropy, dtype=float), np.asarray(rejected_entropy, dtype=float)
    highest = np.log(vocab_size)
    for name, entropy in (("chosen_entropy", chosen), ("rejected_entropy", rejected)):
        # Written so that NaN fails too; the band allows for entropies accumulated in float32.
        _first_bad(
            name, entropy, (entropy >= -1e-5) & (entropy <= highest * (1 + 1e-4)), f"nats per token <= {highest:g}"
        )
    if norm == "per_response_mean":
        fraction = (chosen + rejected) / (2 * highest)
    else:
        lengths = np.asarray(chosen_tokens, dtype=float), np.asarray(rejected_tokens, dtype=float)
        for name, length in zip(("chosen_tokens", "rejected_tokens"), lengths, strict=True):
            _first_bad(name, length, length >= 1, "at least one token")
        fraction = (chosen * lengths[0] + rejected * lengths[1]) / (2 * np.maximum(*lengths) * highest)
    return np.clip(fraction, _CLAMP, 1 - _CLAMP)


def sequence_entropy(prompt_id: ArrayLike, logp: ArrayLike, tokens: ArrayLike, vocab_size: int) -> dict[int, float]:
    """Monte-Carlo entropy of the reference's responses to each prompt, as a fraction of its maximum.

    E(x) = -sum_m log ref(y_m | x) / (sum_m n_m log V) over samples y_m ~ ref(. | x): an unbiased sum of sequence
    entropies over the tokens they took. Clamped to [1e-6, 1 - 1e-6]; one entry per prompt.

    Raises BadInput for positive or missing log-probabilities and empty responses.

    Source: 2405.14953, eq. 10, with the expectation over sequences sampled instead of teacher-forced.
    """
    prompts, inverse = np.unique(np.asarray(prompt_id), return_inverse=True)
    values, lengths = np.asarray(logp, dtype=float), np.asarray(tokens, dtype=float)
    _first_bad("ref_logp", values, values <= 0, "a log-probability, 0 or less")
    _first_bad("tokens", lengths, lengths >= 1, "at least one token")
    nats = -np.bincount(inverse, weights=values) / np.bincount(inverse, weights=lengths)
    fractions = np.clip(nats / np.log(vocab_size), _CLAMP, 1 - _CLAMP)
    return dict(zip(prompts.tolist(), fractions.tolist(), strict=True))


def vote_entropy(reward_margin: ArrayLike) -> Floats:
    """Binary entropy of an ensemble's votes on each pair as a fraction of log 2, in [1e-6, 1 - 1e-6].

    E = H(p) / log 2, p = (v + 1) / (K + 2): v of the K members give chosen the higher reward (ties half); one
    pseudo-vote each way keeps E above 0 where all agree. Labels do not enter: H(p) = H(1 - p). ``reward_margin`` is
    chosen - rejected reward [pairs, K].

    Raises BadInput for margins that are not finite or not of this shape.
    """
    margins = np.asarray(reward_margin, dtype=float)
    if margins.ndim != 2 or margins.shape[1] == 0:
        raise BadInput(f"vote_entropy: reward margins of shape {margins.shape}; expected [pairs, members]")
    _first_bad("reward_margin", margins.sum(axis=1), np.isfinite(margins).all(axis=1), "finite rewards")
    votes = ((margins > 0) + 0.5 * (margins == 0)).sum(axis=1)
    p = (votes + 1) / (margins.shape[1] + 2)
    return np.clip(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)), _CLAMP, 1 - _CLAMP)


def human_votes(chosen: ArrayLike, rejected: ArrayLike, tie: ArrayLike) -> Floats:
    """Binary entropy of the annotators' votes on each pair as a fraction of log 2, in [1e-6, 1 - 1e-6].

    E = H(p) / log 2, p = (n_chosen + n_tie / 2 + 1) / (n + 2), counts of votes [pairs]: as ``vote_entropy`` with people
    in the place of reward models. A tie is half a vote for each side, a level vote has the largest entropy.

    Raises BadInput for negative counts or a pair without a vote.
    """
    a, b, level = (np.asarray(count, dtype=float) for count in (chosen, rejected, tie))
    n = a + b + level
    _first_bad("votes", n, (np.minimum(np.minimum(a, b), level) >= 0) & (n > 0), "one vote or more on every pair")
    p = (a + level / 2 + 1) / (n + 2)
    return np.clip(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)), _CLAMP, 1 - _CLAMP)


def rating_spread(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """Mean variance of the ratings predicted for both responses, in [1e-6, 1 - 1e-6].

    Variances [pairs] of three classes a unit apart, at most 1 (half of the annotators at either end). That the spread
    of DPRM (arXiv 2402.09764) stands for dispersion is ours. Raises BadInput for a variance outside [0, 1].
    """
    one, other = (np.asarray(values, dtype=float) for values in (chosen, rejected))
    _first_bad("spread", one + other, (np.minimum(one, other) >= 0) & (np.maximum(one, other) <= 1), "in [0, 1]")
    return np.clip((one + other) / 2, _CLAMP, 1 - _CLAMP)


def phi_star(normalised_entropy_train: ArrayLike) -> float:
    """1 / mean(-log E) over the training pairs: the constant that gives c mean 1 there.

    Raises BadInput without training pairs or with E outside (0, 1).
    """
    entropy = np.asarray(normalised_entropy_train, dtype=float)
    if entropy.size == 0:
        raise BadInput("phi_star: no training pairs to calibrate the dispersion on; give the train split at least one")
    _first_bad("normalised_entropy", entropy, (entropy > 0) & (entropy < 1), "a fraction between 0 and 1")
    return float(1 / np.mean(-np.log(entropy)))


def dispersion_weight(normalised_entropy: ArrayLike, phi_star: float) -> Floats:
    """c = -phi_star * log E, positive, mean 1 over the pairs that phi_star was calibrated on.

    Raises BadInput for E outside (0, 1) or a phi_star that is not positive.

    Source: 2405.14953, eq. 11.
    """
    entropy = np.asarray(normalised_entropy, dtype=float)
    _first_bad("normalised_entropy", entropy, (entropy > 0) & (entropy < 1), "a fraction between 0 and 1")
    if not phi_star > 0:
        raise BadInput(f"phi_star is {phi_star}; a positive number is needed, or every preference would be inverted")
    return -phi_star * np.log(entropy)


def neg_log_dispersion(weight: ArrayLike, mapping: Mapping = "identity") -> Floats:
    """lambda = -log phi of the Mallows-phi link from the weight c: ``identity`` lambda = c, ``half`` lambda = c / 2.

    The paper calls c its estimate of -log phi (identity), while its theta link sets c = -2 log phi (half).

    Raises BadInput for an unknown mapping.
    """
    _known("mapping", mapping, Mapping)
    return np.asarray(weight, dtype=float) * (1.0 if mapping == "identity" else 0.5)


def apply_control(weight: ArrayLike, train_mask: ArrayLike, control: Control | None, seed: int = 0) -> Floats:
    """The weights of a control arm; None leaves them as they are.

    ``shuffled`` permutes them among the training pairs and among the others: same law, no link to the prompt;
    ``constant`` is 1 everywhere; ``inverse`` is 1/c scaled to mean 1 over the training pairs.

    Raises BadInput for an unknown control.
    """
    values, train = np.array(weight, dtype=float), np.asarray(train_mask, dtype=bool)
    if control is None:
        return values
    _known("control", control, Control)
    if control == "constant":
        return np.ones_like(values)
    if control == "inverse":
        return (1 / values) / np.mean(1 / values[train])
    rng = np.random.default_rng(seed)
    for part in (train, ~train):
        values[part] = rng.permutation(values[part])
    return values


def check_weights(weight: ArrayLike, train_mask: ArrayLike) -> None:
    """Raise FailedCheck unless the weights are finite, positive, mean 1 on train (to 1e-6) and vary there."""
    values, train = np.asarray(weight, dtype=float), np.asarray(train_mask, dtype=bool)
    usable = np.isfinite(values) & (values > 0)
    if not usable.all():
        row = int(np.argmin(usable))
        raise FailedCheck(f"dispersion weight: row {row} is {values[row]}; all must be positive (sign of log E?)")
    mean = float(values[train].mean()) if train.any() else float("nan")
    if not abs(mean - 1) <= 1e-6:
        raise FailedCheck(
            f"dispersion weight: mean over {train.sum()} training pairs is {mean:g}, not 1; calibrate again"
        )
    if np.ptp(values[train]) <= 1e-9:
        raise FailedCheck("dispersion weight: the same on every training pair, so MallowsPO would be plain DPO")


def _known(what: str, name: str, choices: object) -> None:
    if name not in get_args(choices):
        raise BadInput(f"dispersion: unknown {what} '{name}'; {nearest(str(name), get_args(choices))}")


def _first_bad(name: str, values: Floats, good: NDArray[np.bool_], expected: str) -> None:
    if not np.all(good):
        row = int(np.argmin(np.atleast_1d(good)))
        raise BadInput(f"{name}: row {row} is {np.atleast_1d(values)[row]}; expected {expected}")

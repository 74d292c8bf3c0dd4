"""The length-controlled win rate: its solver by optimality conditions, its values by the published leaderboard."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pandas as pd
import pytest

from prefopt.errors import BadInput
from prefopt.evaluation import length_control
from prefopt.evaluation.length_control import fit_l1_logistic, kkt_residual, length_controlled_from_weights, sigmoid
from prefopt.winrate import length_controlled_interval, length_controlled_win_rate

LC = "length_controlled_win_rate"


def synthetic(b_length=-1.2, b_difficulty=0.7, b_model=0.4, n=800, seed=0):
    """Annotations, difficulties and gamed rows whose soft labels are the model's own probabilities."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1, n)
    delta = rng.normal(100, 300, n).round()
    t = np.tanh(delta / delta.std(ddof=1))
    frame = pd.DataFrame({"index": np.arange(n), "len_model": 5000.0, "len_baseline": 5000 + delta})
    frame["preference"] = 1 + sigmoid(b_length * t + b_difficulty * difficulty + b_model)
    std = np.concatenate([rng.normal(-1, 1, n), rng.normal(1, 1, n)])
    twice = np.tile(difficulty, 2)
    p = sigmoid(b_length * np.tanh(std) + b_difficulty * twice)
    gamed = pd.DataFrame({"preference": p, "std_delta_len": std, "instruction_difficulty": twice})
    return frame, difficulty, gamed


def test_known_coefficients_come_back():
    frame, difficulty, gamed = synthetic()
    out = length_controlled_win_rate(frame, difficulty=difficulty, gamed=gamed, C=1e9)
    assert out["weights"] == pytest.approx({"length": -1.2, "difficulty": 0.7, "model": 0.4}, abs=1e-6)
    q = 1 / (1 + np.exp(-(0.4 + 0.7 * difficulty)))
    assert out[LC] == pytest.approx(100 * q.mean(), abs=1e-5)
    assert out["lc_standard_error"] == pytest.approx(100 * q.std(ddof=1) / math.sqrt(800), abs=1e-6)
    assert out["win_rate"] == pytest.approx(100 * (frame["preference"] - 1).mean())
    assert (out["n_total"], out["n_missing"], out["avg_length"]) == (800, 0, 5000)
    assert (out["variant"], out["C"]) == ("length_controlled_v1", 1e9)


def test_fewer_inputs_fit_fewer_terms():
    frame, difficulty, _ = synthetic()
    noreg = length_controlled_win_rate(frame, difficulty=difficulty, gamed=None, C=1e9)
    assert noreg["variant"] == "length_controlled_noreg"
    assert noreg["weights"] == pytest.approx({"length": -1.2, "difficulty": 0.7, "model": 0.4}, abs=1e-6)
    easy, _, _ = synthetic(b_difficulty=0.0)
    minimal = length_controlled_win_rate(easy.drop(columns="index"), difficulty=None, gamed=None, C=1e9)
    assert minimal["variant"] == "length_controlled_minimal"
    assert minimal["weights"] == pytest.approx({"length": -1.2, "model": 0.4}, abs=1e-6)
    assert minimal[LC] == pytest.approx(100 / (1 + math.exp(-0.4)), abs=1e-5)
    assert minimal["lc_standard_error"] == 0


def test_missing_preferences_count_in_the_prediction_only():
    frame, difficulty, gamed = synthetic()
    blank = frame.copy()
    blank.loc[frame.index % 4 == 0, "preference"] = math.nan
    out = length_controlled_win_rate(blank, difficulty=difficulty, gamed=gamed, C=1e9)
    # All rows predict, with the sd of all rows: the labels that are left still are the model's own probabilities.
    assert (out["n_total"], out["n_missing"]) == (600, 200)
    assert out[LC] == pytest.approx(100 * sigmoid(0.4 + 0.7 * difficulty).mean(), abs=1e-5)


def test_difficulty_belongs_to_the_instruction_unless_positions_are_asked_for():
    frame, difficulty, gamed = synthetic()
    short = frame.drop(index=range(0, 800, 7))
    options = {"gamed": gamed, "C": 1e9}
    by_index = length_controlled_win_rate(short, difficulty=difficulty, **options)
    shuffled = short.sample(frac=1, random_state=0)
    assert length_controlled_win_rate(shuffled, difficulty=difficulty, **options)[LC] == pytest.approx(by_index[LC])
    packed = short.assign(index=np.arange(len(short)))
    by_row = length_controlled_win_rate(short, difficulty=difficulty, by_position=True, **options)
    assert by_row == length_controlled_win_rate(packed, difficulty=difficulty, **options)
    assert abs(by_row[LC] - by_index[LC]) > 0.01


@pytest.mark.parametrize("penalty", length_control.PENALTIES)
def test_optimality_on_random_problems(penalty):
    rng = np.random.default_rng(3)
    for _ in range(5):
        design = rng.normal(0, 1, (300, 3)) @ rng.normal(0, 1, (3, 3))
        labels, weights = rng.uniform(0, 1, 300).round(1), rng.uniform(0.1, 1, 300)
        b = fit_l1_logistic(design, labels, weights, penalty)
        assert kkt_residual(design, labels, weights, b, penalty) < 1e-7

        def objective(c, x=design, p=labels, w=weights):
            eta = x @ c
            return w @ (np.log1p(np.exp(-np.abs(eta))) + np.maximum(eta, 0) - p * eta) + np.abs(c).sum() / penalty

        assert all(objective(b) <= objective(b + rng.normal(0, s, 3)) for s in (1e-3, 1e-2, 0.1, 1) for _ in range(20))


def test_one_coefficient_by_hand():
    # n rows of x = 1 with mean label m: n (sigma(b) - m) + sign(b) / C = 0, and b = 0 where n |1/2 - m| <= 1 / C
    x, labels, weights = np.ones((10, 1)), np.array([1.0] * 8 + [0.0] * 2), np.ones(10)
    assert fit_l1_logistic(x, labels, weights, 1.0)[0] == pytest.approx(math.log(0.7 / 0.3), abs=1e-9)
    assert fit_l1_logistic(x, labels, weights, 1 / 3.0)[0] == 0
    assert fit_l1_logistic(x, labels, weights, 1 / 2.9)[0] == pytest.approx(math.log(0.51 / 0.49), abs=1e-9)


def test_separable_and_constant_data_still_converge():
    # All wins: n (1 - sigma(b)) = 1 / C; a column without spread gets 0.
    n, penalty = 50, 1e4
    frame = pd.DataFrame({"preference": [2.0] * n, "len_model": [10] * n, "len_baseline": [30] * n})
    out = length_controlled_win_rate(frame, difficulty=None, gamed=None, C=penalty)
    assert out["weights"]["length"] == 0
    assert out["weights"]["model"] == pytest.approx(math.log(n * penalty - 1), abs=1e-6)


def test_nearly_collinear_columns_still_converge():
    rng = np.random.default_rng(17)
    for _ in range(20):
        x = rng.normal(0, 1, (100, 2)) @ [[1, 1, 0], [0, 1e-9, 1]]
        labels, weights = (x[:, 0] > 0).astype(float), np.ones(100)
        penalty = 10 ** rng.uniform(-1, 3)
        b = fit_l1_logistic(x, labels, weights, penalty)
        assert kkt_residual(x, labels, weights, b, penalty) < 1e-6


def test_exchanging_the_sides_exchanges_the_rates():
    frame, difficulty, gamed = synthetic(seed=5)
    frame["preference"] = 1 + (np.random.default_rng(5).uniform(size=len(frame)) < frame["preference"] - 1)
    other = frame.rename(columns={"len_model": "len_baseline", "len_baseline": "len_model"})
    other["preference"] = 3 - frame["preference"]
    turned = gamed.assign(preference=1 - gamed["preference"], std_delta_len=-gamed["std_delta_len"])
    for pair in ((gamed, turned), (None, None)):
        here = length_controlled_win_rate(frame, difficulty=difficulty, gamed=pair[0])
        there = length_controlled_win_rate(other, difficulty=difficulty, gamed=pair[1])
        assert here["C"] == there["C"]
        assert here[LC] + there[LC] == pytest.approx(100, abs=1e-7)
        assert here["weights"]["length"] == pytest.approx(there["weights"]["length"], abs=1e-7)


def test_cross_validation_takes_the_best_held_out_penalty():
    frame, difficulty, gamed = synthetic(n=120, seed=7)
    draw = np.random.default_rng(7).uniform(size=120)
    frame["preference"] = 1 + (draw < frame["preference"] - 1)
    t = np.tanh((frame["len_baseline"] - 5000) / (frame["len_baseline"] - 5000).std(ddof=1))
    own = np.column_stack([t, difficulty, np.ones(120)])
    anchored = np.column_stack([np.tanh(gamed["std_delta_len"]), gamed["instruction_difficulty"], np.zeros(240)])
    x, p = np.vstack([anchored, own]), np.concatenate([gamed["preference"], frame["preference"] - 1])
    w, folds = np.repeat([0.1, 1.0], [240, 120]), np.arange(360) % 5
    scores = []
    for penalty in np.logspace(-4, 4, 10):
        held = []
        for k in range(5):
            b = fit_l1_logistic(x[folds != k], p[folds != k], w[folds != k], penalty)
            q = 1 / (1 + np.exp(-x[folds == k] @ b))
            truth = p[folds == k]
            held.append(np.mean(-w[folds == k] * (truth * np.log(q) + (1 - truth) * np.log(1 - q))))
        scores.append(np.mean(held))
    out = length_controlled_win_rate(frame, difficulty=difficulty, gamed=gamed)
    assert out["C"] == np.logspace(-4, 4, 10)[int(np.argmin(scores))]
    padded = np.concatenate([folds, [math.nan] * 3])  # as a table's shorter column reads
    assert out == length_controlled_win_rate(frame, difficulty=difficulty, gamed=gamed, folds=padded)


def test_every_fold_counts_the_same_in_the_choice_whatever_its_size():
    rng = np.random.default_rng(13)
    differ = 0
    for _ in range(20):
        x, p = rng.normal(0, 1, (60, 2)), rng.integers(0, 2, 60).astype(float)
        p = np.where(rng.uniform(size=60) < 0.4, x[:, 0] > 0, p).astype(float)
        folds = rng.permutation(np.repeat([0, 1, 2], [48, 6, 6]))
        by_fold, by_row = [], []
        for penalty in length_control.PENALTIES:
            held = []
            for k in range(3):
                b = fit_l1_logistic(x[folds != k], p[folds != k], np.ones((folds != k).sum()), penalty)
                eta = x[folds == k] @ b
                held.append(np.log1p(np.exp(eta)) - p[folds == k] * eta)
            by_fold.append(np.mean([h.mean() for h in held]))
            by_row.append(np.concatenate(held).mean())
        chosen = length_control.choose_penalty(x, p, np.ones(60), folds)
        assert chosen == length_control.PENALTIES[int(np.argmin(by_fold))]
        differ += np.argmin(by_fold) != np.argmin(by_row)
    assert differ  # the two rules are told apart


def test_prediction_from_stored_weights():
    difficulty = np.array([-1.0, 0.0, 2.0])
    a, b = {"model": 0.3, "difficulty": 0.5, "length": -1.0}, {"model": -0.2, "difficulty": 0.9}
    q = sigmoid([0.3 - 0.5, 0.3, 0.3 + 1.0])
    assert length_controlled_from_weights(a, difficulty) == pytest.approx(
        {LC: 100 * q.mean(), "lc_standard_error": 100 * q.std(ddof=1) / math.sqrt(3)}
    )
    ab, ba = (length_controlled_from_weights(*s)[LC] for s in ((a, difficulty, b), (b, difficulty, a)))
    assert ab == pytest.approx(100 * sigmoid([0.5 + 0.4, 0.5, 0.5 - 0.8]).mean())
    assert ab + ba == pytest.approx(100)
    assert length_controlled_from_weights(a, difficulty, a)[LC] == 50
    with pytest.raises(BadInput, match="weights lack 'difficulty'"):
        length_controlled_from_weights({"model": 1.0}, difficulty)


def test_interval_is_near_the_binomial_one_where_length_does_not_matter():
    rng = np.random.default_rng(11)
    n = 400
    frame = pd.DataFrame({"preference": 1.0 + (rng.uniform(size=n) < 0.7), "len_baseline": 1000})
    frame["len_model"] = rng.integers(500, 1500, n)
    options = {"difficulty": None, "gamed": None, "C": 1e4}
    rate = length_controlled_win_rate(frame, **options)[LC]
    low, high = length_controlled_interval(frame, **options, resamples=400)
    half = 1.96 * 100 * math.sqrt(0.7 * 0.3 / n)
    assert low < rate < high
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)
    assert (low, high) == length_controlled_interval(frame, **options, resamples=400)
    assert (low, high) != length_controlled_interval(frame, **options, resamples=400, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": ["len_model", "index", "preference"]}, "lack the column 'len_baseline'"),
        ({"annotations": ["len_model", "len_baseline", "preference"]}, "lack the column 'index'"),
        ({"annotations": ["len_model", "len_baseline", "index"]}, "lack the column 'preference'"),
        ({"difficulty": np.zeros(5)}, r"row 5 has index 5, which has no difficulty \(5 values given\)"),
        ({"difficulty": np.full(40, math.nan)}, "row 0 has index 0"),
        ({"difficulty": None}, "gamed rows need difficulties"),
        ({"gamed": ["preference", "std_delta_len"]}, "gamed rows lack the column 'instruction_difficulty'"),
        ({"C": 0.0}, "C is 0.0"),
        ({"folds": np.zeros(7)}, "7 fold numbers for 120 training rows"),
        ({"folds": np.zeros(120)}, "at least two folds"),
    ],
)
def test_unusable_input_is_named(change, message):
    frame, difficulty, gamed = synthetic(n=40)
    arguments = {"annotations": frame, "difficulty": difficulty, "gamed": gamed} | change
    for name, table in (("annotations", frame), ("gamed", gamed)):
        if isinstance(arguments[name], list):
            arguments[name] = table[arguments[name]]
    with pytest.raises(BadInput, match=message):
        length_controlled_win_rate(arguments.pop("annotations"), **arguments)


def test_other_unusable_rows():
    frame, difficulty, gamed = synthetic(n=40)
    gamed.loc[3, "preference"] = 1.7
    with pytest.raises(BadInput, match=r"gamed row 3 is .*must be 0 to 1"):
        length_controlled_win_rate(frame, difficulty=difficulty, gamed=gamed)
    with pytest.raises(BadInput, match="4 rows are too few"):
        length_controlled_win_rate(frame.head(4), difficulty=None, gamed=None)
    frame.loc[2, "len_baseline"] = math.nan
    with pytest.raises(BadInput, match="row 2 has no output length"):
        length_controlled_win_rate(frame, difficulty=None, gamed=None)


# --- the published leaderboards -------------------------------------------------------------------------------------


@cache
def _published(folder):
    """(board, its row, the model's annotations) of every model; difficulties; gamed rows; folds."""
    models = []
    for kind in ("", "_ae1"):
        board = pd.read_csv(folder / f"leaderboard{kind}.csv", index_col=0)
        rows = pd.read_csv(folder / f"annotations{kind}.csv.gz")
        models += [(kind or "ae2", board.loc[name], part) for name, part in rows.groupby("model", sort=False)]
    difficulty = pd.read_csv(folder / "instruction_difficulty.csv")["instruction_difficulty"].to_numpy()
    return models, difficulty, pd.read_csv(folder / "df_gamed_surrogate.csv"), pd.read_csv(folder / "cv_folds.csv.gz")


@pytest.fixture
def published(shared_data):
    return _published(shared_data / "alpaca_eval")


def at_published_penalty(published, **changes):
    """LC at the published C, and the published LC, per AlpacaEval 2 model."""
    models, difficulty, gamed, _ = published
    rates = []
    for kind, board, part in models:
        if kind == "ae2":
            options = {"difficulty": difficulty, "gamed": gamed, "C": board["C_inferred"], "by_position": True}
            out = length_controlled_win_rate(
                changes.get("rows", lambda r: r)(part), **options | changes.get("with", {})
            )
            rates.append((out[LC], board["length_controlled_winrate"]))
    return np.array(rates).T


def test_published_values_at_the_published_penalty(published):
    models, difficulty, gamed, _ = published
    assert len(models) == 16
    for _, board, part in models:
        # Published figures of files with missing rows look the difficulty up by row.
        out = length_controlled_win_rate(
            part, difficulty=difficulty, gamed=gamed, C=board["C_inferred"], by_position=len(part) < 805
        )
        assert out[LC] == pytest.approx(board["exact_lc_at_C"], abs=1e-6), board.name
        assert out["lc_standard_error"] == pytest.approx(board["exact_lcse_at_C"], abs=1e-6), board.name
        exact = {"length": "exact_w_len", "difficulty": "exact_w_diff", "model": "exact_w_model"}
        assert out["weights"] == pytest.approx({k: board[v] for k, v in exact.items()}, abs=1e-7), board.name
        assert out[LC] == pytest.approx(board["length_controlled_winrate"], abs=0.03), board.name
        if not math.isnan(board["lc_standard_error"]):
            assert out["lc_standard_error"] == pytest.approx(board["lc_standard_error"], abs=1e-4), board.name
        dropped_later = {"alpaca-7b_verbose": 2}
        assert out["avg_length"] - board["avg_length"] == dropped_later.get(board.name, 0)
        for name in ("win_rate", "standard_error", "discrete_win_rate", "n_total"):
            assert out[name] == pytest.approx(board[name], abs=1e-8)


def test_published_values_with_cross_validation(published):
    models, difficulty, gamed, folds = published
    off = []
    for kind, board, part in models:
        options = {"difficulty": difficulty, "gamed": gamed, "by_position": len(part) < 805}
        given = length_controlled_win_rate(part, **options, folds=folds[f"n{1610 + part['preference'].count()}"])
        assert given[LC] == pytest.approx(board["exact_lc_cv_published_folds"], abs=1e-6), board.name
        own = length_controlled_win_rate(part, **options)
        assert own[LC] == pytest.approx(board["exact_lc_cv_mod5_folds"], abs=1e-6), board.name
        if kind == "ae2":
            off.append([abs(out[LC] - board["length_controlled_winrate"]) for out in (given, own)])
        else:
            assert given[LC] == pytest.approx(board["length_controlled_winrate"], abs=0.05), board.name
    assert np.max(off) <= 0.2
    assert (np.median(off, axis=0) <= 0.01).all()


def test_published_weights_predict_the_published_rates(published, shared_data):
    _, difficulty, _, _ = published
    stored = pd.read_csv(shared_data / "alpaca_eval" / "glm_weights.csv")
    assert len(stored) == 154
    for row in stored.itertuples():
        out = length_controlled_from_weights({"model": row.w_model, "difficulty": row.w_diff}, difficulty[: row.n_rows])
        assert out[LC] == pytest.approx(row.length_controlled_winrate, abs=1e-6), row.model
        if not math.isnan(row.lc_standard_error):
            assert out["lc_standard_error"] == pytest.approx(row.lc_standard_error, abs=1e-6), row.model


def wrong_sign(rows):
    return rows.rename(columns={"len_model": "len_baseline", "len_baseline": "len_model"})


def test_known_mistakes_are_outside_the_tolerance(published, monkeypatch):
    """Each mistake of a wrong implementation moves the median model by more than the 0.03 that a right one may."""
    _, difficulty, gamed, _ = published
    ours, board = at_published_penalty(published)
    assert np.abs(ours - board).max() < 0.03
    no_difficulty = {"difficulty": 0 * difficulty, "gamed": gamed.assign(instruction_difficulty=0.0)}
    mistakes = {
        "wrong sign of the length difference": {"rows": wrong_sign},
        "no gamed rows": {"with": {"gamed": None}},
        "no difficulty": {"with": no_difficulty},
        "difficulty of other instructions": {"with": {"difficulty": np.roll(difficulty, 1)}},
    }
    for name, changes in mistakes.items():
        wrong, _ = at_published_penalty(published, **changes)
        assert np.median(np.abs(wrong - board)) > 0.03, name
    no_penalty, _ = at_published_penalty(published, **{"with": {"C": 1e12}})
    assert np.abs(no_penalty - board).max() > 0.03
    monkeypatch.setattr(length_control, "GAMED_WEIGHT", 0.2)
    assert np.median(np.abs(at_published_penalty(published)[0] - board)) > 0.03
    monkeypatch.undo()
    terms = {
        "centred": lambda d: np.tanh((d - d.mean()) / d.std(ddof=1)),
        "no tanh": lambda d: d / d.std(ddof=1),
    }
    for name, term in terms.items():
        monkeypatch.setattr(length_control, "length_term", term)
        assert np.median(np.abs(at_published_penalty(published)[0] - board)) > 0.03, name
    monkeypatch.setattr(length_control, "length_term", lambda d: np.tanh(d / d.std()))
    assert np.abs(at_published_penalty(published)[0] - ours).max() > 1e-4

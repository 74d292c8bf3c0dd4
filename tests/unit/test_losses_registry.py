"""The registry of losses: names, parameters, and what it does not import."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from prefopt.errors import BadInput
from prefopt.losses import LOSSES, get_loss, get_regulariser, loss


def test_importing_the_registry_does_not_import_torch():
    code = (
        "import sys; from prefopt.losses import LOSSES, REGULARISERS, COMPOSITIONS, get_loss;"
        "get_loss('dpo').check_params({'beta': 0.1});"
        "sys.exit(bool({'torch', 'pandas', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("dpo", {"bta": 0.1}, "loss 'dpo': unknown parameter 'bta'; did you mean 'beta'?"),
        ("ipo", {"tau": 0.1}, "loss 'ipo': unknown parameter 'tau'; did you mean 'beta'?"),
        ("dpo", {}, "missing parameter 'beta'"),
        ("dpo", {"beta": "0.1"}, "'beta' is '0.1' (str); expected a number"),
        ("dpo", {"beta": True}, "'beta' is True (bool); expected a number"),
        ("dpo", {"beta": None}, "'beta' is None (NoneType); expected a number"),
        ("dpo", {"beta": [0.1]}, "expected a number"),
        ("dpo", {"beta": math.nan}, "expected a finite number"),
        ("dpo", {"beta": math.inf}, "expected a finite number"),
        ("dpo", {"beta": 0}, "'beta' is 0; expected a number above 0"),
        ("robust_dpo", {"beta": 0.1, "label_smoothing": 0.5}, "expected a number at least 0 and below 0.5"),
        ("mallows_phi", {"beta": 0.1, "smoothing": 0.0}, "'smoothing' is 0.0; expected a number above 0"),
    ],
)
def test_bad_parameters_are_named(name, params, message):
    with pytest.raises(BadInput) as caught:
        LOSSES[name].check_params(params)
    assert message in str(caught.value)


def test_good_parameters_pass():
    LOSSES["dpo"].check_params({"beta": 1})
    LOSSES["kto"].check_params({"beta": 0.1, "reference_kl": None})
    LOSSES["robust_dpo"].check_params({"beta": 0.1, "label_smoothing": 0.0})


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(BadInput, match="did you mean 'mallows_theta'"):
        get_loss("malows_theta")
    with pytest.raises(BadInput, match="its loss is 'distill_ensemble'"):
        get_loss("e_dpo")
    with pytest.raises(BadInput, match="did you mean 'forward_kl'"):
        get_regulariser("forward_lk")
    assert get_loss("dpo") is LOSSES["dpo"]
    assert get_regulariser("forward_kl").needs == {"reference_samples"}


def test_a_name_is_registered_once_and_with_known_needs():
    with pytest.raises(ValueError, match="name taken"):
        loss("dpo", paper="x", equation="y")(lambda batch, *, beta: batch)
    with pytest.raises(ValueError, match="unknown needs"):
        loss("new", needs={"luck"}, paper="x", equation="y")(lambda batch, *, beta: batch)
    assert "new" not in LOSSES

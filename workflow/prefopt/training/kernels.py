"""Kernels of other packages for training on a GPU, used where they are installed."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def use_liger(model: PreTrainedModel) -> bool:
    """Let Liger compute norms, rotary positions and gated layers of a model on a GPU; whether it does.

    Never on a CPU, where its kernels do not run. Head and loss stay ours. Where this was written there was no GPU: the
    call is tested with a stand-in, not Liger itself.
    """
    if model.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    kind = model.config.get_text_config().model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        _log.info("liger_kernel is installed, but has no kernels for %s", kind)
        return False
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    _log.info("norms, rotary positions and gated layers by liger_kernel")
    return True

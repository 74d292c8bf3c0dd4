"""The closed, typed declarations: what a paper item may say, and nothing else.

Unknown keys and wrong types are errors. These models generate ``workflow/schemas/*.json`` for editors. Nothing here
imports torch: the Snakefile parses through this package.
"""

from prefopt.specs.base import Closed, Count, Fraction, Name, Named, Positive, Seed, unique_seeds
from prefopt.specs.config import Config, ExecutionSpec
from prefopt.specs.data import DataSpec, FilesSource, HubSource, ReaderName, SplitSpec, WorldSource
from prefopt.specs.exact import ExactClaim, ExactHead, ExactItemSpec, NumberClaim, OrderClaim, StudySpec
from prefopt.specs.items import EvaluateSpec, ExpectSpec, ItemHead, ItemSpec
from prefopt.specs.models import HubModel, LocalModel, ModelSpec, ScratchModel, TokenizerSpec, TokensSpec
from prefopt.specs.training import (
    ArmSpec,
    DispersionSpec,
    EnsembleSpec,
    ForwardKlSpec,
    LossSpec,
    RegulariserSpec,
    SamplingSpec,
    SftSpec,
    TrainSpec,
)

__all__ = [
    "ArmSpec",
    "Closed",
    "Config",
    "Count",
    "DataSpec",
    "DispersionSpec",
    "EnsembleSpec",
    "EvaluateSpec",
    "ExactClaim",
    "ExactHead",
    "ExactItemSpec",
    "ExecutionSpec",
    "ExpectSpec",
    "FilesSource",
    "ForwardKlSpec",
    "Fraction",
    "HubModel",
    "HubSource",
    "ItemHead",
    "ItemSpec",
    "LocalModel",
    "LossSpec",
    "ModelSpec",
    "Name",
    "Named",
    "NumberClaim",
    "OrderClaim",
    "Positive",
    "ReaderName",
    "RegulariserSpec",
    "SamplingSpec",
    "ScratchModel",
    "Seed",
    "SftSpec",
    "SplitSpec",
    "StudySpec",
    "TokenizerSpec",
    "TokensSpec",
    "TrainSpec",
    "WorldSource",
    "unique_seeds",
]

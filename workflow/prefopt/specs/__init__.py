"""The closed, typed declarations: what a paper item may say, and nothing else.

Unknown keys and wrong types are errors. These models generate ``workflow/schemas/*.json`` for editors. Nothing here
imports torch: the Snakefile parses through this package.
"""

from prefopt.specs.base import Closed, Count, Fraction, Name, Named, Positive, Seed, unique_seeds
from prefopt.specs.config import Config, ExecutionSpec
from prefopt.specs.data import DataSpec, FilesSource, HubSource, ReaderName, SplitSpec, WorldSource
from prefopt.specs.exact import ExactClaim, ExactHead, ExactItemSpec, NumberClaim, OrderClaim, StudySpec
from prefopt.specs.grids import (
    ClassifierJudgeSpec,
    CompareClaim,
    ConditionSpec,
    EvaluationSet,
    FrontierClaim,
    GridArmSpec,
    GridClaim,
    GridEvaluateSpec,
    GridItemSpec,
    QuickSpec,
    ReferenceSpec,
    RewardJudgeSpec,
    SelectSpec,
    TrendClaim,
    WeightsClaim,
)
from prefopt.specs.items import EvaluateSpec, ExpectSpec, ItemHead, ItemSpec
from prefopt.specs.judges import JudgeSpec, LmJudgeSpec, PricesSpec, ServerJudgeSpec
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
    "ClassifierJudgeSpec",
    "Closed",
    "CompareClaim",
    "ConditionSpec",
    "Config",
    "Count",
    "DataSpec",
    "DispersionSpec",
    "EnsembleSpec",
    "EvaluateSpec",
    "EvaluationSet",
    "ExactClaim",
    "ExactHead",
    "ExactItemSpec",
    "ExecutionSpec",
    "ExpectSpec",
    "FilesSource",
    "ForwardKlSpec",
    "Fraction",
    "FrontierClaim",
    "GridArmSpec",
    "GridClaim",
    "GridEvaluateSpec",
    "GridItemSpec",
    "HubModel",
    "HubSource",
    "ItemHead",
    "ItemSpec",
    "JudgeSpec",
    "LmJudgeSpec",
    "LocalModel",
    "LossSpec",
    "ModelSpec",
    "Name",
    "Named",
    "NumberClaim",
    "OrderClaim",
    "Positive",
    "PricesSpec",
    "QuickSpec",
    "ReaderName",
    "ReferenceSpec",
    "RegulariserSpec",
    "RewardJudgeSpec",
    "SamplingSpec",
    "ScratchModel",
    "Seed",
    "SelectSpec",
    "ServerJudgeSpec",
    "SftSpec",
    "SplitSpec",
    "StudySpec",
    "TokenizerSpec",
    "TokensSpec",
    "TrainSpec",
    "TrendClaim",
    "WeightsClaim",
    "WorldSource",
    "unique_seeds",
]

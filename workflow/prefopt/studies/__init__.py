"""Exact studies by name: mathematics of the papers computed on small tables, without a language model.

Every module beside this one is a home of studies; a new one is found by itself. Importing them must stay cheap:
numpy, scipy, torch, pandas and matplotlib come through ``prefopt.lazy`` or inside functions.
"""

import importlib
import pkgutil

from prefopt.studies.registry import STUDIES, Study, StudyResult, get_study, study

__all__ = ["STUDIES", "Study", "StudyResult", "get_study", "study"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

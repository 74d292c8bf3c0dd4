"""What is told of finished items: pages, small results for git, metrics for DVC, records for MLflow, traces of numbers.

May import ``evaluation`` and ``store``. Only the command line, the stages, ``prefopt.report`` and ``prefopt.tracking``
import this; figures that studies draw as well are in ``prefopt.figures``.
"""

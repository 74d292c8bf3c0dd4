"""Procedures by name: what an arm's ``rounds`` become, as a chain of ordinary artifacts. No torch, as all planning."""

from prefopt.procedures import accelerated, annotator_types, online
from prefopt.procedures.chain import Chain
from prefopt.procedures.registry import PROCEDURES, Procedure, plan_rounds, procedure

__all__ = ["PROCEDURES", "Chain", "Procedure", "accelerated", "annotator_types", "online", "plan_rounds", "procedure"]

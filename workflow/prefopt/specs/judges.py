"""Declarations of pairwise judges: language models that are shown two answers and name the better one."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from prefopt.specs.base import Closed, Count, Fraction, Positive
from prefopt.specs.models import NamedModel

Label = Annotated[str, Field(pattern=r"^[^\s\"\\]+$")]


class _PairwiseJudge(Closed):
    """What is asked, and how many answers may be unusable."""

    template: Literal["ranking", "one_turn"] = Field(
        "ranking", description="one_turn: the same without a system turn, which some chat formats refuse"
    )
    labels: list[Label] = Field(
        ["m", "M"], min_length=2, max_length=2, description="names of the answers; one token each for the judge"
    )
    max_unparsable: Fraction = Field(0.0, description="share of judgements without a usable answer that is let pass")
    labelled_pairs: Annotated[int, Field(ge=0)] = Field(
        0,
        description="held-out pairs that are judged too: how often the judge agrees with their labels",
        exclude_if=lambda count: count == 0,
    )

    @field_validator("labels")
    @classmethod
    def _two_names(cls, labels: list[str]) -> list[str]:
        if labels[0] == labels[1]:
            raise ValueError(f"both labels are '{labels[0]}'; the answers need different names")
        return labels


class LmJudgeSpec(_PairwiseJudge):
    """A causal language model on this machine, read by its next-token probabilities."""

    kind: Literal["lm"]
    model: NamedModel = Field(description="a name in models.yaml, or a declaration; local or hub")
    precision: Literal["fp32", "bf16"] = "fp32"


class PricesSpec(Closed):
    """What a million tokens cost, in the currency that the server charges in."""

    input: Annotated[float, Field(ge=0.0)]
    output: Annotated[float, Field(ge=0.0)]


class ServerJudgeSpec(_PairwiseJudge):
    """Any OpenAI-compatible server, asked at temperature 0.

    Where it is and how it is asked are settings of this machine; results depend on ``model_name`` and what is asked.
    """

    kind: Literal["server"]
    base_url: str = Field(description="up to and with the version, such as http://127.0.0.1:8000/v1")
    model_name: str = Field(min_length=1, description="as the server calls it")
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = 5
    answer_tokens: Count = Field(1, description="more than one only for servers without log-probabilities")
    concurrency: Count = 8
    timeout_seconds: Positive = 60.0
    retries: Annotated[int, Field(ge=0)] = 6
    prices: PricesSpec | None = None

    @field_validator("base_url")
    @classmethod
    def _no_secret_in_it(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as https://host/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("an address with a user, password or query may hold a secret; use 'api_key_env'")
        return base_url

    @field_validator("api_key_env")
    @classmethod
    def _a_name_and_no_key(cls, api_key_env: str | None) -> str | None:
        """A key in the place of its variable's name would stand in every spec and manifest; it is not repeated."""
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", api_key_env):
            raise ValueError(
                "the name of an environment variable is expected, in capitals such as JUDGE_API_KEY; the key itself "
                "belongs into that variable"
            )
        return api_key_env


JudgeSpec = Annotated[LmJudgeSpec | ServerJudgeSpec, Field(discriminator="kind")]

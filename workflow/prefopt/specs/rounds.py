"""Declarations of procedures: arms whose policy comes out of several rounds of training, sampling and labelling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prefopt.specs.base import Closed, Count, Name

Choose = Literal["extremes", "pareto", "random"]
_CHOOSE = (
    "the responses of highest and lowest mean reward; as CaPO, one that no other beats by every member and one that "
    "beats no other by every member; or any two"
)


class ResponsesSpec(Closed):
    """Pairs of a round's own: responses that the current policy draws to the train prompts, labelled anew.

    They are drawn as the item's ``samples`` say, with seeds of their own.
    """

    labels: Name = Field(description="one of the item's reward ensembles: the mean of its members chooses")
    per_prompt: Annotated[int, Field(ge=2)] = Field(2, description="responses to every train prompt")
    prompts: Count | None = Field(None, description="train prompts of a round, drawn anew in each; default all")
    choose: Choose = Field("extremes", description=_CHOOSE)


class AcceleratedRounds(Closed):
    """Rounds with momentum: each fits a policy to pairs and extrapolates what it fitted."""

    kind: Literal["accelerated"]
    count: Count = Field(3, description="rounds")
    momentum: Annotated[float, Field(ge=0.0)] = Field(0.3, description="alpha; 0 is plain iteration")
    against: Literal["previous_fit", "start"] = Field(
        "previous_fit", description="what a fit is extrapolated away from: the previous round's, or what it started at"
    )
    responses: ResponsesSpec | None = Field(None, description="fresh pairs in every round; default the arm's own data")


class OnlineRounds(Closed):
    """Rounds on the current policy's own responses, labelled by the same reward models in all of them."""

    kind: Literal["online"]
    count: Count = Field(3, description="rounds")
    responses: ResponsesSpec
    reference: Literal["current", "initial"] = Field(
        "current", description="what a round's loss compares with: where the round starts, or the first reference"
    )


class DiscriminatorRounds(Closed):
    """Rounds on the current policy's own responses, labelled by reward models that learn from new gold labels."""

    kind: Literal["discriminator"]
    count: Count = Field(3, description="rounds")
    discriminator: Name = Field(description="one of the item's reward ensembles, trained anew in every round")
    gold: Name = Field(description="another one, or the oracle: who gives gold labels")
    gold_labels: Count = Field(16, description="prompts of a round whose pair gets a gold label as well")
    prompts: Count | None = Field(256, description="prompts of a round whose pair the discriminator labels; null: all")
    per_prompt: Annotated[int, Field(ge=2)] = Field(2, description="responses to every prompt")
    reference: Literal["current", "initial"] = Field(
        "initial", description="what a round's loss compares with: where the round starts, or the first reference"
    )


class EmRounds(Closed):
    """Expectation and maximisation over unseen types of annotators, one policy for each, and a mixture for all."""

    kind: Literal["em"]
    count: Count = Field(3, description="rounds: responsibilities, a policy for every type, their mixture")
    types: Annotated[int, Field(ge=2)] = Field(2, description="K; not known beforehand")
    prompts: Count | None = Field(None, description="train prompts that tell what a policy is worth; default all")
    mixture: Literal["min_max_regret", "prior"] = Field(
        "min_max_regret", description="weights that minimise the largest regret of a type, or the types' shares"
    )


RoundsSpec = Annotated[AcceleratedRounds | OnlineRounds | DiscriminatorRounds | EmRounds, Field(discriminator="kind")]

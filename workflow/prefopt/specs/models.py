"""Declarations of starting models, tokenizers and tokenising."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from prefopt.specs.base import Closed, Count, Seed


class TokenizerSpec(Closed):
    """A tokenizer trained on the chosen responses and prompts of the train split."""

    kind: Literal["words", "bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=64)] = 2048


class ScratchModel(Closed):
    """A small Llama with random weights, its tokenizer trained on the pairs."""

    kind: Literal["scratch"]
    layers: Count = 2
    hidden: Count = 64
    heads: Count = 4
    intermediate: Count = 192
    max_positions: Count = 96
    tokenizer: TokenizerSpec = TokenizerSpec()
    seed: Seed = 0


class LocalModel(Closed):
    """A Hugging Face model folder with a tokenizer on this machine."""

    kind: Literal["local"]
    path: str = Field(description="relative to data_root of config.yaml, or absolute")
    trust_remote_code: bool = False


class HubModel(Closed):
    """A model on the Hugging Face hub, at a pinned revision."""

    kind: Literal["hub"]
    repo: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$", description="full commit hash")
    trust_remote_code: bool = False


ModelSpec = Annotated[ScratchModel | LocalModel | HubModel, Field(discriminator="kind")]
# Names are replaced by what they stand for (``config.load_item``) before anything else sees a declaration.
if TYPE_CHECKING:
    NamedModel = ScratchModel | LocalModel | HubModel
else:
    NamedModel = str | ModelSpec


class TokensSpec(Closed):
    """How texts become token ids."""

    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="auto: the tokenizer's chat template if it has one"
    )
    max_prompt_tokens: Count = 48
    max_length: Count = 64
    overlong: Literal["error", "refuse", "truncate_left"] = Field(
        "error",
        description="prompts over max_prompt_tokens: stop, refuse the pair and count it, or keep the prompt's end",
    )

    @model_validator(mode="after")
    def _room_for_a_response(self) -> TokensSpec:
        if self.max_prompt_tokens >= self.max_length:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) leaves no room in max_length ({self.max_length})"
            )
        return self

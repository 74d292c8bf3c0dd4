"""Tokenizers trained here, and whether two tokenizers mean the same by their ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from prefopt.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], kind: Literal["words", "bpe"], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for small models, at most ``vocab_size`` tokens, equal for equal texts.

    ``words``: one token per white-space separated word, the most frequent first, others are <unk>; ``bpe``: byte-level
    byte pairs, which represent any text. Raises BadInput where bytes and special tokens do not fit in vocab_size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS)
    if kind == "words":
        backend = Tokenizer(models.WordLevel(unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + len(special):
            raise BadInput(
                f"vocab_size {vocab_size} is too small for bpe: {len(alphabet)} bytes and {len(special)} special "
                f"tokens need {len(alphabet) + len(special)}; raise it, or use kind: words"
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def check_same_vocabulary(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> None:
    """Raises BadInput unless both tokenizers give every token the same id."""
    ours, theirs = policy.get_vocab(), reference.get_vocab()
    if ours == theirs:
        return
    names = [{number: token for token, number in vocabulary.items()} for vocabulary in (ours, theirs)]
    first = min(number for number in {*names[0], *names[1]} if names[0].get(number) != names[1].get(number))
    raise BadInput(
        f"policy and reference tokenizers differ: {len(ours)} and {len(theirs)} tokens, first at id {first} "
        f"({names[0].get(first)!r} and {names[1].get(first)!r}); use a reference with the policy's tokenizer"
    )

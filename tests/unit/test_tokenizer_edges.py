"""What tokenizers of published models do: no BOS, pad = EOS, added tokens, padded vocabularies, templates with BOS."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny
from artifact_builds import run_stage, save_table
from prefopt.errors import BadInput
from prefopt.generation import end_token_ids, generate
from prefopt.inputs.rendering import render_prompt, response_ids, response_text
from prefopt.models import load_causal_lm, load_tokenizer, save_model
from prefopt.scoring import response_scores
from prefopt.specs import SamplingSpec, TokensSpec
from prefopt.stages.tables import token_rows
from prefopt.tokens import tokenize_pairs

# Templates in the manner of published models, in their essentials.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|sep|> {{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
MARKS = ("<|start|>", "<|sep|>", "<|eot|>")
WORDS = ("user", "assistant", "what", "is", "it", "yes", "no", "maybe", "Human:", "Assistant:")
ASKED = [{"role": "user", "content": "what is it"}]


def tokenizer(template=None, *, bos="<s>", eos="</s>", pad="<pad>", adds_bos=False):
    """Words with their ids from 0: special tokens first, as many as are given."""
    special = list(dict.fromkeys(token for token in (pad, bos, eos, "<unk>", *MARKS) if token))
    vocabulary = {word: at for at, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        inner.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=list(MARKS),
        **{key: token for key, token in named.items() if token},
    )
    made.chat_template = template
    return made


def texts(made, ids):
    return made.convert_ids_to_tokens(list(ids))


def pairs():
    row = {"pair_id": 7, "prompt_id": 1, "split": "train", "source": "here", "source_row": 0}
    return pd.DataFrame([row | {"prompt": ASKED, "chosen": "yes maybe", "rejected": "no"}])


def model_of(made, vocabulary=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary or len(made), **sizes, **ends)).eval()


@pytest.mark.parametrize("template", [None, LLAMA3, CHATML, ZEPHYR], ids=["plain", "llama3", "chatml", "zephyr"])
@pytest.mark.parametrize(("bos", "adds_bos"), [("<s>", False), ("<s>", True), (None, False)])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None], ids=["pad", "pad is eos", "no pad"])
def test_one_bos_where_there_is_one_and_one_end_whatever_the_tokenizer_is_like(template, bos, pad, adds_bos):
    made = tokenizer(template, bos=bos, pad=pad, adds_bos=adds_bos)
    spec = TokensSpec(max_prompt_tokens=20, max_length=30)
    table, refused = tokenize_pairs(pairs(), made, spec)
    assert refused.empty
    (row,) = table.to_dict("records")
    end = "<|eot|>" if template in (LLAMA3, CHATML) else "</s>"
    starts_with_bos = bos is not None and template in (None, LLAMA3)
    prompt = texts(made, row["prompt_ids"])
    assert prompt.count("<s>") == int(starts_with_bos)
    assert (prompt[0] == "<s>") is starts_with_bos
    assert "<pad>" not in prompt
    for side, words in (("chosen", ["yes", "maybe"]), ("rejected", ["no"])):
        assert texts(made, row[f"{side}_ids"]) == [*words, end]
        assert response_text(made, row[f"{side}_ids"]) == " ".join(words)
    assert row["prompt_ids"].tolist() == render_prompt(made, ASKED, "auto")
    assert row["chosen_ids"].tolist() == response_ids(made, "yes maybe", "auto")


def test_the_rendered_prompts_word_by_word():
    start = ["<|start|>", "user"]
    asked = ["what", "is", "it"]
    turn = ["<|start|>", "assistant"]
    found = {
        template: texts(made, render_prompt(made, ASKED, "chat"))
        for template, made in ((t, tokenizer(t)) for t in (LLAMA3, CHATML, ZEPHYR))
    }
    assert found[LLAMA3] == ["<s>", *start, "<|sep|>", *asked, "<|eot|>", *turn, "<|sep|>"]
    assert found[CHATML] == [*start, *asked, "<|eot|>", *turn]
    assert found[ZEPHYR] == ["user", *asked, "</s>", "assistant"]


def test_a_template_that_writes_bos_twice_is_refused():
    made = tokenizer("{{ bos_token }}" + LLAMA3)
    with pytest.raises(BadInput, match="the chat template writes <s> more than once"):
        render_prompt(made, ASKED, "chat")


def test_padding_that_is_the_end_token_has_no_say_in_scores_and_answers():
    made = tokenizer(CHATML, pad="</s>")
    model = model_of(made)
    prompts = [render_prompt(made, ASKED, "chat"), [6, 7]]
    responses = [response_ids(made, "yes maybe no", "chat"), [9, made.eos_token_id]]
    together = response_scores(model, prompts, responses)
    alone = [response_scores(model, [p], [r]).logp[0] for p, r in zip(prompts, responses, strict=True)]
    assert together.tokens.tolist() == [4, 2]  # the end token counts, padding does not
    torch.testing.assert_close(together.logp, torch.stack(alone), rtol=0, atol=1e-5)
    assert set(end_token_ids(model, made)) == {made.eos_token_id, made.convert_tokens_to_ids("<|eot|>")}
    sampling = SamplingSpec(max_new_tokens=6, temperature=0.0)
    answers = generate(model, made, prompts, sampling, progress=False).response_ids
    assert answers == [generate(model, made, [p], sampling, progress=False).response_ids[0] for p in prompts]


def test_a_vocabulary_padded_beyond_the_tokenizer_is_scored_over_all_its_rows_and_decodes(tmp_path):
    made = tokenizer(LLAMA3)
    model = model_of(made, vocabulary=len(made) + 13)  # as Qwen's and Pythia's embeddings are
    save_model(model, made, tmp_path)
    model, made = load_causal_lm(tmp_path, device="cpu"), load_tokenizer(tmp_path)
    prompt, response = render_prompt(made, ASKED, "chat"), response_ids(made, "yes", "chat")
    logp = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    assert logp.shape[1] == len(made) + 13
    want = sum(logp[len(prompt) - 1 + at, token] for at, token in enumerate(response))
    torch.testing.assert_close(response_scores(model, [prompt], [response]).logp[0], want, rtol=0, atol=1e-4)
    with torch.no_grad():
        model.lm_head.weight[len(made) + 3] = 100 * model.lm_head.weight.abs().sum(0)
    drawn = generate(model, made, [prompt] * 20, SamplingSpec(max_new_tokens=4, temperature=1.0), progress=False)
    assert all(isinstance(response_text(made, ids), str) for ids in drawn.response_ids)


@pytest.mark.parametrize(("said", "refused"), [("yes maybe", False), ("yes brandnew", True)])
def test_tokens_beyond_the_embedding_are_refused_where_a_text_has_them(tmp_path, said, refused):
    made = tokenizer(LLAMA3)
    size = len(made)
    made.add_tokens(["brandnew"])  # as a pad token that was added and never trained
    save_model(model_of(made, vocabulary=size), made, tmp_path / "base" / "weights")
    save_table(tmp_path, "pairs", "pairs", pairs().assign(chosen=said))
    run = partial(run_stage, tmp_path, "tokenize", TokensSpec().model_dump(), ["pairs", "base"])
    if not refused:
        assert len(token_rows(run().work)) == 1
        return
    with pytest.raises(BadInput, match=f"token 'brandnew' has the id {size}, and the model has embeddings for {size}"):
        run()


def test_prompts_beyond_the_embedding_are_refused_before_anything_is_drawn():
    made = tokenizer(LLAMA3)
    with pytest.raises(
        BadInput, match=f"the token id {len(made)}, and the model has embeddings for {len(made)} tokens"
    ):
        generate(model_of(made), made, [[1, len(made)]], SamplingSpec(max_new_tokens=2), progress=False)


def test_a_tokenizer_without_an_end_is_refused():
    made = tokenizer(None, eos=None)
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        response_ids(made, "yes", "plain")
    assert tiny.tokenizer().eos_token_id == tiny.EOS

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from prefopt.engine.reward_models import load_reward_model, new_reward_model
from prefopt.errors import BadInput
from prefopt.models import load_causal_lm, load_tokenizer, new_causal_lm, pick_device, save_model

IDS = torch.tensor([[1, 5, 9, 7]])


@pytest.fixture
def folder(tmp_path):
    save_model(tiny.causal_lm(), tiny.tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_new_model_is_a_function_of_its_spec_and_leaves_the_global_random_state_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = tiny.causal_lm(0), tiny.causal_lm(0), tiny.causal_lm(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_new_model_has_tied_embeddings_one_row_per_token_and_the_tokenizers_special_ids():
    model = tiny.causal_lm()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (len(tiny.tokenizer()), 32)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    embeddings, layer = tiny.WORDS * 32, 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert sum(p.numel() for p in model.parameters()) == embeddings + 2 * layer + 32


def test_impossible_sizes_and_endless_tokenizers_are_refused():
    with pytest.raises(BadInput, match="hidden 32 over 3 heads"):
        new_causal_lm(tiny.scratch().model_copy(update={"heads": 3}), tiny.tokenizer())
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        new_causal_lm(tiny.scratch(), endless)


def test_a_saved_model_comes_back_bit_by_bit_with_gradients_on(folder):
    loaded = load_causal_lm(folder, device="cpu")
    assert torch.equal(loaded(IDS).logits, tiny.causal_lm()(IDS).logits)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert load_tokenizer(folder)("w3 w4").input_ids == tiny.tokenizer()("w3 w4").input_ids


def test_half_precision_weights_become_fp32_masters(tmp_path):
    save_model(tiny.causal_lm().to(torch.bfloat16), tiny.tokenizer(), tmp_path)
    assert {p.dtype for p in load_causal_lm(tmp_path, device="cpu").parameters()} == {torch.float32}


def test_dropout_is_off_everywhere(tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    save_model(GPT2LMHeadModel(config), tiny.tokenizer(), tmp_path)
    model = load_causal_lm(tmp_path, device="cpu")
    assert (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) == (0.0, 0.0, 0.0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    model.train()  # even so
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_reward_model_is_the_body_under_a_head_from_its_seed(folder):
    causal = load_causal_lm(folder, device="cpu")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (new_reward_model(folder, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.base_model(IDS)[0], causal.base_model(IDS)[0])
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    heads = torch.cat([new_reward_model(folder, seed).score.weight for seed in range(40)])
    assert heads.std().item() == pytest.approx((32 + 1) ** -0.5, rel=0.05)  # 1280 draws


def test_saved_reward_models_load_and_language_models_do_not_pass_for_one(folder, tmp_path):
    reward = new_reward_model(folder, seed=0)
    save_model(reward, tiny.tokenizer(), tmp_path / "reward")
    loaded = load_reward_model(tmp_path / "reward", device="cpu")
    assert torch.equal(loaded.score.weight, reward.score.weight)
    with pytest.raises(BadInput, match=r"no weights for score\.weight; this is no reward model"):
        load_reward_model(folder, device="cpu")


def test_what_is_missing_in_a_folder_is_named_with_a_way_out(folder):
    with pytest.raises(BadInput, match="nowhere: no such folder; give the path"):
        load_causal_lm(folder.parent / "nowhere", device="cpu")
    (folder / "tokenizer.json").rename(folder / "kept")
    for load in (lambda: load_tokenizer(folder), lambda: load_causal_lm(folder, device="cpu")):
        with pytest.raises(BadInput, match=r"model: no tokenizer in it; save one there with tokenizer\.save_pre"):
            load()
    (folder / "kept").rename(folder / "tokenizer.json")
    (folder / "config.json").rename(folder / "kept")
    with pytest.raises(BadInput, match=r"model: no config\.json"):
        load_causal_lm(folder, device="cpu")
    (folder / "kept").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="model: no weights; save the model as safetensors"):
        load_causal_lm(folder, device="cpu")


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny.causal_lm().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"only pickled weights \(pytorch_model\.bin\), which can run code"):
        load_causal_lm(folder, device="cpu")


def test_broken_files_and_lacking_weights_are_bad_input(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="the model cannot be loaded"):
        load_causal_lm(folder, device="cpu")
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BadInput, match=r"no weights for model\.layers\.2\..*not a whole"):
        load_causal_lm(folder, device="cpu")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="the tokenizer cannot be read"):
        load_tokenizer(folder)


def test_devices():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(BadInput, match="device 'gpu'; known: auto, cpu, cuda"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="no usable GPU"):
            pick_device("cuda")

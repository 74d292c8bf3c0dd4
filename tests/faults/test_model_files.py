"""Files that would run code when they are read: pickles and Python files of models, adapters, checkpoints."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
import torch

import tiny
from prefopt.engine.adapters import ADAPTER_CONFIG, add_adapter, merge_adapter, save_adapter
from prefopt.engine.reward_models import load_reward_model, new_reward_model
from prefopt.errors import BadInput
from prefopt.inputs.sources import model_identity
from prefopt.models import load_causal_lm, load_tokenizer, save_model
from prefopt.specs import AdapterSpec, LocalModel
from prefopt.training.checkpoints import load_checkpoint, save_checkpoint
from small_project import ROOT, item

PICKLES = ("pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "model.pkl")


class Harm:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tiny.causal_lm(), tiny.tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_pickles_of_these_tests_run_when_they_are_read(tmp_path, mark):
    torch.save(Harm(mark), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert mark.exists()


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICKLES)
def test_a_folder_of_pickled_weights_is_refused_unread(folder, mark, name):
    (folder / "model.safetensors").unlink()
    torch.save(Harm(mark), folder / name)
    says = rf"only pickled weights \({name}\), which can run code when read; save the model as safetensors"
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(BadInput, match=says):
            load(folder, device="cpu")
    with pytest.raises(BadInput, match=says):
        new_reward_model(folder, 0)
    assert not mark.exists()


def test_planning_refuses_pickled_weights_in_one_line(project, folder, mark):
    (folder / "model.safetensors").rename(folder / "kept")
    torch.save(Harm(mark), folder / "pytorch_model.bin")
    project.declare(item(model={"kind": "local", "path": str(folder)}))
    run = project.prefopt("plan")
    assert run.returncode == 2
    assert "own/tiny.yaml: " in run.stderr
    assert "only pickled weights (pytorch_model.bin)" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    (folder / "kept").rename(folder / "model.safetensors")
    assert project.prefopt("plan").returncode == 0
    assert not mark.exists()


def test_pickles_beside_safetensors_are_not_read(folder, mark):
    for name in PICKLES:
        torch.save(Harm(mark), folder / name)
    load_causal_lm(folder, device="cpu")
    edit(folder / "config.json", transformers_weights="pytorch_model.bin")
    with pytest.raises(BadInput, match="the model cannot be loaded"):
        load_causal_lm(folder, device="cpu")
    assert not mark.exists()


def test_a_pickle_called_safetensors_is_none(folder, mark):
    torch.save(Harm(mark), folder / "model.safetensors")
    with pytest.raises(BadInput, match="the model cannot be loaded"):
        load_causal_lm(folder, device="cpu")
    assert not mark.exists()


def test_an_adapter_beside_a_model_does_not_lead_elsewhere(folder, tmp_path):
    """The library would take the weights from the folder, or the repository, that the adapter names."""
    other = tmp_path / "other"
    adapted = tiny.causal_lm(seed=1)
    save_model(adapted, tiny.tokenizer(), other)
    add_adapter(adapted, AdapterSpec(rank=2, alpha=2.0), seed=0)
    save_adapter(adapted, folder)
    edit(folder / ADAPTER_CONFIG, base_model_name_or_path=str(other))
    with pytest.raises(BadInput, match=r"an adapter beside the model \(adapter_config\.json\)"):
        load_causal_lm(folder, device="cpu")


def test_a_pickled_adapter_is_refused_unread(tmp_path, mark):
    model = tiny.causal_lm()
    add_adapter(model, AdapterSpec(rank=2, alpha=2.0), seed=0)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Harm(mark), tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(BadInput, match=r"only pickled weights \(adapter_model\.bin\)"):
        merge_adapter(tiny.causal_lm(), tmp_path / "adapter")
    assert not mark.exists()


def test_a_checkpoint_is_read_as_tensors_alone(tmp_path, mark, caplog):
    """The one before it is taken, as after a write that was cut off."""
    save_checkpoint(tmp_path, 3, {"seed": 0}, {"weights": torch.ones(2)})
    torch.save({"run": '{"seed":0}', "step": 9, "state": Harm(mark)}, tmp_path / "step-000000009.pt")
    step, state = load_checkpoint(tmp_path, {"seed": 0}, "cpu")
    assert (step, state["weights"].tolist()) == (3, [1.0, 1.0])
    assert "step-000000009.pt cannot be read (UnpicklingError); trying the one before it" in caplog.text
    assert not mark.exists()


def test_nothing_in_the_package_reads_pickles_or_yaml_that_builds_objects():
    """By the calls themselves: torch.load says weights_only, yaml.load names a safe loader, no other reader is used."""
    barred = {"pickle.load", "pickle.loads", "np.load", "numpy.load", "pd.read_pickle", "joblib.load", "marshal.loads"}
    barred |= {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval", "exec", "os.system", "os.popen"}
    files = [*(ROOT / "workflow").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 150
    loads = []
    for path in files:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name, settings = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in barred, (path, call.lineno)
            assert settings.get("shell", "False") == "False", (path, call.lineno)
            if name == "torch.load":
                assert settings.get("weights_only") == "True", (path, call.lineno)
                loads.append(path.name)
            if name == "yaml.load":
                assert settings["Loader"] == "_Loader", (path, call.lineno)
                loads.append(path.name)
    assert sorted(loads) == ["checkpoints.py", "yaml_text.py"]
    from prefopt.planning.yaml_text import _Loader, yaml

    assert issubclass(_Loader, yaml.SafeLoader | yaml.CSafeLoader)


# --- code -----------------------------------------------------------------------------------------------------------


def write_code(folder: Path, mark: Path) -> None:
    """Classes of the model's own, in files that leave a mark when they are imported."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    own = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code + own)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs): pass\n")
    edit(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )


def test_a_models_python_files_run_only_where_its_declaration_trusts_them(folder, mark, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_code(folder, mark)
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(BadInput, match="declare 'trust_remote_code: true' with the model if you trust it"):
            load(folder, device="cpu")
    assert not mark.exists()
    assert type(load_causal_lm(folder, device="cpu", trust_remote_code=True)).__name__ == "OwnModel"
    assert mark.exists()


def test_code_of_a_known_architecture_and_for_generation_is_left_alone(folder, mark):
    write_code(folder, mark)
    edit(folder / "config.json", model_type="llama")
    load_causal_lm(folder, device="cpu")
    assert not mark.exists()


def test_a_tokenizers_python_files_do_not_run(folder, mark):
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n")
    auto = {"AutoTokenizer": ["own.Own", "own.Own"]}
    edit(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Own")
    try:
        load_tokenizer(folder)
    except BadInput as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017 - either is right: refused, or read without its code
    assert not mark.exists()


def test_attention_from_the_hub_is_code_too(folder):
    edit(folder / "config.json", _attn_implementation="someone/attention", attn_implementation="someone/attention")
    with pytest.raises(BadInput, match="declare 'trust_remote_code: true' with the model if you trust it"):
        load_causal_lm(folder, device="cpu")


def test_a_chat_template_runs_in_a_sandbox(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_code_that_is_trusted_is_part_of_the_models_identity(folder, tmp_path):
    """Without trust it cannot change a result, and is none of the hashed files."""
    (folder / "own.py").write_text("first = 1\n")
    trusted = LocalModel(kind="local", path="model", trust_remote_code=True)
    plain = LocalModel(kind="local", path="model")
    before = [model_identity(spec, tmp_path)[0]["files"] for spec in (trusted, plain)]
    assert set(before[0]) - set(before[1]) == {"own.py"}
    (folder / "own.py").write_text("second = 2\n")
    after = [model_identity(spec, tmp_path)[0]["files"] for spec in (trusted, plain)]
    assert before[0]["own.py"] != after[0]["own.py"]
    assert before[1] == after[1]

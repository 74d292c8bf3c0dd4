from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"


if EXECUTION.container:

    container: EXECUTION.container


include: "workflow/rules/data.smk"
include: "workflow/rules/signals.smk"
include: "workflow/rules/reward.smk"
include: "workflow/rules/policy.smk"
include: "workflow/rules/rounds.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/trials.smk"
include: "workflow/rules/annotators.smk"
include: "workflow/rules/tabular.smk"
include: "workflow/rules/paper.smk"


localrules:
    all,
    demo,
    exact,
    mallowspo,
    reward_distillation,
    own,
    artifacts,


rule all:
    """Every item that config.yaml names, the MLflow import and the report."""
    default_target: True
    input:
        items(),
        local(f"{RESULTS}/published.json"),
        local(f"{RESULTS}/report.html"),


rule demo:
    """Every item of the demo tier, without tracking and report."""
    input:
        items(scale="demo"),


rule exact:
    """Every item without a language model: seconds to a minute each."""
    input:
        items(scale="exact"),


rule mallowspo:
    """The items of MallowsPO, arXiv 2405.14953."""
    input:
        items(paper="mallowspo"),


rule reward_distillation:
    """The items of robust preference optimization through reward-model distillation, arXiv 2405.19316."""
    input:
        items(paper="reward_distillation"),


rule own:
    """The project's own items that config.yaml names."""
    input:
        items(paper="own"),


rule artifacts:
    """Everything below the items: pairs, models, scores, policies, judgements, studies."""
    input:
        finished_below_items(),

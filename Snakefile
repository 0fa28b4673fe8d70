"""The whole project as one graph: parameters -> rows (producers, notebooks 1x) -> figures (consumers).

`make paper` runs it; `snakemake --profile profiles/local figures/fig1_collapse.pdf` makes one figure. On a cluster,
`snakemake real --profile profiles/slurm --config shards=8 model=llava-hf/llava-1.5-7b-hf` runs a real checkpoint.
"""

import json
from glob import glob
from pathlib import Path

RECS = "papermill_runs/10_rec_eval"
REALS = "papermill_runs/12_real_checkpoints"
SPLITS = ["refstamps_val", "refstamps_testA", "refstamps_testB", "refstamps+_val", "refstamps+_testA",
          "refstamps+_testB", "refstampsg_val", "refstampsg_test"]
MODELS = [Path(file).parent.name for file in sorted(glob("analysis/checkpoints/*/probe.csv"))]
OF_MODELS = [f"{RECS}/tab4_{model}_{split}.parquet" for model in MODELS for split in SPLITS]
SUMMARIES = [f"papermill_runs/21_decode_summaries/seed{seed}.parquet" for seed in (0, 1, 2)]
SUMMARIZED = [*SUMMARIES, "analysis/summarization/report.py", "analysis/summarization/score.py", "analysis/summarization/news.py"]
LOOKED = {"tiny-llava": {}, **{model: {"limit": 30, "keep": [0.25, 0.5]} for model in ("tiny-llava-wide", "tiny-shikra")}}
ATTENTION = [f"{RECS}/fig3.parquet", *(f"{RECS}/fig9_{model}_refstamps_val.parquet" for model in list(LOOKED)[1:]),
             *(f"papermill_runs/13_attention_rows/{model}_{kind}.parquet" for model in LOOKED for kind in ("attention", "soft")),
             "analysis/attention.py"]
FIGURES = {  # consumer notebook -> what it reads
    "fig1_collapse": [f"{RECS}/fig1.parquet"],
    "fig2_misalignment": [f"{RECS}/fig2.parquet"],
    "fig3_keep_ratio": [f"{RECS}/fig3.parquet"],
    "fig4_order_and_value": [f"{RECS}/fig4.parquet"],
    "fig5_qualitative": [f"{RECS}/tab1_refstamps_val.parquet"],
    "fig6_models": OF_MODELS,
    "fig7_attention_consistency": SUMMARIZED,
    "fig8_summaries_side_by_side": SUMMARIZED,
    "fig9_inconsistency_of_pruning": ATTENTION,
    "figA_refstamps": [],
    "figB_testbed": ["analysis/checkpoints/tiny-clip/log.csv"]
                    + [f"analysis/checkpoints/{model}/{file}" for model in MODELS for file in ("log.csv", "probe.csv")],
}
TABLES = {
    "tab1_methods": [f"{RECS}/tab1_{split}.parquet" for split in SPLITS],
    "tab2_control": [f"{RECS}/tab1_refstamps_val.parquet", f"{RECS}/tab2.parquet"],
    "tab3_cost": ["papermill_runs/11_cost/tab3.parquet"],
    "tab4_models": OF_MODELS,
    "tab5_extractor_recall": SUMMARIZED,
    "tab6_summarization_rouge": SUMMARIZED,
    "tab7_inconsistency_rate": SUMMARIZED,
    "tabA_frames": [f"{RECS}/fig1.parquet"],
    "tabB_order_ids": [f"{RECS}/tabB.parquet"],
}
DRAWING = ["analysis/style.py", "analysis/published.py", "analysis/stats.py", "analysis/rec/scoring.py"]
# what can move a row: the code without the drawing, the command lines, the training and the probe; attention and cost move
# those of 13_attention_rows and 11_cost only
ENGINE = sorted(set(glob("analysis/*.py") + glob("analysis/*/*.py")) - set(DRAWING) - set(glob("analysis/summarization/*.py"))
                - set(glob("analysis/training/*.py"))
                - {f"analysis/{name}.py" for name in ("__main__", "models/__main__", "models/convert", "engine/attention", "engine/cost")})

SHARDS = int(config.get("shards", 1))  # jobs that share the work of one file of rows
# 12_real_checkpoints takes its parameters from --config model=... limit=...; gpu is how many GPUs each of its jobs gets
GIVEN = {"model": "llava-hf/llava-1.5-7b-hf"} | {name: config[name] for name in config if name not in ("shards", "gpu")}
CHECKPOINT = Path(GIVEN["model"]).name if Path(GIVEN["model"]).is_dir() else GIVEN["model"].replace("/", "_")
REFCOCO = {"refcoco": ["val", "testA", "testB"], "refcoco+": ["val", "testA", "testB"], "refcocog": ["val", "test"]}
SETS = {GIVEN["dataset"]: REFCOCO.get(GIVEN["dataset"], ["val"])} if "dataset" in GIVEN else REFCOCO
SETS = {name: GIVEN.get("splits", splits) for name, splits in SETS.items()}


def rows(name):
    """What a job writes: the file of rows, or its shard of it, which `merge` takes (analysis.results.shard_path)."""
    return temp(f"{name}.{{shard}}of{SHARDS}.parquet") if SHARDS > 1 else f"{name}.parquet"


def shard(wildcards):
    return f"{wildcards.get('shard', 1)}/{SHARDS}"


def executed(wildcards, output):
    """The executed notebook, which is the log."""
    return Path(output[0]).with_suffix(".ipynb")


def weights(model):
    """Files of a model, and of the CLIP whose words it is compared with."""
    return [f"analysis/checkpoints/{name}/model.safetensors" for name in ("tiny-clip", model)]


def settings(key):
    """Parameter file of rows, and what goes beside it: tables 1 and 4 have one file of rows for each (model and) split."""
    file, *rest = key.split("_")
    return file, dict(zip(("model", "dataset", "split")[-len(rest):], rest)) if rest else {}


wildcard_constraints:
    key="[^/.]+",
    dataset="[^/_]+",
    split="[^/_.]+",
    table="tab[^/]+",
    seed=r"\d+",


rule all:
    input:
        expand("figures/{name}.{kind}", name=FIGURES, kind=["pdf", "png"]),
        expand("figures/{name}.{kind}", name=TABLES, kind=["tex", "html", "csv"]),


# One thread a job: on models this small two jobs of one thread do almost twice the work of one job of two.
# The executed notebook is the log. Snakemake removes old rows before it starts; parts of a killed run stay and count.
rule rec_eval:
    input:
        notebook="notebooks/10_rec_eval.ipynb",
        parameters=lambda wildcards: f"{RECS}/{settings(wildcards.key)[0]}.yaml",
        engine=ENGINE,
        weights=lambda wildcards: weights(settings(wildcards.key)[1].get("model", "tiny-llava")),
    output:
        rows(RECS + "/{key}"),
    params:
        log=executed,
        shard=shard,
        settings=lambda wildcards: " ".join(f"-p {name} {value}" for name, value in settings(wildcards.key)[1].items()),
    shell:
        "OMP_NUM_THREADS={threads} papermill {input.notebook} {params.log} -k python3 --log-output"
        " -f {input.parameters} {params.settings} -p out {RECS}/{wildcards.key}.parquet -p shard {params.shard}"


rule real:
    input:
        [f"{REALS}/{CHECKPOINT}_{dataset}_{split}.parquet" for dataset, splits in SETS.items() for split in splits],


# New code does not throw hours of a GPU away: remove the rows to have them made anew.
rule real_checkpoints:
    input:
        "notebooks/12_real_checkpoints.ipynb",
    output:
        rows(f"{REALS}/{CHECKPOINT}_{{dataset}}_{{split}}"),
    params:
        log=executed,
        given=lambda wildcards: json.dumps(GIVEN | {"dataset": wildcards.dataset, "splits": [wildcards.split],
                                                    "shard": shard(wildcards), "out": REALS}),
    resources:
        gpu=config.get("gpu", 1),
    shell:
        "mkdir -p {REALS} && papermill {input} {params.log} -k python3 --log-output -y {params.given:q}"


if SHARDS > 1:
    localrules: merge

    rule merge:
        input:
            [f"{{rows}}.{number}of{SHARDS}.parquet" for number in range(1, SHARDS + 1)],
        output:
            "{rows}.parquet",
        wildcard_constraints:
            rows=rf"({RECS}|{REALS})/((?!\.\d+of)[^/])+",
        run:
            from analysis.results import merge_shards

            merge_shards(output[0], input)


rule cost:
    input:
        notebook="notebooks/11_cost.ipynb",
        engine=[*ENGINE, "analysis/cost.py"],
        weights=weights("tiny-llava"),
    output:
        "papermill_runs/11_cost/tab3.parquet",
    threads: workflow.cores  # alone, for the sake of the times
    shell:
        "mkdir -p papermill_runs/11_cost && "
        "papermill {input.notebook} papermill_runs/11_cost/tab3.ipynb -k python3 --log-output -p out {output}"


rule attention:
    input:
        notebook="notebooks/13_attention_rows.ipynb",
        engine=[*ENGINE, "analysis/attention.py", "analysis/summarization/losses.py"],
        weights=lambda wildcards: weights(wildcards.model),
    output:
        [f"papermill_runs/13_attention_rows/{{model}}_{kind}.parquet" for kind in ("attention", "soft")],
    params:
        log=executed,
        given=lambda wildcards: json.dumps(LOOKED[wildcards.model] | {
            "model": wildcards.model, "out": f"papermill_runs/13_attention_rows/{wildcards.model}"}),
    shell:
        "mkdir -p papermill_runs/13_attention_rows && "
        "OMP_NUM_THREADS={threads} papermill {input.notebook} {params.log} -k python3 --log-output -y {params.given:q}"


rule decode_summaries:
    input:
        notebook="notebooks/21_decode_summaries.ipynb",
        engine=[f"analysis/summarization/{name}.py" for name in ("batch", "beam", "data", "losses", "model", "news", "systems")],
        weights=lambda wildcards: sorted(glob(f"analysis/summarization/checkpoints/*-seed{wildcards.seed}.safetensors")),
    output:
        "papermill_runs/21_decode_summaries/seed{seed}.parquet",
    params:
        log=executed,
    shell:
        "mkdir -p papermill_runs/21_decode_summaries && OMP_NUM_THREADS={threads} papermill {input.notebook} {params.log}"
        " -k python3 --log-output -p seed {wildcards.seed} -p out {output}"


rule table:
    input:
        notebook="notebooks/{table}.ipynb",
        rows=lambda wildcards: TABLES[wildcards.table],
        drawing=DRAWING,
    output:
        "figures/{table}.tex",
        "figures/{table}.html",
        "figures/{table}.csv",
    shell:
        "mkdir -p papermill_runs/{wildcards.table} && "
        "papermill {input.notebook} papermill_runs/{wildcards.table}/{wildcards.table}.ipynb -k python3"


rule figure:
    input:
        notebook="notebooks/{name}.ipynb",
        rows=lambda wildcards: FIGURES[wildcards.name],
        drawing=DRAWING,
    output:
        "figures/{name}.pdf",
        "figures/{name}.png",
    shell:
        "mkdir -p papermill_runs/{wildcards.name} && "
        "papermill {input.notebook} papermill_runs/{wildcards.name}/{wildcards.name}.ipynb -k python3"

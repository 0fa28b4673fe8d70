"""The whole project as one graph: parameters -> rows (producers, notebooks 1x) -> figures (consumers).

`make paper` runs it; `snakemake --profile profiles/local figures/fig1_collapse.pdf` makes one figure.
"""

from glob import glob

RECS = "papermill_runs/10_rec_eval"
SPLITS = ["refstamps_val", "refstamps_testA", "refstamps_testB", "refstamps+_val", "refstamps+_testA",
          "refstamps+_testB", "refstampsg_val", "refstampsg_test"]
MODELS = ["tiny-llava", "tiny-llava-wide", "tiny-llava-next", "tiny-shikra", "tiny-minigpt-v2"]
OF_MODELS = [f"{RECS}/tab4_{model}_{split}.parquet" for model in MODELS for split in SPLITS]
FIGURES = {  # consumer notebook -> what it reads
    "fig1_collapse": [f"{RECS}/fig1.parquet"],
    "fig2_misalignment": [f"{RECS}/fig2.parquet"],
    "fig3_keep_ratio": [f"{RECS}/fig3.parquet"],
    "fig4_order_and_value": [f"{RECS}/fig4.parquet"],
    "fig5_qualitative": [f"{RECS}/tab1_refstamps_val.parquet"],
    "fig6_models": OF_MODELS,
    "figA_refstamps": [],
    "figB_testbed": ["analysis/testbed/checkpoints/tiny-clip/log.csv"]
                    + [f"analysis/testbed/checkpoints/{model}/{file}" for model in MODELS for file in ("log.csv", "probe.csv")],
}
TABLES = {
    "tab1_methods": [f"{RECS}/tab1_{split}.parquet" for split in SPLITS],
    "tab2_control": [f"{RECS}/tab1_refstamps_val.parquet", f"{RECS}/tab2.parquet"],
    "tab3_cost": ["papermill_runs/11_cost/tab3.parquet"],
    "tab4_models": OF_MODELS,
    "tabA_frames": [f"{RECS}/fig1.parquet"],
    "tabB_order_ids": [f"{RECS}/tabB.parquet"],
}
DRAWING = ["analysis/style.py", "analysis/published.py", "analysis/stats.py", "analysis/rec/scoring.py"]
# what can move a row: the code without the drawing, the command lines, the training and the probe
ENGINE = sorted(set(glob("analysis/*.py") + glob("analysis/*/*.py")) - set(DRAWING) - set(glob("analysis/summarization/*.py"))
                - {f"analysis/testbed/{name}.py" for name in ("train", "instruct", "grow", "probe")}
                - {f"analysis/{name}.py" for name in ("__main__", "models/__main__", "models/convert")})


def weights(model):
    """Files of a model, and of the CLIP whose words it is compared with."""
    return [f"analysis/testbed/checkpoints/{name}/model.safetensors" for name in ("tiny-clip", model)]


wildcard_constraints:
    key="[^/]+",
    table="tab[^/]+",


rule all:
    input:
        expand("figures/{name}.{kind}", name=FIGURES, kind=["pdf", "png"]),
        expand("figures/{name}.{kind}", name=TABLES, kind=["tex", "html", "csv"]),


ruleorder: rec_eval_model > rec_eval_split > rec_eval  # tab1_* and tab4_* have no parameters of their own


# One thread a job: on models this small two jobs of one thread do almost twice the work of one job of two.
# The executed notebook is the log. Snakemake removes old rows before it starts; parts of a killed run stay and count.
rule rec_eval:
    input:
        notebook="notebooks/10_rec_eval.ipynb",
        parameters=RECS + "/{key}.yaml",
        engine=ENGINE,
        weights=weights("tiny-llava"),
    output:
        RECS + "/{key}.parquet",
    shell:
        "OMP_NUM_THREADS={threads} papermill {input.notebook} {RECS}/{wildcards.key}.ipynb -k python3 --log-output"
        " -f {input.parameters} -p out {output}"


# one file for each split of table 1, all with the same parameters
rule rec_eval_split:
    input:
        notebook="notebooks/10_rec_eval.ipynb",
        parameters=f"{RECS}/tab1.yaml",
        engine=ENGINE,
        weights=weights("tiny-llava"),
    output:
        RECS + "/tab1_{dataset,[^_]+}_{split}.parquet",
    shell:
        "OMP_NUM_THREADS={threads} papermill {input.notebook} {RECS}/tab1_{wildcards.dataset}_{wildcards.split}.ipynb -k python3 --log-output"
        " -f {input.parameters} -p dataset {wildcards.dataset} -p split {wildcards.split} -p out {output}"


# one file for each model and split of table 4, all with the same parameters
rule rec_eval_model:
    input:
        notebook="notebooks/10_rec_eval.ipynb",
        parameters=f"{RECS}/tab4.yaml",
        engine=ENGINE,
        weights=lambda wildcards: weights(wildcards.model),
    output:
        RECS + "/tab4_{model,[^_]+}_{dataset,[^_]+}_{split}.parquet",
    shell:
        "OMP_NUM_THREADS={threads} papermill {input.notebook} {RECS}/tab4_{wildcards.model}_{wildcards.dataset}_{wildcards.split}.ipynb"
        " -k python3 --log-output -f {input.parameters} -p model {wildcards.model} -p dataset {wildcards.dataset}"
        " -p split {wildcards.split} -p out {output}"


rule cost:
    input:
        notebook="notebooks/11_cost.ipynb",
        engine=ENGINE,
        weights=weights("tiny-llava"),
    output:
        "papermill_runs/11_cost/tab3.parquet",
    threads: workflow.cores  # alone, for the sake of the times
    shell:
        "mkdir -p papermill_runs/11_cost && "
        "papermill {input.notebook} papermill_runs/11_cost/tab3.ipynb -k python3 --log-output -p out {output}"


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

"""The whole project as one graph: parameters -> rows (producers, notebooks 1x) -> figures (consumers).

`make paper` runs it; `snakemake --profile profiles/local figures/fig1_collapse.pdf` makes one figure.
"""

from glob import glob
from pathlib import Path

RECS = "papermill_runs/10_rec_eval"
SPLITS = ["refstamps_val", "refstamps_testA", "refstamps_testB", "refstamps+_val", "refstamps+_testA",
          "refstamps+_testB", "refstampsg_val", "refstampsg_test"]
MODELS = [Path(file).parent.name for file in sorted(glob("analysis/testbed/checkpoints/*/probe.csv"))]
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
                - {f"analysis/testbed/{name}.py" for name in ("train", "loop", "contrast", "instruct", "grow", "probe")}
                - {f"analysis/{name}.py" for name in ("__main__", "models/__main__", "models/convert")})


def weights(model):
    """Files of a model, and of the CLIP whose words it is compared with."""
    return [f"analysis/testbed/checkpoints/{name}/model.safetensors" for name in ("tiny-clip", model)]


def settings(key):
    """Parameter file of rows, and what goes beside it: tables 1 and 4 have one file of rows for each (model and) split."""
    file, *rest = key.split("_")
    return file, dict(zip(("model", "dataset", "split")[-len(rest):], rest)) if rest else {}


wildcard_constraints:
    key="[^/]+",
    table="tab[^/]+",


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
        RECS + "/{key}.parquet",
    params:
        settings=lambda wildcards: " ".join(f"-p {name} {value}" for name, value in settings(wildcards.key)[1].items()),
    shell:
        "OMP_NUM_THREADS={threads} papermill {input.notebook} {RECS}/{wildcards.key}.ipynb -k python3 --log-output"
        " -f {input.parameters} {params.settings} -p out {output}"


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

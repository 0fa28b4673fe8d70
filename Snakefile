"""The whole project as one graph: parameters -> rows (producers, notebooks 1x) -> figures (consumers).

`make paper` runs it; `snakemake --profile profiles/local figures/fig1_collapse.pdf` makes one figure.
"""

from glob import glob

FIGURES = {  # consumer notebook -> rows it reads
    "fig1_collapse": ["papermill_runs/10_rec_eval/fig1.parquet"],
    "fig2_misalignment": ["papermill_runs/10_rec_eval/fig2.parquet"],
    "figA_refstamps": [],
    "figB_testbed": [f"analysis/testbed/checkpoints/{file}"
                     for file in ("tiny-clip/log.csv", "tiny-llava/log.csv", "tiny-llava/probe.csv")],
}
DRAWING = ["analysis/style.py", "analysis/published.py", "analysis/stats.py", "analysis/rec/scoring.py"]
# what can move a row: the code without the drawing, the training and the probe
ENGINE = sorted(set(glob("analysis/*.py") + glob("analysis/*/*.py")) - set(DRAWING)
                - {"analysis/testbed/train.py", "analysis/testbed/probe.py"})
CHECKPOINTS = glob("analysis/testbed/checkpoints/*/model.safetensors")


rule all:
    input:
        expand("figures/{name}.{kind}", name=FIGURES, kind=["pdf", "png"]),


# The executed notebook is the log. Snakemake removes old rows before it starts; parts of a killed run stay and count.
rule rec_eval:
    input:
        notebook="notebooks/10_rec_eval.ipynb",
        parameters="papermill_runs/10_rec_eval/{key}.yaml",
        engine=ENGINE,
        checkpoints=CHECKPOINTS,
    output:
        "papermill_runs/10_rec_eval/{key}.parquet",
    shell:
        "papermill {input.notebook} papermill_runs/10_rec_eval/{wildcards.key}.ipynb -k python3 --log-output"
        " -f {input.parameters} -p out {output}"


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

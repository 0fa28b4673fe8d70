"""The whole project as one graph: parameters -> rows (producers, notebooks 1x) -> figures (consumers).

`make paper` runs it; `snakemake --profile profiles/local figures/fig1_collapse.pdf` makes one figure. On a cluster,
`snakemake real --profile profiles/slurm --config shards=8 model=llava-hf/llava-1.5-7b-hf` runs a real checkpoint.

A job is stale when its content is: its parameter `key` (analysis.keys.job) changes with the code cells of its
notebook, with the modules, pruners and checkpoints that it uses, and with nothing else. Dates only tell whether rows are
newer than what was drawn of them. What a figure reads stands in one place, the parameters cell of its notebook.
"""

import atexit
import json
import os
import re
import sys
from base64 import urlsafe_b64decode
from glob import glob
from pathlib import Path

import yaml

sys.path.insert(0, workflow.basedir)  # this project's code, whatever else is installed
from analysis import params as notebooks
from analysis import keys, results
from analysis.pruning import all_pruners

RUNS = "papermill_runs"
RECS, REALS, LOOKED, SUMMARIES = (f"{RUNS}/{name}" for name in
                                  ("10_rec_eval", "12_real_checkpoints", "13_attention_rows", "21_decode_summaries"))
SPLITS = ["refstamps_val", "refstamps_testA", "refstamps_testB", "refstamps+_val", "refstamps+_testA",
          "refstamps+_testB", "refstampsg_val", "refstampsg_test"]
MODELS = [Path(file).parent.name for file in sorted(glob("analysis/checkpoints/*/probe.csv"))]
LOOKS = {"tiny-llava": {}, **{model: {"limit": 30, "keep": [0.25, 0.5]} for model in ("tiny-llava-wide", "tiny-shikra")}}
PATTERNS = {  # the files that a pattern in a notebook's parameters stands for: those of the graph, and no others
    f"{RECS}/tab1_*.parquet": [f"{RECS}/tab1_{split}.parquet" for split in SPLITS],
    f"{RECS}/fig10_*.parquet": [f"{RECS}/fig10_{model}_refstamps+_val.parquet" for model in MODELS],
    f"{RECS}/tab4_*.parquet": [f"{RECS}/tab4_{model}_{split}.parquet" for model in MODELS for split in SPLITS],
    f"{SUMMARIES}/seed*.parquet": [f"{SUMMARIES}/seed{seed}.parquet" for seed in (0, 1, 2)],
}


def reads(notebook):
    """{parameter: files} that a consumer reads."""
    found = {}
    for name, value in notebooks.defaults(f"notebooks/{notebook}.ipynb").items():
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list) and listed and all(str(file).endswith(".parquet") for file in listed):
            found[name] = PATTERNS.get(value, listed) if isinstance(value, str) else listed
    return found


READS = {name: reads(name) for name in sorted(Path(file).stem for kind in ("fig", "tab") for file in glob(f"notebooks/{kind}*.ipynb"))}
CAPTION = ["txt", "caption.tex"]  # beside each of them
FIGURES, TABLES = ([name for name in READS if name.startswith(kind)] for kind in ("fig", "tab"))

SHARDS = int(config.get("shards", 1))  # jobs that share the work of one file of rows
# 12_real_checkpoints takes its parameters from --config model=... limit=...; gpu is how many GPUs each of its jobs gets.
# Settings besides the model and the data set stand in the name of the folder: a trial is never taken for the whole run.
GIVEN = {"model": "llava-hf/llava-1.5-7b-hf"} | {name: config[name] for name in config if name not in ("shards", "gpu", "retries")}
CHECKPOINT = Path(GIVEN["model"]).name if Path(GIVEN["model"]).is_dir() else GIVEN["model"].replace("/", "_")
REFCOCO = {"refcoco": ["val", "testA", "testB"], "refcoco+": ["val", "testA", "testB"], "refcocog": ["val", "test"]}
SETS = {GIVEN["dataset"]: REFCOCO.get(GIVEN["dataset"], ["val"])} if "dataset" in GIVEN else REFCOCO
SETS = {name: GIVEN.get("splits", splits) for name, splits in SETS.items()}
SETS = {name: [splits] if isinstance(splits, str) else splits for name, splits in SETS.items()}
SETTINGS = {name: GIVEN[name] for name in sorted(GIVEN) if name not in ("model", "dataset", "splits")}
SAID = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
if not re.fullmatch(r"[\w=,.+-]{0,60}", SAID):  # a path or a list: too long to be read in a name
    SAID = keys.fingerprint(SETTINGS)
REAL = f"{REALS}/{SAID}".rstrip("/")


def rows(name):
    """What a job writes: the file of rows, or its shard of it, which `merge` takes (analysis.results.shard_path)."""
    return temp(f"{name}.{{shard}}of{SHARDS}.parquet") if SHARDS > 1 else f"{name}.parquet"


def shard(wildcards):
    return f"{wildcards.get('shard', 1)}/{SHARDS}"


def executed(wildcards, output):
    """The executed notebook, which is the log."""
    return Path(output[0]).with_suffix(".ipynb")


def settings(key):
    """What makes rows: their parameter file, and what goes beside it (a file for each model or split)."""
    file, *rest = key.split("_")
    given = yaml.safe_load(Path(f"{RECS}/{file}.yaml").read_text())
    return given | (dict(zip(("model", "dataset", "split")[-len(rest):], rest)) if rest else {})


def pruners(given):
    """The methods that settings name, in a grid or alone; "all" stands for every one but none."""
    named = [part.get("pruner", "none") for part in given.get("grid") or [given]]
    named = {spec for one in named for spec in ([one] if isinstance(one, str) else one)}
    return sorted(named - {"all"} | set(all_pruners() if "all" in named else ()))


def rec_key(wildcards):
    given = settings(wildcards.key)
    return keys.job("notebooks/10_rec_eval.ipynb", pruners(given), [given.get("model", "tiny-llava")], settings=given)


def looked_key(wildcards):
    given = notebooks.defaults("notebooks/13_attention_rows.ipynb") | LOOKS[wildcards.model]
    return keys.job("notebooks/13_attention_rows.ipynb", given["pruner"], [wildcards.model], settings=given)


def cost_key(wildcards):
    given = notebooks.defaults("notebooks/11_cost.ipynb")
    return keys.job("notebooks/11_cost.ipynb", given["pruner"], [given["model"]])


def summary_key(wildcards):
    files = (f"*-seed{wildcards.seed}.safetensors", "*.json", "*.txt")
    return keys.job("notebooks/21_decode_summaries.ipynb",
                          weights=keys.folder("analysis/summarization/checkpoints", files))


def drawing_key(wildcards):
    notebook = f"notebooks/{wildcards.name}.ipynb"
    if wildcards.name.startswith("fig5"):  # it encodes and prunes again what it shows
        given = notebooks.defaults(notebook)
        return keys.job(notebook, [given["pruner"]], ["tiny-llava"], drawing=True)
    return keys.job(notebook, drawing=True)


def drawing(wildcards):
    """The parameters of a consumer: its rows, one file as such, and the paper's name, which only the graph may give."""
    default = notebooks.defaults(f"notebooks/{wildcards.name}.ipynb")
    one = {name for name in READS[wildcards.name] if isinstance(default[name], str) and "*" not in default[name]}
    reads = {name: files[0] if name in one else files for name, files in READS[wildcards.name].items()}
    return json.dumps(reads | {"out": wildcards.name}) if reads else "{}"


def drawn_from(wildcards):
    logs = [f"analysis/checkpoints/{model}/{file}" for model in MODELS for file in ("log.csv", "probe.csv")]
    logs = ["analysis/checkpoints/tiny-clip/log.csv", *logs] if wildcards.name == "figB_testbed" else []
    return [file for files in READS[wildcards.name].values() for file in files] + logs


# Older than this file is only what this clone has not made itself: rows and figures that git brought along. They are made
# anew, so that everything is really regenerated; nothing that the graph does not make is ever touched.
BEGUN = Path(".snakemake/begun")
if not BEGUN.exists():
    BEGUN.parent.mkdir(exist_ok=True)
    BEGUN.touch()
# A later pull brings newer ones: whatever Snakemake has no record of is dated back.
RECORDS = Path(".snakemake/metadata")  # one file for each that a job of this clone has made, its name in base64
if workflow.is_main_process:
    recorded = {urlsafe_b64decode(file.name).decode() for file in RECORDS.glob("[!@]*")}
    read = {file for given in READS.values() for files in given.values() for file in files}
    rows_of_graph = {file for file in read if not file.startswith(f"{RUNS}/testbed_design/")}  # these are trained
    for file in rows_of_graph | {file for name in READS for file in glob(f"figures/{name}.*")}:
        if file not in recorded and Path(file).exists():
            os.utime(file, (BEGUN.stat().st_mtime - 1,) * 2)


os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # papermill, where .venv is not activated

# A driver holds the project until it ends in whatever way. Where none is alive, what a killed one has locked is free.
if workflow.is_main_process and not {"-n", "--dry-run", "--dryrun"} & set(sys.argv):
    DRIVER = results.locked(Path(".snakemake/driver"), wait=0)
    try:
        DRIVER.__enter__()
    except RuntimeError as error:
        sys.exit(f"Snakemake runs here already, so nothing is started. {error}")
    atexit.register(DRIVER.__exit__, None, None, None)
    for lock in glob(".snakemake/locks/*"):
        Path(lock).unlink()
    os.environ["ROWS_WAIT"] = "86400"  # jobs of a killed driver may still work: wait for them, then read their rows back


wildcard_constraints:
    key="[^/.]+",
    dataset="[^/_]+",
    split="[^/_.]+",
    name="[^/.]+",
    seed=r"\d+",


rule all:
    input:
        expand("figures/{name}.{kind}", name=FIGURES, kind=["pdf", "png", *CAPTION]),
        expand("figures/{name}.{kind}", name=TABLES, kind=["tex", "html", "csv", *CAPTION]),


# One thread a job: on models this small two jobs of one thread do almost twice the work of one job of two.
# The executed notebook is the log. Snakemake removes old rows before it starts; parts of a killed run stay and count.
rule rec_eval:
    input:
        BEGUN,
    output:
        rows(RECS + "/{key}"),
    params:
        log=executed,
        key=rec_key,
        given=lambda wildcards: json.dumps(settings(wildcards.key) | {
            "out": f"{RECS}/{wildcards.key}.parquet", "shard": shard(wildcards)}),
    shell:
        "OMP_NUM_THREADS={threads} papermill notebooks/10_rec_eval.ipynb {params.log} -k python3 --log-output"
        " -y {params.given:q}"


# Rows of a real checkpoint are hours of a GPU, so the graph only notes that they are done, in a file beside them, and
# removes none. They have their own key: made again under the same one they are read back, under another it is an error.
rule real:
    input:
        [f"{REAL}/{CHECKPOINT}_{dataset}_{split}.done" for dataset, splits in SETS.items() for split in splits],


for note in glob(f"{REALS}/**/*.done", recursive=True):
    if not Path(note).with_suffix(".parquet").exists() and not re.search(r"\.\d+of\d+\.done$", note):
        Path(note).unlink()


rule real_checkpoints:
    output:
        touch(f"{REAL}/{CHECKPOINT}_{{dataset}}_{{split}}" + (f".{{shard}}of{SHARDS}.done" if SHARDS > 1 else ".done")),
    params:
        log=executed,
        given=lambda wildcards: json.dumps(GIVEN | {"dataset": wildcards.dataset, "splits": [wildcards.split],
                                                    "shard": shard(wildcards), "out": REAL}),
    resources:
        gpu=config.get("gpu", 1),
    retries: int(config.get("retries", 2))  # each goes on from the parts of the one before it
    shell:
        "mkdir -p {REAL} && papermill notebooks/12_real_checkpoints.ipynb {params.log} -k python3 --log-output"
        " -y {params.given:q}"


if SHARDS > 1:
    localrules: merge, merge_real

    rule merge:
        input:
            [f"{{rows}}.{number}of{SHARDS}.parquet" for number in range(1, SHARDS + 1)],
        output:
            "{rows}.parquet",
        wildcard_constraints:
            rows=rf"{RECS}/((?!\.\d+of)[^/])+",
        run:
            from analysis.results import merge_shards

            merge_shards(output[0], input)

    rule merge_real:
        input:
            [f"{{rows}}.{number}of{SHARDS}.done" for number in range(1, SHARDS + 1)],
        output:
            touch("{rows}.done"),
        wildcard_constraints:
            rows=rf"{REALS}/((?!\.\d+of).)+",
        run:
            from analysis.results import merge_shards

            merge_shards(Path(output[0]).with_suffix(".parquet"), [Path(file).with_suffix(".parquet") for file in input])


rule cost:
    input:
        BEGUN,
    output:
        f"{RUNS}/11_cost/tab3.parquet",
    params:
        log=executed,
        key=cost_key,
    threads: workflow.cores  # alone, for the sake of the times
    shell:
        "mkdir -p {RUNS}/11_cost && papermill notebooks/11_cost.ipynb {params.log} -k python3 --log-output -p out {output}"


rule attention:
    input:
        BEGUN,
    output:
        [f"{LOOKED}/{{model}}_{kind}.parquet" for kind in ("attention", "soft")],
    params:
        log=executed,
        key=looked_key,
        given=lambda wildcards: json.dumps(LOOKS[wildcards.model] | {
            "model": wildcards.model, "out": f"{LOOKED}/{wildcards.model}"}),
    shell:
        "mkdir -p {LOOKED} && OMP_NUM_THREADS={threads} papermill notebooks/13_attention_rows.ipynb {params.log}"
        " -k python3 --log-output -y {params.given:q}"


rule decode_summaries:
    input:
        BEGUN,
    output:
        SUMMARIES + "/seed{seed}.parquet",
    params:
        log=executed,
        key=summary_key,
    shell:
        "mkdir -p {SUMMARIES} && OMP_NUM_THREADS={threads} papermill notebooks/21_decode_summaries.ipynb {params.log}"
        " -k python3 --log-output -p seed {wildcards.seed} -p out {output}"


rule table:
    input:
        BEGUN,
        drawn_from,
    output:
        "figures/{name}.tex",
        "figures/{name}.html",
        "figures/{name}.csv",
        expand("figures/{{name}}.{kind}", kind=CAPTION),
    params:
        key=drawing_key,
        given=drawing,
    wildcard_constraints:
        name="tab[^/.]+",
    shell:
        "mkdir -p {RUNS}/{wildcards.name} && papermill notebooks/{wildcards.name}.ipynb"
        " {RUNS}/{wildcards.name}/{wildcards.name}.ipynb -k python3 -y {params.given:q}"


rule figure:
    input:
        BEGUN,
        drawn_from,
    output:
        "figures/{name}.pdf",
        "figures/{name}.png",
        expand("figures/{{name}}.{kind}", kind=CAPTION),
    params:
        key=drawing_key,
        given=drawing,
    wildcard_constraints:
        name="fig[^/.]+",
    shell:
        "mkdir -p {RUNS}/{wildcards.name} && papermill notebooks/{wildcards.name}.ipynb"
        " {RUNS}/{wildcards.name}/{wildcards.name}.ipynb -k python3 -y {params.given:q}"

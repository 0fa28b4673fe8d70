"""One page of all figures and tables, with captions, n, models, commits and the commands that make them: report.html.

Everything is in the file, so that it opens from disk without a network. README's table gives the order, the notebooks
and the files; captions come from beside the figures (`style.Page`), the rest from the rows that were drawn.
"""

from __future__ import annotations

import base64
import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from PIL import Image
from pyarrow import parquet

from analysis import IN_CLONE, ROOT, keys, params, results
from analysis.stats import EXPRESSION_ID
from analysis.style import digest

# A line of README's table: title, notebook, other columns, and links to one or several files in figures/.
LINE = re.compile(r"^\| (?P<title>[^|]+?) \| `(?P<notebook>(?:fig|tab)\w+)` \|(?P<rest>.*)\|$", re.MULTILINE)
LINK = re.compile(r"\]\(figures/([\w+.-]+)\.(?:png|csv|html)\)")
MADE = re.compile(r"(?:commit (?P<commit>[^;]*); )?(?:rows sha256 (?P<rows>\w+); )?parameters (?P<parameters>\{.*\})")
EXPRESSION = ["dataset", "split", *EXPRESSION_ID]

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --text: #1f2328; --faint: #59636e; --line: #d1d9e0; --page: #ffffff; --box: #f6f8fa; --link: #0550ae;
  --warning: #9a3b00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --faint: #9da7b3; --line: #3d444d; --page: #0d1117; --box: #161b22; --link: #79b8ff;
    --warning: #ffa657; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--text);
  overflow-wrap: anywhere; font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .8rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; columns: 24rem; }
nav li { break-inside: avoid; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; scroll-margin-top: .5rem; }
figure { margin: 0 0 1.5rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; border-radius: 4px; }
figcaption { margin-top: .7rem; max-width: 50rem; }
.note { display: block; margin-top: .4rem; color: var(--faint); font-size: .85rem; }
.wide { overflow-x: auto; padding-bottom: .3rem; }
.wide:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .8rem; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; margin: 1rem 0 0;
  font-size: .85rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .95em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
dd code { background: var(--box); border-radius: 3px; padding: .1em .3em; }
.warning { color: var(--warning); font-weight: 600; }
@media (max-width: 40rem) {
  figure img { min-width: 36rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .4rem; }
}
@media print { section { break-inside: avoid; } .wide { overflow: visible; } }
{{ looks | join("\n") | safe }}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p>{{ there }} of {{ all }} figures and tables, gathered at {{ commit }}.
Each is made anew, with the rows that it is drawn from, by the command below it; <code>make paper</code> makes all.</p>
</header>
<nav aria-label="Figures and tables"><ul>
{% for part in parts %}<li><a href="#{{ part.notebook }}">{{ part.title }}</a></li>
{% endfor %}</ul></nav>
<main>
{% for part in parts %}<section id="{{ part.notebook }}" aria-labelledby="title-{{ part.notebook }}">
<h2 id="title-{{ part.notebook }}">{{ part.title }}</h2>
{% for one in part.shown %}<figure>
<div class="wide" tabindex="0" role="region" aria-label="{{ part.title }}">
{% if one.png %}<img src="data:image/png;base64,{{ one.png }}" width="{{ one.size[0] }}" height="{{ one.size[1] }}" \
alt="{{ one.caption }}">
{% else %}{{ one.table | safe }}
{% endif %}</div>
<figcaption>{{ one.caption }}
{% if one.note %}<span class="note">{{ one.note }}</span>{% endif %}</figcaption>
</figure>
{% endfor %}{% for fault in part.faults %}<p class="warning">{{ fault }}</p>
{% endfor %}<dl>
{% for name, value in part.facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}<dt>made by</dt><dd><code>{{ part.command }}</code></dd>
</dl>
</section>
{% endfor %}</main>
</body>
</html>
"""


class Line(NamedTuple):
    """A line of README's table."""

    title: str  # "Figure 1: ..."
    notebook: str
    names: list[str]  # of files in figures/, without ending; a notebook may make several


def listing(readme: str) -> list[Line]:
    """The figures and tables of README's table, in its order. ValueError where it has none."""
    found = []
    for line in LINE.finditer(readme):
        title = line["title"] if line["title"].startswith("Table") else f"Figure {line['title']}"
        found.append(Line(title, line["notebook"], list(dict.fromkeys(LINK.findall(line["rest"])))))
    if not found:
        raise ValueError(
            "README.md has no table of figures; its lines are: | title | `notebook` | ... [`file`](figures/file.png) |"
        )
    return found


def shown(folder: Path, name: str) -> dict[str, Any]:
    """One figure or table as the page takes it: png and size, or table, look and note; caption; made: its metadata.

    Raises FileNotFoundError where there is neither a picture nor a table, ValueError where it is not one.
    """
    png, html, caption = (folder / f"{name}.{ending}" for ending in ("png", "html", "txt"))
    told = caption.read_text().strip() if caption.is_file() else ""
    if png.is_file():
        try:
            with Image.open(png) as picture:
                made, size = picture.info.get("Source", ""), picture.size
        except OSError as error:
            raise ValueError(f"figures/{png.name} is no picture: {error}") from error
        return dict(
            table="", note="", png=base64.b64encode(png.read_bytes()).decode(), size=size, caption=told, made=made
        )
    if not html.is_file():
        raise FileNotFoundError(f"figures/{name} is missing")
    text = html.read_text()
    look, table = re.search(r"<style[^>]*>(.*?)</style>", text, re.S), re.search(r"<table.*</table>", text, re.S)
    if not look or not table:
        raise ValueError(f"figures/{html.name} holds no table as analysis.style writes them")
    note = re.search(r"<small>(.*?)</small>\s*</caption>", table[0], re.S)
    source = re.search(r'<meta name="source" content="([^"]*)"', text)
    return dict(
        png="",
        table=re.sub(r"<caption.*?</caption>\s*", "", table[0], flags=re.S),  # the page has it below
        look=look[1].strip(),
        note=unescape(note[1]) if note else "",
        caption=told,
        made=unescape(source[1]) if source else "",
    )


def size(files: list[Path]) -> str:
    """n of rows, each expression or document counted once: "3,812 expressions about 500 images", or by model.

    Failed expressions are left out, as figures do; times are told as images and turns.
    """
    asked, documents, timed = [], set(), set()
    for file in files:
        columns = parquet.read_schema(file).names
        if "document" in columns:
            documents |= set(pd.read_parquet(file, columns=["document"])["document"])
        if "turn" in columns:
            turns = pd.read_parquet(file, columns=["images", "turn"])
            timed.add(f"{turns['images'].max():,} images in each of {turns['turn'].nunique():,} turns")
        if "sent_id" in columns:
            names = [name for name in ("model", *EXPRESSION, "error") if name in columns]
            asked.append(results.answered(pd.read_parquet(file, columns=names))[names[:6]].drop_duplicates())
    if asked:
        models: dict[str, list[str]] = {}
        for model, each in pd.concat(asked).drop_duplicates().groupby("model", sort=False):
            images = each[EXPRESSION[:3]].drop_duplicates()
            models.setdefault(f"{len(each):,} expressions about {len(images):,} images", []).append(model)
        return next(iter(models)) if len(models) == 1 else "; ".join(f"{', '.join(m)}: {n}" for n, m in models.items())
    return ", ".join(sorted(timed)) or (f"{len(documents):,} documents" if documents else "")


def facts(notebook: str, made: str) -> tuple[dict[str, str], list[str]]:
    """What is known of one notebook's figure or table: {n, models, ...} and, in words, what is wrong with its rows.

    made: the metadata that `style.Page` wrote; without it the parameters are the notebook's defaults.
    """
    declared, told = params.defaults(ROOT / "notebooks" / f"{notebook}.ipynb"), MADE.fullmatch(made)
    given = json.loads(told["parameters"]) if told else {}
    read, files = {}, []
    for name, default in declared.items():
        here, there = (value if isinstance(value, list) else [value] for value in (given.get(name, default), default))
        if here and all(str(file).endswith(".parquet") for file in here):
            read[name], files = there, files + here
    other = {name: value for name, value in given.items() if name not in read}
    rows = [file for listed in read.values() for file in listed]
    found = {"rows": ", ".join(rows) or "none; it is drawn from what the project ships"}
    found |= {"parameters": ", ".join(f"{name} {json.dumps(value)}" for name, value in other.items())} if other else {}
    try:
        files = params.paths(files)
        of = [results.provenance(file) for file in files]
    except (FileNotFoundError, ValueError) as error:
        why = str(error).replace(f"{ROOT}/", "")
        return found, [f"n and models are only in the caption, since rows that it is drawn from cannot be read: {why}"]
    models = {str(one["model"]): str(one.get("revision", "")) for one in of if "model" in one}
    models = ", ".join(f"{name} (revision {revision})" if revision else name for name, revision in models.items())
    commits = (told and told["commit"]) or ", ".join(sorted({str(one.get("commit", "unknown")) for one in of}))
    about = {"n": size(files), "models": models, "commit of the rows": commits}
    faults = []
    if told and told["rows"] and files and told["rows"] != digest(files):
        faults.append("Drawn from other rows than those that are here now; make paper draws it anew.")
    if old := sorted({what for one in of for what in keys.outdated(one)}):
        many = sum(bool(keys.outdated(one)) for one in of)
        faults.append(f"{many} of {len(of)} files of rows were made under another key: {'; '.join(old)}")
    return {name: value for name, value in about.items() if value} | found, faults


def page() -> tuple[str, list[str]]:
    """The page, and what is missing from it, in words. ValueError where nothing is there that it could show."""
    readme, folder = (ROOT / "README.md").read_text(), ROOT / "figures"
    parts, looks, missing, there, count = [], [], [], 0, 0
    for title, notebook, names in listing(readme):
        kind = "tex" if notebook.startswith("tab") else "png"
        command = f".venv/bin/snakemake --profile profiles/local figures/{notebook}.{kind}"
        found, faults = [], []
        for name in names:
            count += 1
            try:
                found.append(shown(folder, name))
            except (FileNotFoundError, ValueError) as error:
                faults.append(f"{error}; make it with: {command}")
                continue
            there += 1
            if not found[-1]["caption"]:
                faults.append(f"figures/{name}.txt, its caption, is missing; make it with: {command}")
                found[-1]["caption"] = title
        missing += [f"{title}: {fault}" for fault in faults]
        known, stale = facts(notebook, found[0]["made"]) if found else ({}, [])
        looks += [one["look"] for one in found if "look" in one]
        parts.append(
            dict(title=title, notebook=notebook, shown=found, facts=known, faults=faults + stale, command=command)
        )
    if not there:
        raise ValueError(f"none of the {count} figures and tables of README.md is in {folder}; make paper makes them")
    made = keys.environment()
    text = (
        jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        .from_string(PAGE)
        .render(
            title=readme.partition("\n")[0].lstrip("# "),
            commit=f"commit {made['commit']}" + " and changes since" * bool(made["dirty"]),
            parts=parts,
            looks=looks,
            there=there,
            all=count,
        )
    )
    return text, missing


def write(out: Path) -> list[str]:
    """Write the page to `out` and return what is missing from it, in words.

    Raises ValueError where there is nothing to show, or outside a clone.
    """
    if not IN_CLONE:
        raise ValueError("figures are in a clone of the project, not in the installed package; run this there")
    text, missing = page()
    torn = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    torn.write_text(text)
    os.replace(torn, out)
    return missing

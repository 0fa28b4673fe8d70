"""Every notebook in JupyterLab, run and run again in a real browser: `make browser-test`.

Not part of `make test`. Works on a copy of the project; screenshots and the seconds of everything go to runs/browser/.
The browser is what CHROMIUM names, else a Chromium or Chrome on the PATH, else the one that playwright installed. One
notebook: `python -m pytest -q -s --noconftest tests/browser/proof.py -k fig1`.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from playwright.sync_api import Error, sync_playwright

from analysis import ROOT

SHOTS, TOKEN, WIDE = ROOT / "runs/browser", "browser-test", 1280
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
REAL = dict(model="tiny-llava", dataset="refstamps", splits=["val"], dtype="float32", smoke=True)
PRODUCERS = {  # a few images or documents; all others run as they are, on the tracked rows
    "10_rec_eval": dict(pruner=["none", "random"], keep=0.25, ids=["compact", "original"], smoke=True),
    "11_cost": dict(smoke=True),
    "12_real_checkpoints": REAL,
    "13_attention_rows": dict(smoke=True),
    "20_train_summarizer": dict(smoke=True),
    "21_decode_summaries": dict(smoke=True),
}
CELLS = "jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(cell => cell.toJSON())"


def say(text):
    print(text, flush=True)
    with open(SHOTS / "log.txt", "a") as log:
        print(text, file=log)


def contents():
    """What must stay as it is: the project's own rows and figures, with their times."""
    files = [file for name in ("papermill_runs", "figures") for file in (ROOT / name).rglob("*")]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file() and file.parent.name != "smoke"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy in which everything runs; the project itself must stay as it is."""
    shutil.rmtree(SHOTS, ignore_errors=True)
    SHOTS.mkdir(parents=True)
    copy, before = tmp_path_factory.mktemp("lab") / "project", contents()
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "smoke", "__pycache__", "*.egg-info"))
    for name, given in PRODUCERS.items():
        path = copy / f"notebooks/{name}.ipynb"
        nbformat.write(parameterize_notebook(load_notebook_node(str(path)), given), path)
    yield copy
    assert contents() == before, "the project itself was changed"


@pytest.fixture(scope="module")
def lab(project):
    """The address of a JupyterLab of its own, whose kernels import the copy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(project.parent / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(project.parent / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(project.parent / "ipython"), "PYTHONPATH": str(project)}
    asked = project.parent / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    asked.parent.mkdir(parents=True)
    asked.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    flags = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--LabApp.extension_manager=readonly"]
    flags += [f"--port={port}", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={project}"]
    address = f"http://127.0.0.1:{port}"
    with open(SHOTS / "jupyterlab.txt", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *flags], env=os.environ | own, cwd=project, stdout=log, stderr=log
        )
    try:
        for _ in range(120):
            assert server.poll() is None, f"JupyterLab has ended: see {SHOTS / 'jupyterlab.txt'}"
            try:
                urlopen(f"{address}/api?token={TOKEN}")
                break
            except URLError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found)
        except Error as error:
            why = str(error).strip().splitlines()[0]
            pytest.exit(
                f"no browser: {why}. Install one (Debian: apt-get install chromium; else: python -m playwright install "
                f"chromium) or give its path: make browser-test CHROMIUM=/path/to/chromium",
                returncode=1,
            )
        yield started
        started.close()


@contextmanager
def opened(name, lab, browser):
    """A notebook in a tab of its own, with its kernel ready; the kernel ends with it."""
    page = browser.new_page(viewport={"width": WIDE, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?reset&token={TOKEN}")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'")
    page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
    try:
        yield page
    finally:
        page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
        page.close()


def execute(page, command):
    """What a menu's entry does, to its end; then no cell may have failed or been left out. Returns seconds."""
    begun = time.monotonic()
    page.evaluate(f"ended = false, jupyterapp.commands.execute('{command}').finally(() => ended = true), null")
    if "restart" in command:
        page.locator(".jp-Dialog .jp-mod-accept").click()
    page.wait_for_function("ended", timeout=1_200_000)
    seconds = time.monotonic() - begun
    for cell in page.evaluate(CELLS):
        if cell["cell_type"] != "code":
            continue
        for out in cell["outputs"]:
            assert out["output_type"] != "error", "\n".join(out["traceback"])
            assert "Warning" not in out.get("text", ""), out["text"]
        assert cell["execution_count"], f"not run: {cell['source']}"
    return seconds


def shoot(page, name):
    """The whole notebook in one picture: the window grows until nothing has to be scrolled."""
    page.set_viewport_size({"width": WIDE, "height": 12_000})
    page.wait_for_timeout(500)  # pictures and menus settle
    height = page.evaluate(
        "document.querySelector('.jp-WindowedPanel-outer').scrollTo(0, 0),"
        "Math.max(...[...document.querySelectorAll('.jp-Cell')].map(cell => cell.getBoundingClientRect().bottom))"
    )
    page.set_viewport_size({"width": WIDE, "height": int(height) + 60})
    page.wait_for_timeout(500)
    page.screenshot(path=SHOTS / f"{name}.png")
    page.set_viewport_size({"width": WIDE, "height": 900})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_runs_again(name, lab, browser):
    with opened(name, lab, browser) as page:
        took = [execute(page, f"notebook:{way}") for way in ("run-all-cells", "run-all-cells", "restart-run-all")]
        assert any(cell.get("outputs") for cell in page.evaluate(CELLS)), "nothing is shown"
        shoot(page, name)
        assert "displaying widget" not in page.content(), "a widget is broken"
    say(f"{name}: {took[0]:.1f} s, again {took[1]:.1f} s, after a restart {took[2]:.1f} s")


def test_the_explorer_answers_its_controls(lab, browser):
    """By mouse and keyboard, as a person would; every change gives another picture."""
    with opened("00_explore", lab, browser) as page:
        execute(page, "notebook:run-all-cells")
        board = page.locator(".jupyter-widgets", has=page.locator("img")).first
        board.scroll_into_view_if_needed()
        picture = board.locator("img.widget-image")

        def control(label):
            return board.locator(".widget-inline-hbox", has=page.locator(f"label:text-is('{label}')"))

        def slide(label, share):
            track, handle = control(label).locator(".noUi-base"), control(label).locator(".noUi-handle")
            here, whole = handle.bounding_box(), track.bounding_box()
            page.mouse.move(here["x"] + here["width"] / 2, here["y"] + here["height"] / 2)
            page.mouse.down()
            page.mouse.move(whole["x"] + share * whole["width"], here["y"] + here["height"] / 2)
            page.mouse.up()

        def write(said):
            control("expression").locator("input").fill(said)
            page.keyboard.press("Enter")

        def timed(change, *given):
            old, begun = picture.get_attribute("src"), time.monotonic()
            change(*given)
            page.wait_for_function(
                "old => (img => img.src != old && img.complete)(document.querySelector('img.widget-image'))",
                arg=old,
                polling="raf",
            )
            seconds = time.monotonic() - begun
            board.get_by_text("s in all").wait_for()  # in its place stands what is wrong, where something is
            return seconds

        changes = {
            "scene": [(slide, "scene", share) for share in (0.3, 0.6, 0.9)],
            "keep": [(slide, "keep", share) for share in (0.5, 0.3, 0.1)],
            "seed": [(slide, "seed", share) for share in (0.2, 0.5)],
            "expression": [(write, said) for said in ("the left one", "red cup", "the dog on the right")],
        }
        for name, asked in changes.items():
            took = [timed(*change) for change in asked]
            say(f"00_explore, {name}: {statistics.median(took):.2f} s a change (most {max(took):.2f} s, {len(took)})")
        shoot(page, "00_explore_changed")

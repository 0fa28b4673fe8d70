import subprocess
import sys

DRAW = """
import sys, pathlib
from analysis import style
style.ROOT = pathlib.Path(sys.argv[1])
style.paper_style()
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(2, 1))
ax.errorbar([0, 1], [0, 1], [0.1, 0.2], label="a")
ax.legend()
style.save(fig, "drawn", smoke=sys.argv[2] == "smoke")
"""


def draw(folder, smoke=""):
    subprocess.run([sys.executable, "-c", DRAW, folder, smoke], check=True)
    folder = folder / "figures"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_draw_the_same_bytes_and_smoke_is_stamped_elsewhere(tmp_path):
    paper = draw(tmp_path / "a")
    assert set(paper) == {"drawn.pdf", "drawn.png"}
    assert paper == draw(tmp_path / "b")
    smoke = draw(tmp_path / "c", "smoke")
    assert set(smoke) == {"smoke/drawn.pdf", "smoke/drawn.png"}
    assert smoke["smoke/drawn.png"] != paper["drawn.png"]

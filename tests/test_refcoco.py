"""RefCOCO's readers: the same three objects in every form give the same rows; whatever is broken or hostile is refused.

The real annotations are checked where the environment variable REFCOCO_ANNOTATIONS names a folder with
<dataset>_<split>.json files.
"""

import copyreg
import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from analysis.engine.evaluate import EXPRESSION, OTHER
from analysis.rec import datasets, refcoco
from analysis.rec.refcoco import COLUMNS, COUNTS, FORMS, TRUTH, check_counts, coco_name, read_annotations, unc_val
from analysis.rec.scoring import perfect_answers, score, summarise
from tests.support.refcoco import (
    EXPECTED,
    OBJECTS,
    SIZES,
    TALL,
    WIDE,
    WRITERS,
    instances,
    jxu124,
    lmms,
    minigpt,
    photos,
    qwen,
    refer,
    shikra,
)


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(name, tmp_path, recwarn):
    rows = read_annotations(**WRITERS[name](tmp_path))
    assert list(rows) == COLUMNS and set(EXPRESSION) < set(COLUMNS)
    assert pd.factorize(rows["ref_id"])[0].tolist() == pd.factorize(EXPECTED["object"])[0].tolist()
    pd.testing.assert_frame_equal(rows.drop(columns="ref_id"), EXPECTED.drop(columns="object"), check_exact=True)
    assert not recwarn.list


def test_refs_keep_their_ids_and_boxes_without_one_are_numbered_in_their_image(tmp_path):
    assert read_annotations(**refer(tmp_path))["ref_id"].tolist() == ["7", "7", "8", "9", "9"]
    stem = Path(WIDE).stem
    assert read_annotations(**qwen(tmp_path))["ref_id"].tolist()[:3] == [f"{stem}_0", f"{stem}_0", f"{stem}_1"]
    twice = read_annotations(**lmms(tmp_path, objects=[*OBJECTS, OBJECTS[0]]))
    assert twice["ref_id"].tolist() == ["107", "107", "108", "109", "109", "107_1", "107_1"]
    assert not twice.duplicated(["image_id", "ref_id", "sent_id"]).any()


@pytest.mark.parametrize(
    "path, name",
    [
        ("COCO_train2014_000000000009_12", WIDE),
        ("a/b/COCO_train2014_000000000009_1.jpg", WIDE),
        (r"C:\train2014\COCO_train2014_000000000009.jpg", WIDE),
        ("other/photo_12.png", "other/photo_12.png"),
    ],
)
def test_names_of_images(path, name):
    assert coco_name(path) == name


# Splits.


def test_the_standard_split_is_cut_out_of_lmms_val(tmp_path, capsys):
    """Theirs holds an object twice, one of another split, and one of the standard split is missing."""
    unc = read_annotations(**minigpt(tmp_path))
    other = (50, TALL, [1.0, 2.0, 3.0, 4.0], ["someone else's"])
    theirs = read_annotations(**lmms(tmp_path, objects=[other, OBJECTS[2], OBJECTS[0], OBJECTS[2]]))
    cut = unc_val(theirs, unc)
    assert cut["expression"].tolist() == ["the cup", "a cup", "red cat", "cat on the café's left"]
    printed = capsys.readouterr().out
    assert "2 of the 3 boxes" in printed and "1 are missing" in printed and "1 objects are of other" in printed
    with pytest.raises(ValueError, match="same data set"):
        unc_val(theirs[theirs["expression"] == "someone else's"], unc)


def test_counts(tmp_path, monkeypatch):
    rows = read_annotations(**minigpt(tmp_path))
    with pytest.raises(ValueError, match="10834 expressions of 3811 objects in 1500 images, but these rows have 5 exp"):
        check_counts(rows, "refcoco", "val")
    with pytest.raises(ValueError, match="valid: val, test"):
        check_counts(rows, "refcocog", "testA")
    monkeypatch.setitem(COUNTS, "refcoco", {"val": (5, 3, 2)})
    check_counts(rows, "refcoco", "val")


@pytest.mark.parametrize("dataset, split", [(d, s) for d, splits in COUNTS.items() for s in splits])
def test_the_real_annotations(dataset, split, recwarn):
    """Counts of the split, no box outside its image, and what a perfect model gets when its padding is forgotten."""
    if not (folder := os.environ.get("REFCOCO_ANNOTATIONS")):
        pytest.skip("REFCOCO_ANNOTATIONS names no folder with <dataset>_<split>.json files")
    try:
        rows = datasets.annotations(dataset, split, folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check_counts(rows, dataset, split)
    assert not recwarn.list
    perfect = perfect_answers(rows)
    known = {
        "refcoco": {"val": 92.99, "testA": 93.51, "testB": 89.38},
        "refcoco+": {"val": 93.03, "testA": 93.47, "testB": 89.38},
        "refcocog": {"val": 87.97, "test": 88.86},
    }
    assert round(100 * score(perfect, "original")["correct"].mean(), 2) == known[dataset][split]
    assert score(perfect)["correct"].all()


def test_a_perfect_padded_answer_is_only_wrong_where_its_padding_is_forgotten():
    """In a 640 x 320 image, y comes back as 80 + y / 2: the top quarter, 0 to 80, as 80 to 120."""
    rows = pd.DataFrame(
        dict(
            image_id=["a", "b", "b"],
            ref_id=["a", "b", "c"],
            width=[640, 640, 320],
            height=320,
            x1=[0.0, 0.0, 32.0],
            y1=[0.0, 0.0, 0.0],
            x2=[640.0, 640.0, 64.0],
            y2=[80.0, 160.0, 80.0],
        )
    )
    perfect = perfect_answers(rows)
    assert perfect["raw"].tolist() == [
        "[0.00, 0.25, 1.00, 0.38]",
        "[0.00, 0.25, 1.00, 0.50]",
        "[0.10, 0.00, 0.20, 0.25]",
    ]
    assert score(perfect)["correct"].all()
    assert score(perfect, "original")["correct"].tolist() == [False, True, True]  # the second has an IoU of exactly 0.5
    assert summarise(score(perfect), ["frame"]).loc[0, ["n", "accuracy", "tokens"]].tolist() == [3, 1.0, 0.0]
    with pytest.raises(ValueError, match="padded"):
        perfect_answers(rows, frame="paded")


# What is not as it should be.


def edited(folder, change):
    """MiniGPT-v2's list after `change` of it."""
    path = minigpt(folder)["path"]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_boxes_that_stick_out_by_rounding_are_clipped_with_one_warning(tmp_path):
    def out(content):
        content[0]["bbox"] = content[1]["bbox"] = [-0.4, 0, 20, 30]
        content[2]["bbox"] = [40, 5, 41.5, 20]

    with pytest.warns(UserWarning, match="2 boxes stuck out .* at most 1.50 px.*000000000009_7$") as caught:
        rows = read_annotations(edited(tmp_path, out))
    assert len(caught) == 1
    assert rows[TRUTH].iloc[[0, 2]].to_numpy().tolist() == [[0, 0, 19.6, 30], [40, 5, 80, 25]]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("bbox", [70, 5, 20, 20], "1 of 5 .* outside their image; first: ref_id COCO_train2014_000000000009_8"),
        ("bbox", [10, 5, 0, 20], "empty or outside"),
        ("bbox", [10, 5, 20], "entry 3: its box must be four finite numbers"),
        ("bbox", [10, 5, 20, float("nan")], "entry 3: its box must be"),
        ("bbox", [10, 5, 20, True], "entry 3: its box must be"),
        ("sents", " ", "entry 3: its expression must be"),
        ("width", 80.5, "entry 3: its width must be whole pixels"),
        ("img_id", "9_8", "entry 3: its file_name must be the name of an image"),
    ],
)
def test_impossible_annotations(key, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_annotations(edited(tmp_path, lambda content: content[2].update({key: value})))


def test_a_broken_line_is_named(tmp_path):
    path = qwen(tmp_path)["path"]
    whole = path.read_text().split("\n")
    path.write_text("\n".join([whole[0], "", whole[1][:30], whole[2]]))
    with pytest.raises(ValueError, match="rows.jsonl, line 3: broken JSON.*valid forms are .*image, sent, bbox"):
        read_annotations(path)
    path.write_text("\n".join([whole[0], json.dumps({"image": WIDE})]))
    with pytest.raises(ValueError, match="line 2: 'sent' is missing; Qwen-VL JSON lines has image, sent"):
        read_annotations(path)


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files(name, tmp_path):
    given = WRITERS[name](tmp_path)
    path = given["path"] / "refs(unc).p" if given["path"].is_dir() else given["path"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=path.name.split("(")[0]):
        read_annotations(**given)


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", "null", "[[1]]", '{"image": 1, "box": 2}', "[" * 10**5])
def test_other_json(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="valid forms are .*jxu124.*refer.*lmms-lab.*MiniGPT-v2.*Qwen-VL.*Shikra"):
        read_annotations(tmp_path / "a.json")


def test_the_order_of_boxes_must_be_clear(tmp_path):
    given = jxu124(tmp_path, raw=False)
    table = pq.read_table(given["path"]).to_pylist()
    for row in table:
        row["bbox"] = [1.0, 2.0, 10.0, 12.0]
    pq.write_table(pa.Table.from_pylist(table), given["path"])
    with pytest.raises(ValueError, match="both as xyxy and as xywh"):
        read_annotations(**given)
    for row in table:
        row["raw_anns"] = json.dumps({"bbox": [5, 5, 5, 5]})
    pq.write_table(pa.Table.from_pylist(table), given["path"])
    with pytest.raises(ValueError, match="neither as xyxy nor as xywh"):
        read_annotations(**given)


def test_unknown_splits_sizes_and_instances(tmp_path):
    with pytest.raises(ValueError, match="no split 'testA'; it has: val, train"):
        read_annotations(**refer(tmp_path) | dict(split="testA"))
    with pytest.raises(ValueError, match="instances=<instances.json> or images="):
        read_annotations(**shikra(tmp_path, False))
    with pytest.raises(FileNotFoundError, match="1 of 2 images are missing, first .*25.jpg"):
        (photos(tmp_path / "images") / TALL).unlink()
        read_annotations(**shikra(tmp_path, False), images=tmp_path / "images")
    with pytest.raises(ValueError, match="holds no bytes of COCO"):
        read_annotations(**lmms(tmp_path, images=False))
    (tmp_path / "instances.json").unlink()
    with pytest.raises(ValueError, match="gives no boxes: instances.json is to lie beside it"):
        read_annotations(tmp_path)
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="entry 1: instances.json lacks image 0 or annotation 107"):
        read_annotations(tmp_path)
    (tmp_path / "instances.json").write_text('{"images": 3}')
    with pytest.raises(ValueError, match="no COCO instances file"):
        read_annotations(tmp_path)
    with pytest.raises(ValueError, match=r"no refs\(unc\).p"):
        read_annotations(tmp_path / "images")


# Hostile pickles.


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark):
    command = f"touch {mark}"
    reduced = {
        "system": Call(os.system, command),
        "eval": Call(eval, f"__import__('os').system({command!r})"),
        "getattr": Call(getattr, os, "system"),
        "copyreg": Call(copyreg._reconstructor, dict, object, None),
        "array": np.zeros(3),
        "scalar": np.float64(1),
        "set": {1},
        "class": Call,
        "print": print,
    }
    reduced["getattr"].call = getattr, ("", "upper")  # a module cannot be pickled; the built-in itself is what counts
    made = {
        f"{name} {protocol}": pickle.dumps([{"ref_id": thing}], protocol)
        for name, thing in reduced.items()
        for protocol in (0, 2)
    }
    return made | {
        "by hand": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "instance": f"(S'{command}'\nios\nsystem\n.".encode(),
        "object": f"(cos\nsystem\nS'{command}'\no.".encode(),
        "persistent": b"Pname\n.",
        "extension": b"\x82\x01.",
        "stacked": f"\x8c\x02os\x8c\x06system\x93\x8c{chr(len(command))}{command}\x85R.".encode("latin1"),
        "far index": b"]r\xff\xff\xff\x7f.",
        "build": b"}}b.",
        "new object": b"\x8c\x01a)\x81.",
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_a_pickle_that_names_anything_is_refused_unrun(name, tmp_path):
    mark = tmp_path / "mark"
    instances(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(hostile(mark)[name])
    with pytest.raises(ValueError, match="refused|does not begin with a record") as error:
        read_annotations(tmp_path)
    assert not mark.exists()
    if name in ("system 0", "by hand", "stacked"):
        assert "posix.system" in str(error.value) or "os.system" in str(error.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8
)
VALUE = ANYTHING | st.just([1, 2, 3, 4]) | st.just(WIDE) | st.integers(1, 90)
KEYED = st.sampled_from(list(FORMS.values())).flatmap(
    lambda form: st.lists(st.fixed_dictionaries(dict.fromkeys(form.keys, VALUE)), max_size=3)
)
NOISE = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_noise(path, content):
    path.write_bytes(content)
    with suppress(ValueError):
        read_annotations(path)


@NOISE
@given(
    content=st.binary(max_size=300),
    magic=st.sampled_from([b"", b"PAR1", b"\x80\x02", b"[{", b'{"image": ']),
    suffix=st.sampled_from([".p", ".json", ".parquet"]),
)
def test_noise_is_a_value_error(content, magic, suffix, tmp_path):
    check_noise(tmp_path / f"noise{suffix}", magic + content)


@NOISE
@given(content=ANYTHING | KEYED, by_line=st.booleans())
def test_any_json_is_read_or_a_value_error(content, by_line, tmp_path):
    parts = content if by_line and isinstance(content, list) else [content]
    check_noise(tmp_path / "any.json", "\n".join(map(json.dumps, parts)).encode())


@pytest.mark.parametrize("text", ["\ud800", "1e400", "x" * 5000])
def test_odd_texts(text, tmp_path):
    def change(content):
        content[0]["sents"] = content[0]["img_id"] = text

    with pytest.raises(ValueError, match="its file_name"):
        read_annotations(edited(tmp_path, change))


# Data sets by name.


def test_load_from_a_file_and_a_folder_of_images(tmp_path):
    folder = photos(tmp_path / "train2014")
    minigpt(tmp_path, "refcoco+_testB.json")
    with pytest.warns(UserWarning, match="refcoco\\+ testB has 4889 expressions"):
        data = datasets.load("refcoco+", "testB", annotations=tmp_path, images=folder)
    assert (data.name, data.split, len(data.rows)) == ("refcoco+", "testB", 5)
    image = data.image(data.rows["image_id"][0])
    assert image.mode == "RGB" and image.size == SIZES[WIDE]
    (folder / TALL).unlink()
    with pytest.warns(UserWarning):
        assert datasets.load("refcoco+", "testB", 1, tmp_path, folder).rows["file_name"].unique().tolist() == [WIDE]
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="1 of 2 images .*25.jpg.*train2014.zip.*13"):
        datasets.load("refcoco+", "testB", annotations=tmp_path, images=folder)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="give images="):
        datasets.load("refcoco+", "testB", annotations=tmp_path)


@pytest.mark.parametrize(
    "write, where",
    [
        (minigpt, "refcoco_val.json"),
        (qwen, "refcoco/refcoco_val.jsonl"),
        (shikra, "REC_refcoco_unc_val.jsonl"),
        (lmms, "data/val-00000-of-00001.parquet"),
        (jxu124, "data/validation-00000-of-00001.parquet"),
    ],
)
def test_known_names_in_a_folder(write, where, tmp_path, monkeypatch):
    monkeypatch.setitem(COUNTS, "refcoco", {"val": (5, 3, 2)})
    (tmp_path / where).parent.mkdir(exist_ok=True)
    write(tmp_path)["path"].rename(tmp_path / where)
    assert len(datasets.annotations("refcoco", "val", tmp_path)) == 5
    assert len(datasets.annotations("refcoco", "val", tmp_path / where)) == 5


def test_a_refer_folder_is_found_and_no_file_lists_the_names(tmp_path, monkeypatch):
    monkeypatch.setitem(COUNTS, "refcoco", {"val": (5, 3, 2)})
    (tmp_path / "refcoco").mkdir()
    refer(tmp_path / "refcoco")
    assert len(datasets.annotations("refcoco", "val", tmp_path)) == 5
    with pytest.raises(FileNotFoundError, match="refcocog_test.json, .*refs\\(umd\\).p"):
        datasets.annotations("refcocog", "test", tmp_path)


@pytest.mark.parametrize("owner", ["lmms-lab-encoder", "lmms-lab"])
def test_load_by_name_downloads_and_cuts_val(owner, tmp_path, monkeypatch):
    """Images come from the Parquet files' bytes, two shards of them, and only the standard split is left."""
    hub = {f"{owner}/RefCOCO": tmp_path / "a", "jxu124/refcoco": tmp_path / "b"}
    for folder in hub.values():
        (folder / "data").mkdir(parents=True)
    lmms(tmp_path / "a/data", "val-00000-of-00002.parquet", OBJECTS[:1])
    lmms(tmp_path / "a/data", "val-00001-of-00002.parquet", [*OBJECTS[1:], OBJECTS[0], (60, TALL, [1, 2, 3, 4], ["x"])])
    jxu124(tmp_path / "b/data")

    def download(name, **_):
        if name not in hub:
            raise OSError(f"404: no {name}")
        return str(hub[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setitem(COUNTS, "refcoco", {"val": (5, 3, 2)})
    data = datasets.load("refcoco", "val")
    pd.testing.assert_frame_equal(data.rows.drop(columns="ref_id"), EXPECTED.drop(columns="object"))
    red, blue = (data.image(Path(name).stem).getpixel((5, 5)) for name in (WIDE, TALL))
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0]


def test_without_a_network_the_command_is_named(monkeypatch):
    def offline(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError,
        match=r"lmms-lab-encoder/RefCOCOplus: no route; lmms-lab/RefCOCOplus: no route\).*"
        r"hf download --repo-type dataset lmms-lab-encoder/RefCOCOplus "
        r"--include 'data/testA-\*.parquet'; or give annotations=.*images=",
    ):
        datasets.load("refcoco+", "testA")


def test_refstamps_take_no_files():
    with pytest.raises(ValueError, match="refstamps is drawn from seeds .*refcoco, refcoco\\+, refcocog"):
        datasets.load("refstamps", "val", 1, annotations="x")
    assert list(datasets.load("refstamps", "val", 1).rows) == EXPRESSION + OTHER


def test_images_of_one_name_in_two_folders_or_forms_are_two(tmp_path):
    """a/1.jpg, b/1.jpg, 1.jpg and 1.png are four images, each with its own pixels; COCO's names are the image's."""
    names, lines = ["a/1.png", "b/1.png", "1.png", "1.bmp"], []
    for colour, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (50 * colour, 0, 0)).save(tmp_path / name)
        box = dict(expression="left", bbox=[1, 1, 5, 5], width=20, height=10)
        lines.append(json.dumps(box | dict(img_path=name, dataset_name="refcoco")))
    (tmp_path / "REC_refcoco_unc_val.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match="has 10834"):
        data = datasets.load("refcoco", "val", None, tmp_path, tmp_path)
    assert data.rows["image_id"].tolist() == names and data.rows["ref_id"].nunique() == 4
    assert [data.image(name).getpixel((0, 0))[0] for name in names] == [0, 50, 100, 150]
    before = [data.digest(name) for name in names]
    Image.new("RGB", (20, 10), "white").save(tmp_path / "b/1.png")
    assert [name for name, digest in zip(names, before) if data.digest(name) != digest] == ["b/1.png"]
    assert refcoco.image_key("COCO_train2014_000000000001.jpg") == "COCO_train2014_000000000001"
    (tmp_path / "1.png").rename(tmp_path / "a/2.png")
    assert refcoco.folder_images(["x/2.png"], tmp_path / "a")("x/2.png")  # found by its last part
    with pytest.raises(FileNotFoundError):
        refcoco.folder_images(["x/1.png", "y/1.png"], tmp_path / "a")  # which of them would it be?


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    """EXIF's rotation in the size and in the pixels, transparency on white."""
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    Image.new("RGBA", (20, 40), (0, 0, 0, 0)).save(tmp_path / "c.png")
    content = refcoco.folder_images(["t.jpg", "c.png"], tmp_path)
    assert refcoco.picture(content, "t.jpg").size == (20, 40)
    assert refcoco.picture(content, "c.png").getpixel((3, 3)) == (255, 255, 255)

    assert refcoco._sizes(pd.Series(["t.jpg"]), [tmp_path / "refcoco_val.jsonl"], {}, tmp_path).tolist() == [[20, 40]]

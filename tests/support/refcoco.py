"""The same three objects, written in every form that RefCOCO goes around in."""

import io
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from analysis.rec.refcoco import SIZE, TRUTH

WIDE, TALL = "COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg"
SIZES = {WIDE: (80, 60), TALL: (60, 90)}
OBJECTS = [  # ID, image, box as x, y, width, height, what is said
    (7, WIDE, [10.25, 0.0, 20.1, 30.33], ["red cat", "cat on the café's left"]),
    (8, WIDE, [40.5, 5.07, 39.5, 54.93], ["dog"]),
    (9, TALL, [0.0, 45.11, 60.0, 44.89], ["the cup", "a cup"]),
]


def corners(box):
    return [box[0], box[1], round(box[0] + box[2], 2), round(box[1] + box[3], 2)]


EXPECTED = pd.DataFrame(
    [
        dict(
            image_id=Path(image).stem,
            object=ref,
            sent_id=i,
            expression=text,
            width=SIZES[image][0],
            height=SIZES[image][1],
            **dict(zip(TRUTH, corners(box))),
            file_name=image,
        )
        for ref, image, box, said in OBJECTS
        for i, text in enumerate(said)
    ]
)


def jpeg(name):
    stream = io.BytesIO()
    Image.new("RGB", SIZES[name], (200, 30, 30) if name == WIDE else (30, 30, 200)).save(stream, "JPEG")
    return stream.getvalue()


def photos(folder):
    folder.mkdir(exist_ok=True)
    for name in SIZES:
        (folder / name).write_bytes(jpeg(name))
    return folder


def python2(value, protocol):
    """The opcodes Python 2 wrote: byte strings in latin1, no Unicode, no memo."""
    if isinstance(value, dict):
        items = [python2(k, protocol) + python2(v, protocol) for k, v in value.items()]
        return b"}(" + b"".join(items) + b"u" if protocol else b"(d" + b"".join(item + b"s" for item in items)
    if isinstance(value, list):
        items = [python2(v, protocol) for v in value]
        return b"](" + b"".join(items) + b"e" if protocol else b"(l" + b"".join(item + b"a" for item in items)
    if isinstance(value, str):
        raw = value.encode("latin1")
        return b"U" + bytes([len(raw)]) + raw if protocol else b"S" + repr(raw)[1:].encode() + b"\n"
    return b"J" + value.to_bytes(4, "little") if protocol else b"I%d\n" % value


def instances(folder):
    content = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(SIZES.items())],
        "annotations": [{"id": 100 + ref, "bbox": box, "segmentation": []} for ref, _, box, _ in OBJECTS],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def refs(split="val"):
    return [
        {
            "ref_id": ref,
            "ann_id": 100 + ref,
            "image_id": list(SIZES).index(image),
            "split": split,
            "file_name": image.replace(".jpg", f"_{ref}.jpg"),
            "category_id": 1,
            "sent_ids": [1],
            "sentences": [{"sent": text, "raw": text.upper(), "tokens": text.split()} for text in said],
        }
        for ref, image, _, said in OBJECTS
    ]


def refer(folder, protocol=2):
    instances(folder)
    stop = b"\x80\x02" if protocol else b""
    other = [dict(refs("train")[0], ref_id=99)]
    (folder / "refs(unc).p").write_bytes(stop + python2(refs() + other, protocol) + b".")
    return dict(path=folder, split="val")


def lmms(folder, name="val-00000-of-00001.parquet", objects=OBJECTS, images=True):
    table = pa.table(
        {
            "question_id": [str(100 + o[0]) for o in objects],
            "question": ["Describe it."] * len(objects),
            "answer": [o[3] for o in objects],
            "bbox": pa.array([o[2] for o in objects], pa.list_(pa.float32())),
            "file_name": [o[1].replace(".jpg", f"_{o[0]}.jpg") for o in objects],
            "image": [{"bytes": jpeg(o[1]) if images else None, "path": o[1]} for o in objects],
        }
    )
    pq.write_table(table, folder / name, row_group_size=2)
    return dict(path=folder / name)


def jxu124(folder, name="validation-00000-of-00001.parquet", order="xyxy", raw=True):
    rows = [
        {k: ref[k] for k in ("ref_id", "split", "sentences", "image_id")}
        | {
            "image_path": f"coco/train2014/{image}",
            "bbox": corners(box) if order == "xyxy" else box,
            "raw_anns": json.dumps({"bbox": box} if raw else {}),
            "raw_image_info": json.dumps(dict(zip(SIZE, SIZES[image]))),
        }
        for ref, (_, image, box, _) in zip(refs(), OBJECTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return dict(path=folder / name)


def records(names, said, place, order, size=True):
    return [
        {
            names: place.format(image, stem=Path(image).stem, ref=ref),
            said: text,
            "bbox": corners(box) if order == "xyxy" else box,
        }
        | (dict(zip(SIZE, SIZES[image])) if size else {})
        for ref, image, box, texts in OBJECTS
        for text in texts
    ]


def lines(folder, content):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, content)) + "\n")
    return folder / "rows.jsonl"


def qwen(folder):
    return dict(path=lines(folder, records("image", "sent", "data/coco2014/{}", "xyxy")))


def shikra(folder, size=True):
    return dict(path=lines(folder, records("img_path", "expression", "{}", "xyxy", size)))


def minigpt(folder, name="refcoco_val.json"):
    content = records("img_id", "sents", "{stem}_{ref}", "xywh")
    (folder / name).write_text(json.dumps(content, indent=1))
    return dict(path=folder / name)


WRITERS = {
    "refer, protocol 2": refer,
    "refer, protocol 0": lambda folder: refer(folder, 0),
    "lmms-lab": lmms,
    "jxu124": jxu124,
    "jxu124 in xywh": lambda folder: jxu124(folder, order="xywh"),
    "jxu124 without raw_anns": lambda folder: jxu124(folder, raw=False),
    "Qwen-VL": qwen,
    "Shikra": shikra,
    "Shikra, sizes from images": lambda folder: shikra(folder, False) | dict(images=photos(folder / "images")),
    "Shikra, sizes from instances": lambda folder: shikra(folder, False) | dict(instances=instances(folder)),
    "MiniGPT-v2": minigpt,
}

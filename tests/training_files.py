"""Training data as files, whose pictures tell which they are."""

import io
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
from PIL import Image

from vitreg_hub.training.data.opening import as_image_source, as_stream, held_out_rows, open_rows

FEATURES = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))


def png(number, size=(6, 4)):
    """A file of a picture that tells its number in every pixel."""
    file = io.BytesIO()
    Image.new("RGB", size, (number, number // 2, 255 - number)).save(file, "PNG")
    return file.getvalue()


def write_folder(root, count, classes=("a", "b", "c")):
    """Pictures 0, 1, ... in class folders that take turns."""
    for i in range(count):
        (root / classes[i % len(classes)]).mkdir(parents=True, exist_ok=True)
        (root / classes[i % len(classes)] / f"{i:03}.png").write_bytes(png(i))
    return root


def write_shards(root, sizes, **extra):
    """Pictures 0, 1, ... in shards of these sizes, each with class and caption; extra files by ending."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"train-{shard:04}.tar", "w") as tar:
            for _ in range(size):
                parts = {"png": png(number), "cls": b"%d" % (number % 3), "txt": b"number %d" % number}
                for ending, content in (parts | {key: make(number) for key, make in extra.items()}).items():
                    info = tarfile.TarInfo(f"{number:05}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    return root


@contextmanager
def served(root):
    """A folder at a URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def data_set(numbers, features=FEATURES):
    rows = {"image": [{"bytes": png(i), "path": None} for i in numbers], "label": [i % 3 for i in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(root, *parts):
    root.mkdir(parents=True, exist_ok=True)
    for k, numbers in enumerate(parts):
        data_set(numbers).to_parquet(root / f"part-{k}.parquet")
    return root


def training_data(settings):
    """What a run trains on, before its classes are looked at."""
    return as_stream(open_rows(settings.train, "train", settings), settings)


def held_out_source(settings, training):
    """The held-out data in the form that evaluations take, if there are any."""
    held_out = held_out_rows(settings, training)
    return held_out and as_image_source(held_out)

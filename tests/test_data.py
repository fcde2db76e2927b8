"""Images in: what every reader returns, and the one line it gives when it cannot."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dp2vae_fast.vae.data import (
    DataError,
    check_trainable,
    load_images,
    make_image_data,
    to_pixels,
    to_unit,
    train_test_split,
)
from tests.images import crops, make_image_folder

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0])


def refused(match: str, source: object, **options) -> str:
    with pytest.raises(DataError, match=match) as caught:
        load_images(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def write_idx(path: Path, array: np.ndarray, code: int = 8) -> Path:
    content = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# ---------------------------------------------------------------------------------------------------- sources


def test_digits_are_lossless_and_complete():
    from sklearn.datasets import load_digits

    data = load_images("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8
    assert data.num_classes == 10 and data.class_names == tuple("0123456789")
    assert int(data.images.max()) == 255
    levels = np.rint(data.images[:, 0].numpy() * (16 / 255))
    assert np.array_equal(levels, load_digits().images)


def test_image_folder_with_classes(tmp_path):
    folder = make_image_folder(tmp_path / "photos", per_class=5)
    (folder / "china" / ".DS_Store").write_text("ignored")
    (folder / ".git").mkdir()
    data = load_images(folder)
    assert data.image_shape == (3, 64, 64) and len(data) == 10
    assert data.class_names == ("china", "flower") and data.labels.tolist() == [0] * 5 + [1] * 5
    expected = np.concatenate([crops("china", 5), crops("flower", 5)])
    assert np.array_equal(data.images.numpy().transpose(0, 2, 3, 1), expected)


def test_flat_folder_is_unlabelled_and_grey_stays_grey(tmp_path):
    for index, picture in enumerate(GREY):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    data = load_images(tmp_path)
    assert data.labels is None and data.num_classes == 0
    assert np.array_equal(data.images[:, 0].numpy(), GREY)
    assert load_images(tmp_path, channels=3).image_shape == (3, 5, 7)


def test_one_colour_image_makes_the_folder_colour(tmp_path):
    Image.fromarray(GREY[0]).save(tmp_path / "a.png")
    Image.fromarray(COLOUR[0]).save(tmp_path / "b.png")
    assert load_images(tmp_path).image_shape == (3, 5, 7)
    assert load_images(tmp_path, channels=1).image_shape == (1, 5, 7)


def test_split_subfolders_are_not_classes(tmp_path):
    for split in ("train", "test"):
        make_image_folder(tmp_path / split, per_class=2 if split == "train" else 1)
    assert len(load_images(tmp_path)) == 4
    assert len(load_images(tmp_path, split="test")) == 2
    assert load_images(tmp_path).class_names == ("china", "flower")
    refused('no split "val"', tmp_path, split="val")


def test_image_size_crops_centrally_and_resizes(tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide[:, 8:16].repeat(2, 0).repeat(2, 1)).save(tmp_path / "b.png")
    data = load_images(tmp_path, image_size=4)
    assert data.images.shape == (2, 3, 4, 4)
    assert bool((data.images == 200).all())


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.fromarray(COLOUR[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.rot90(COLOUR[0], -1)).save(tmp_path / "b.png")
    data = load_images(tmp_path)
    assert data.image_shape == (3, 7, 5)
    assert torch.equal(data.images[0], data.images[1])


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (GREY, (1, 5, 7)),
        (COLOUR, (3, 5, 7)),
        (COLOUR.transpose(0, 3, 1, 2), (3, 5, 7)),
        (GREY[..., None], (1, 5, 7)),
    ],
)
def test_npy_layouts(tmp_path, array, shape):
    np.save(tmp_path / "faces.npy", array)
    data = load_images(tmp_path / "faces.npy")
    assert data.image_shape == shape and data.labels is None
    source = GREY[:, None] if shape[0] == 1 else COLOUR.transpose(0, 3, 1, 2)
    assert np.array_equal(data.images.numpy(), source)


def test_npy_labels_lie_beside_the_images(tmp_path):
    np.save(tmp_path / "faces.npy", GREY)
    np.save(tmp_path / "faces_labels.npy", LABELS)
    np.save(tmp_path / "images.npy", GREY)
    np.save(tmp_path / "labels.npy", LABELS[::-1])
    assert load_images(tmp_path / "faces.npy").labels.tolist() == LABELS.tolist()
    assert load_images(tmp_path).labels.tolist() == LABELS[::-1].tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_the_unit_interval_come_back_exactly(tmp_path, dtype):
    np.save(tmp_path / "a.npy", (GREY / 255).astype(dtype))
    assert np.array_equal(load_images(tmp_path / "a.npy").images[:, 0].numpy(), GREY)


def test_npz_and_its_dialects(tmp_path):
    np.savez(tmp_path / "own.npz", images=COLOUR, labels=LABELS, class_names=np.array(["a", "b", "c"]))
    np.savez(tmp_path / "keras.npz", x_train=GREY, y_train=LABELS, x_test=GREY[:2], y_test=LABELS[:2])
    np.savez(tmp_path / "medmnist.npz", train_images=GREY, train_labels=LABELS[:, None])
    np.savez(tmp_path / "declared.npz", images=GREY, labels=LABELS, num_classes=10)
    own = load_images(tmp_path / "own.npz")
    assert own.class_names == ("a", "b", "c") and own.labels.tolist() == LABELS.tolist()
    assert len(load_images(tmp_path / "keras.npz")) == 6
    assert len(load_images(tmp_path / "keras.npz", split="test")) == 2
    assert load_images(tmp_path / "medmnist.npz").labels.tolist() == LABELS.tolist()
    assert load_images(tmp_path / "declared.npz").num_classes == 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_and_folders(tmp_path, suffix):
    for part, count in (("train", 6), ("t10k", 2)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", GREY[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", LABELS[:count].astype(np.uint8))
    data = load_images(tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), GREY) and data.labels.tolist() == LABELS.tolist()
    assert len(load_images(tmp_path, split="test")) == 2
    assert len(load_images(tmp_path / f"t10k-images-idx3-ubyte{suffix}")) == 2


def hugging_face(**columns):
    import datasets

    names = ("cat", "cow", "dog")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    rows = {"picture": [Image.fromarray(p) for p in COLOUR], "kind": LABELS.tolist()} | columns
    return datasets.Dataset.from_dict(rows, features=features)


def test_hugging_face_dataset_from_disk(tmp_path):
    import datasets

    whole = hugging_face()
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "three").mkdir()
    whole.to_parquet(str(tmp_path / "three" / "train-00000-of-00001.parquet"))
    for source in ("one", "two", "three", "three/train-00000-of-00001.parquet"):
        data = load_images(tmp_path / source)
        assert np.array_equal(data.images.numpy().transpose(0, 2, 3, 1), COLOUR)
        assert data.class_names == ("cat", "cow", "dog") and data.labels.tolist() == LABELS.tolist()
    assert len(load_images(tmp_path / "two", split="test")) == 2
    refused('no split "val", only train, test', tmp_path / "two", split="val")


def test_hugging_face_array_features(tmp_path):
    import datasets

    features = datasets.Features({"pixels": datasets.Array2D((5, 7), "uint8"), "label": datasets.Value("int64")})
    rows = {"pixels": list(GREY), "label": LABELS.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    data = load_images(tmp_path / "set")
    assert np.array_equal(data.images[:, 0].numpy(), GREY) and data.labels.tolist() == LABELS.tolist()


def test_arrays_and_folders_are_converted_alike(tmp_path):
    (tmp_path / "folder").mkdir()
    for index, picture in enumerate(COLOUR):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{index}.png")
    np.save(tmp_path / "a.npy", COLOUR)
    options = {"image_size": 4, "channels": 1}
    assert torch.equal(
        load_images(tmp_path / "folder", **options).images, load_images(tmp_path / "a.npy", **options).images
    )


# --------------------------------------------------------------------------------------------------- refusals


def folder_with(content: Callable[[Path], object]) -> Callable[[Path], Path]:
    def build(tmp: Path) -> Path:
        folder = make_image_folder(tmp / "photos", per_class=2)
        content(folder)
        return folder

    return build


def truncate(path: Path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def array_file(name: str, array: object, **more) -> Callable[[Path], Path]:
    def build(tmp: Path) -> Path:
        if name.endswith(".npy"):
            np.save(tmp / name, array, allow_pickle=True)
        else:
            np.savez(tmp / name, images=array, **more)
        return tmp / name

    return build


def with_pixel(value: float) -> np.ndarray:
    array = GREY / 255
    array[3, 2, 2] = value
    return array


def cut(build: Callable[[Path], Path], keep: float = 0.5) -> Callable[[Path], Path]:
    def build_and_cut(tmp: Path) -> Path:
        path = build(tmp)
        truncate(path, keep)
        return path

    return build_and_cut


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda t: t / "nowhere", "does not exist"),
    "empty folder": (lambda t: (t / "e").mkdir() or t / "e", "is empty"),
    "empty class": (folder_with(lambda f: (f / "horse").mkdir()), "horse is empty"),
    "text among images": (
        folder_with(lambda f: (f / "flower/notes.txt").write_text("hi")),
        "notes.txt is not an image",
    ),
    "truncated png": (folder_with(lambda f: truncate(f / "china/0001.png")), "0001.png is damaged"),
    "empty png": (folder_with(lambda f: (f / "china/0001.png").write_bytes(b"")), "0001.png is not an image"),
    "16-bit png": (
        folder_with(lambda f: Image.fromarray(GREY[0].astype(np.uint16)).save(f / "china/0009.png")),
        "0009.png has more than 8 bits",
    ),
    "mixed sizes": (
        folder_with(lambda f: Image.fromarray(COLOUR[0]).save(f / "china/0009.png")),
        r"mixes image sizes .*0000.png is 64x64, .*0009.png is 7x5\): give an image size",
    ),
    "files beside classes": (
        folder_with(lambda f: (f / "labels.csv").write_text("")),
        "both subfolders and files such as labels.csv",
    ),
    "unknown file": (lambda t: (t / "a.csv").write_text("1,2") and t / "a.csv", "not a kind of file"),
    "nan": (array_file("a.npy", with_pixel(np.nan)), "image 3 has NaN"),
    "infinite": (array_file("a.npz", with_pixel(np.inf)), "image 3 has NaN or infinite"),
    "floats above one": (
        array_file("a.npy", GREY.astype(float)),
        r"pixels from \d.* to \d.*: expected floats in \[0, 1\]",
    ),
    "whole numbers above 255": (
        array_file("a.npy", GREY.astype(int) + 1000),
        "expected whole numbers from 0 to 255",
    ),
    "wrong shape": (array_file("a.npy", GREY[0]), r"images of shape \[5, 7\]"),
    "five channels": (
        array_file("a.npy", np.zeros((2, 8, 8, 5), np.uint8)),
        r"images of shape \[2, 8, 8, 5\]",
    ),
    "no images in array": (array_file("a.npy", np.zeros((0, 8, 8), np.uint8)), "holds no images"),
    "text array": (array_file("a.npy", np.array(["a", "b"])), "images of type"),
    "pickled array": (array_file("a.npy", np.array([{}, {}], dtype=object)), "pickled objects"),
    "truncated npy": (cut(array_file("a.npy", GREY)), "truncated or not a NumPy file"),
    "truncated npz": (cut(array_file("a.npz", GREY, labels=LABELS)), "truncated or not a NumPy file"),
    "empty npy": (cut(array_file("a.npy", GREY), 0), "truncated or not a NumPy file"),
    "npz without images": (
        lambda t: np.savez(t / "a.npz", weights=GREY) or t / "a.npz",
        r"\(weights\): call the array",
    ),
    "label count": (array_file("a.npz", GREY, labels=LABELS[:5]), r"6 images but labels of shape \[5\]"),
    "negative label": (array_file("a.npz", GREY, labels=LABELS - 1), "label -1 is out of range"),
    "label above declared": (
        array_file("a.npz", GREY, labels=LABELS, num_classes=2),
        "label 2 is out of range for 2 classes",
    ),
    "label far above the others": (
        array_file("a.npz", GREY, labels=LABELS * 50),
        "label 100 is out of range: only 3",
    ),
    "fractional label": (array_file("a.npz", GREY, labels=LABELS / 2), "expected whole numbers"),
    "label that is NaN": (array_file("a.npz", GREY, labels=LABELS + np.nan), "expected whole numbers"),
    "one-hot labels": (array_file("a.npz", GREY, labels=np.eye(3)[LABELS]), r"labels of shape \[6, 3\]"),
    "class name count": (
        array_file("a.npz", GREY, labels=LABELS, num_classes=3, class_names=["a"]),
        "1 class names for 3",
    ),
    "truncated idx": (
        lambda t: truncate(p := write_idx(t / "x-images-idx3-ubyte", GREY)) or p,
        "its header promises 210 bytes",
    ),
    "truncated gzip": (
        lambda t: truncate(p := write_idx(t / "x-images-idx3-ubyte.gz", GREY)) or p,
        "damaged gzip",
    ),
    "not idx": (
        lambda t: (t / "x-images-idx3-ubyte").write_text("no") and t / "x-images-idx3-ubyte",
        "not an idx file",
    ),
    "broken dataset": (
        lambda t: (t / "d").mkdir() or ((t / "d/state.json").write_text("{") and t / "d"),
        "cannot be opened by datasets",
    ),
    "broken parquet": (
        lambda t: (t / "a.parquet").write_text("no") and t / "a.parquet",
        "cannot be read as parquet",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_sources_are_refused_with_one_line(tmp_path, kind):
    build, match = REFUSALS[kind]
    refused(match, build(tmp_path))


def test_hugging_face_refusals(tmp_path):
    import datasets

    hugging_face(kind=[None, *LABELS[1:].tolist()]).save_to_disk(str(tmp_path / "unlabelled"))
    refused("record 0 has no label", tmp_path / "unlabelled")
    pictures = [None, *(Image.fromarray(p) for p in COLOUR[1:])]
    hugging_face(picture=pictures).save_to_disk(str(tmp_path / "missing"))
    refused("record 0 is not an image", tmp_path / "missing")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "text"))
    refused("no image column among text", tmp_path / "text")


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(DataError, match="image_size = 0"):
        load_images("digits", image_size=0)
    with pytest.raises(DataError, match="channels = 2"):
        load_images("digits", channels=2)
    refused('no split "test"', "digits", split="test")
    refused("label 2 is out of range for 2", array_file("a.npz", GREY, labels=LABELS)(tmp_path), num_classes=2)


# ------------------------------------------------------------------------------------------ the object itself


def test_digest_depends_on_every_pixel_and_label():
    images, labels = torch.from_numpy(GREY)[:, None], torch.from_numpy(LABELS)
    base = make_image_data(images, labels, name="a").sha256
    assert make_image_data(images.clone(), labels.clone(), name="b").sha256 == base
    changed = images.clone()
    changed[5, 0, 4, 6] ^= 1
    relabelled = labels.clone()
    relabelled[0] = 1
    others = [
        make_image_data(changed, labels, name="a"),
        make_image_data(images, relabelled, name="a"),
        make_image_data(images, labels, name="a", num_classes=4),
        make_image_data(images, name="a"),
        make_image_data(images.reshape(6, 1, 7, 5), labels, name="a"),
    ]
    assert len({base, *(o.sha256 for o in others)}) == 6


def test_split_is_a_public_permutation():
    data = load_images("digits")
    train, test = train_test_split(data)
    assert (len(train), len(test)) == (1437, 360)
    rows = torch.cat([train.images, test.images]).flatten(1).tolist()
    assert sorted(rows) == sorted(data.images.flatten(1).tolist())
    assert train.sha256 == train_test_split(data)[0].sha256 != train_test_split(data, seed=1)[0].sha256
    blank = make_image_data(torch.zeros_like(data.images), torch.arange(1797) % 10, name="blank")
    numbered = make_image_data(data.images, torch.arange(1797) % 10, name="numbered")
    held_out = [train_test_split(d)[1].labels.tolist() for d in (blank, numbered)]
    assert held_out[0] == held_out[1]


def test_split_edges():
    data = make_image_data(torch.from_numpy(GREY)[:, None], name="six")
    train, test = train_test_split(data, test_fraction=0)
    assert (len(train), len(test)) == (6, 0)
    assert train.images.data_ptr() == data.images.data_ptr() and train.sha256 == data.subset(torch.arange(6)).sha256
    assert [len(part) for part in train_test_split(data, test_fraction=0.5)] == [3, 3]
    with pytest.raises(DataError, match="leaves none to train on"):
        train_test_split(data, test_fraction=0.9)
    with pytest.raises(ValueError, match="test_fraction = 1"):
        train_test_split(data, test_fraction=1)


def test_pixels_survive_the_unit_interval():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit(levels)
    assert unit.dtype == torch.float32 and float(unit.min()) == 0 and float(unit.max()) == 1
    assert torch.equal(to_pixels(unit), levels)
    assert to_pixels(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]


def test_check_trainable():
    images, labels = torch.from_numpy(GREY)[:, None], torch.from_numpy(LABELS)
    check_trainable(make_image_data(images, labels, name="d"), batch_size=6, conditional=True)
    check_trainable(make_image_data(images, name="d"), batch_size=6, conditional=False)
    with pytest.raises(DataError, match="6 training images are fewer than the expected batch size of 7"):
        check_trainable(make_image_data(images, labels, name="d"), batch_size=7, conditional=True)
    with pytest.raises(DataError, match="no labels"):
        check_trainable(make_image_data(images, name="d"), batch_size=1, conditional=True)
    with pytest.raises(DataError, match="one class only"):
        check_trainable(make_image_data(images, labels * 0, name="d", num_classes=3), batch_size=1, conditional=True)


def test_construction_is_checked():
    with pytest.raises(DataError, match="expected uint8 images"):
        make_image_data(torch.zeros(2, 1, 4, 4), name="floats")
    with pytest.raises(DataError, match="expected uint8 images"):
        make_image_data(torch.zeros(2, 4, 4, dtype=torch.uint8), name="flat")

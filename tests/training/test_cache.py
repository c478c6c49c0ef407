"""Caching a data set: what is read, what is skipped, and that nothing done is ever lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_fusion.cli import main
from lib_fusion.errors import FusionError
from lib_fusion.training.cache import Cache, Text, write_cache
from lib_fusion.training.captioned import Captioned, PictureError, read_pictures, to_tensor
from tests.training.conftest import DEMO, MODELS, NAMES, write_pictures


def test_holds_what_the_encoders_give(data):
    cache = Cache(data.cache)
    assert [entry.name for entry in cache.entries] == [f"{name}-flat.webp" for name in NAMES]
    assert {entry.subset for entry in cache.entries} == {"a", "b"}
    assert len(list(data.cache.glob("shard-*"))) == 3
    latent, texts = cache.read(cache.entries[4])
    picture = next(p for p in read_pictures(data.pictures) if p.name == "car-flat.webp")
    expected = data.encoders.encode_picture(to_tensor(picture, 64))
    torch.testing.assert_close(latent, expected, atol=2e-3, rtol=2e-3)
    for text, state in zip(texts, data.encoders.encode_texts(["a car, flat drawing"]), strict=True):
        torch.testing.assert_close(text.states, state.states[0], atol=5e-3, rtol=2e-3)
    empty = data.encoders.encode_texts([""])[1].states[0]
    torch.testing.assert_close(cache.empty[1].states, empty, atol=5e-3, rtol=2e-3)
    assert cache.empty[1].pooled is None


def test_states_of_different_encoders_are_kept_apart(tmp_path, data):
    class Two:
        identity = {"models": ["a", "b"], "texts": ["1", "2"], "vae": "3"}

        def encode_picture(self, picture):
            return data.encoders.encode_picture(picture)

        def encode_texts(self, texts):
            first = torch.arange(len(texts) * 6, dtype=torch.float32).view(-1, 2, 3)
            return [Text(first), Text(first + 1)]

    write_cache(data.pictures, tmp_path / "cache", Two(), 64)
    cache = Cache(tmp_path / "cache")
    _, (first, second) = cache.read(cache.entries[3])
    assert torch.equal(second.states, first.states + 1)


def test_a_second_run_does_only_what_is_new(tmp_path, data):
    shutil.copytree(data.cache, tmp_path / "cache")
    (tmp_path / "cache" / "shard-00002.safetensors").unlink()
    pictures = write_pictures(tmp_path / "pictures", (*NAMES, "truck"))
    report = write_cache(pictures, tmp_path / "cache", data.encoders, 64, 4)
    assert (report.cached, report.new) == (10, 2)
    a, b = Cache(data.cache), Cache(tmp_path / "cache")
    for x, y in zip(a.entries, b.entries):
        assert torch.equal(a.read(x)[0], b.read(y)[0])


def test_broken_pictures_are_told_of_and_skipped(tmp_path, data):
    pictures = write_pictures(tmp_path / "pictures", ("dog", "fox"))
    (pictures / "fox-flat.webp").write_bytes((pictures / "fox-flat.webp").read_bytes()[:200])
    with (pictures / "metadata.jsonl").open("a") as file:
        for line in ('{"file_name": "no.png", "text": "x"}', '{"text": "x"}', "no json", "[1]",
                     '{"file_name": "../pictures/../../x.png", "text": "x"}',
                     '{"file_name": "dog-flat.webp", "text": "x", "repeats": 0}'):  # fmt: skip
            file.write(f"\n{line}")
    told = []
    report = write_cache(pictures, tmp_path / "cache", data.encoders, 64, tell=told.append)
    assert report.cached == 1
    assert len(report.skipped) == 7
    assert "fox-flat.webp: can't be read" in report.skipped[0]
    assert sum(text.startswith("skipped") for text in told) == 7


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda f: None, "no folder of pictures"),
        (lambda f: f.mkdir(), "no pictures there"),
        (lambda f: (f.mkdir(), shutil.copy(DEMO / "images/dog-flat.webp", f)), "neither metadata.jsonl nor a .txt"),
        (lambda f: (f.mkdir(), (f / "metadata.jsonl").write_text("{}")), "none of its pictures can be used"),
        (lambda f: (f.mkdir(), (f / "metadata.jsonl").write_text("")), "none of its pictures can be used"),
    ],
)
def test_a_data_set_without_captions_is_refused(tmp_path, data, prepare, says):
    prepare(tmp_path / "pictures")
    with pytest.raises(FusionError, match=says) as caught:
        write_cache(tmp_path / "pictures", tmp_path / "cache", data.encoders, 64)
    assert len(str(caught.value).splitlines()) == 1


def test_captions_beside_pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(DEMO / "images/dog-flat.webp", folder / "deeper")
    shutil.copy(DEMO / "images/cat-flat.webp", folder)
    (folder / "deeper" / "dog-flat.txt").write_text(" a dog\n")
    found = list(read_pictures(folder))
    assert [type(entry) for entry in found] == [PictureError, Captioned]
    assert (found[1].name, found[1].caption, found[1].subset) == ("deeper/dog-flat.webp", "a dog", "all")
    assert "cat-flat.webp: no caption" in str(found[0])


#: Texts by how an editor saves them, and what they say; None: not to be read.
SAVED = {
    "UTF-8": ("caf\u00e9 \u732b".encode(), "caf\u00e9 \u732b"),
    "UTF-8 with its mark": ("\ufeffcaf\u00e9".encode(), "caf\u00e9"),
    "ANSI": ("un caf\u00e9, \u201cbleu\u201d".encode("cp1252"), "un caf\u00e9, \u201cbleu\u201d"),
    "UTF-16": ("caf\u00e9 \u732b".encode("utf-16"), "caf\u00e9 \u732b"),
    "UTF-16, the other order": ("\ufeffa cat".encode("utf-16-be"), "a cat"),
    "UTF-16 without its mark": ("a cat".encode("utf-16-le"), "a cat"),
    "another code page": ("\u4e00\u53ea\u732b\u5750\u7740".encode("gbk"), None),
    "no text": (b"\x81\0\xff", None),
    "half of UTF-16": ("a cat".encode("utf-16")[:-1], None),
}


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_captions_as_editors_save_them(tmp_path, how, form):
    """One that can't be read is reported by its name; the others are read all the same."""
    data, says = SAVED[how]
    files = {"a.png": b"", "a.txt": b"a dog", "b.png": b"", "b.txt": data, "c.png": b"", "c.txt": b"a fox"}
    source = tmp_path / form
    if form == "tar":
        source = tmp_path / "set.TAR"
        with tarfile.open(source, "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        source.mkdir()
        for name, content in files.items():
            (source / (name if name != "c.txt" else "c.TXT")).write_bytes(content)
    first, found, last = read_pictures(source)
    assert (first.caption, last.caption) == ("a dog", "a fox")
    if says is None:
        assert "b.txt: neither UTF-8 nor UTF-16 nor ANSI; save it as UTF-8" in str(found)
    else:
        assert found.caption == says


@pytest.mark.parametrize("how", SAVED)
def test_metadata_as_editors_save_it(tmp_path, how):
    _, says = SAVED[how]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    encodings = {"UTF-8 with its mark": "utf-8-sig", "ANSI": "cp1252", "UTF-16": "utf-16", "another code page": "gbk",
                 "UTF-16, the other order": "utf-16-be", "UTF-16 without its mark": "utf-16-le"}  # fmt: skip
    encoding = encodings.get(how, "utf-8")
    caption = says or "\u4e00\u53ea\u732b\u5750\u7740" * 9
    line = json.dumps({"file_name": "sub\\a.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{line}\r\n".encode(encoding))
    if how == "another code page":
        with pytest.raises(FusionError, match=r"metadata\.jsonl: neither UTF-8 nor UTF-16 nor ANSI"):
            list(read_pictures(tmp_path))
        return
    (found,) = read_pictures(tmp_path)
    assert (found.name, found.caption) == ("sub/a.png", caption)


def test_a_caption_may_hold_unicodes_ends_of_lines(tmp_path):
    (tmp_path / "a.png").touch()
    text = json.dumps({"file_name": "a.png", "text": "a\u2028b\u0085c"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(text, "utf-8")
    assert [found.caption for found in read_pictures(tmp_path)] == ["a\u2028b\u0085c"]


def test_webdataset(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, content in (("x/0001.webp", (DEMO / "images/dog-flat.webp").read_bytes()), ("x/0001.txt", b"a dog"),
                              ("x/0001.json", b"{}"), ("x/0002.png", b"not a picture"), ("x/0002.txt", b"a cat"),
                              ("x/0003.jpg", b"")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = list(read_pictures(tmp_path / "set.tar"))
    assert [p.name for p in found if isinstance(p, Captioned)] == ["x/0001", "x/0002"]
    assert to_tensor(found[0], 64).shape == (3, 64, 64)
    with pytest.raises(PictureError, match="x/0002"):
        to_tensor(found[1], 64)
    (tmp_path / "broken.tar").write_bytes((tmp_path / "set.tar").read_bytes()[:700])
    with pytest.raises(FusionError, match="tar"):
        list(read_pictures(tmp_path / "broken.tar"))


@pytest.mark.parametrize(
    ("size", "resolution", "shape"),
    [((100, 60), 64, (64, 64)), ((60, 100), 64, (64, 64)), ((101, 63), 0, (56, 96)), ((64, 64), 0, (64, 64))],
)
def test_sizes(size, resolution, shape):
    buffer = io.BytesIO()
    Image.new("RGBA", size, (255, 0, 0, 255)).save(buffer, "PNG")
    x = to_tensor(Captioned("x", "", buffer.getvalue()), resolution)
    assert x.shape == (3, *shape)
    assert torch.equal(x[:, 5, 5], torch.tensor([1.0, -1.0, -1.0]))


def test_transparent_is_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(buffer, "PNG")
    assert torch.equal(to_tensor(Captioned("x", "", buffer.getvalue()), 0), torch.ones(3, 16, 16))


def test_another_data_set_or_folder_is_refused(tmp_path, data):
    with pytest.raises(FusionError, match="another resolution"):
        write_cache(data.pictures, data.cache, data.encoders, 128)
    with pytest.raises(FusionError, match="not a cache"):
        write_cache(data.pictures, data.pictures, data.encoders, 64)
    shutil.copytree(data.cache, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(FusionError, match=r"shard-00001.safetensors: broken; delete it"):
        Cache(tmp_path / "cache")
    (tmp_path / "cache" / "index.json").write_text("{}")
    with pytest.raises(FusionError, match="no cache there"):
        Cache(tmp_path / "cache")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small tmpfs can't be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=False)


def test_disk_full_loses_nothing(small_disk: Path, data):
    cache = small_disk / "cache"
    with pytest.raises(FusionError, match=r"can't be written .*pictures are cached and stay") as caught:
        write_cache(data.pictures, cache, data.encoders, 64, shard_size=2)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(cache.glob("*.partial"))
    before = Cache(cache).entries
    assert 0 < len(before) < len(NAMES)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    report = write_cache(data.pictures, cache, data.encoders, 64, shard_size=2)
    assert (report.cached, report.new) == (len(NAMES), len(NAMES) - len(before))
    assert Cache(cache).entries[: len(before)] == before


def test_command(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", ("dog", "bus"))
    argv = ["cache", "--source", str(pictures), "--cache", str(tmp_path / "cache"), "--resolution", "64",
            "--model", MODELS[0], "--model", MODELS[1]]  # fmt: skip
    assert main(argv) == 0
    assert "2 pictures, 2 of them new, 0 skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["models"] == ["animals", "vehicles"]
    assert main([*argv[:4], str(tmp_path / "other"), "--resolution", "63", *argv[7:]]) == 2
    assert "divisible by 8" in capsys.readouterr().err

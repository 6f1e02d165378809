"""Training data of conversions: pictures and clips, folders and shards, size buckets, for every family."""

import gzip
import io
import json
import sys
import tarfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sweep import keep
from tiny_pipelines import save_flux, save_sd, save_sd3, save_sdxl, save_wan

from dit_accel.cli.app import main
from dit_accel.conversion.data import media
from dit_accel.conversion.data.dataset import find_data
from dit_accel.conversion.data.samples import Samples, read_sample
from dit_accel.conversion.recipes.capture import unconditional
from dit_accel.conversion.trainer import Trainer
from dit_accel.install.installation import denoisers

SAVE = {"flux": save_flux, "sd": lambda x: save_sd(x, "epsilon"), "sdxl": save_sdxl, "sd3": save_sd3, "wan": save_wan}
WAN = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread is faster for models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of tiny pipelines that draw 16×16 in two steps, made on first access."""

    class Made(dict):
        def __missing__(self, name):
            folder = self[name] = SAVE[name](tmp_path_factory.mktemp(name))
            size = {"height": 16, "width": 16} | ({"num_frames": 5} if name == "wan" else {})
            (folder / "defaults.json").write_text(json.dumps({"num_inference_steps": 2, **size}))
            if name == "wan":
                config = folder / "vae/config.json"
                config.write_text(json.dumps(json.loads(config.read_text()) | WAN))
            return folder

    return Made()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na green square\n")
    return path


def convert(pipeline, out, *more, attn="gna:window=2", command="convert"):
    """Run the command and return its exit status."""
    given = [command, "--pipeline", str(pipeline), "--out", str(out), "--device", "cpu"]
    given += ["--attn", attn, "--steps", "1", "--batch", "2", "--report", "0"] if command == "convert" else []
    with pytest.raises(SystemExit) as stopped:
        main([*given, *map(str, more)])
    return stopped.value.code


def made(out):
    """Sample files by number."""
    return {path.stem: path for path in sorted((out / "samples").glob("*.safetensors"))}


def gray(level):
    """A gray level of 0 to 255 in a pipeline's range [-1, 1]."""
    return level / 127.5 - 1


def picture(path, height=16, width=16, color=(0, 90, 120), caption="a red circle"):
    Image.new("RGB", (width, height), color).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def gif(path, count, height=16, width=16, milliseconds=100, caption="a red circle"):
    """Write a clip of gray frames 0, 10, 20, …"""
    frames = [Image.new("L", (width, height), 10 * i) for i in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def movie(path, count, height=16, width=32, caption="a green square"):
    import imageio.v2

    codec = "libvpx" if path.suffix == ".webm" else "libx264"
    with imageio.v2.get_writer(path, fps=8, macro_block_size=1, codec=codec) as writer:
        for i in range(count):
            writer.append_data(np.full((height, width, 3), 10 * i, np.uint8))
    path.with_suffix(".txt").write_text(caption)


def bytes_of(color=(0, 90, 120), kind="PNG", height=16, width=16):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def shard(path, samples):
    """Write a shard. samples: content by suffix, by key."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@torch.no_grad()
def latents_of(pipeline, pixels):
    """Latents from the inverse of the pipeline's decoding."""
    vae = DiffusionPipeline.from_pretrained(pipeline).vae
    latents = vae.encode(pixels).latent_dist.mode()
    if pixels.dim() == 5:
        mean, std = (torch.tensor(WAN[x]).view(1, -1, 1, 1, 1) for x in ("latents_mean", "latents_std"))
        return (latents - mean) / std
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@pytest.mark.parametrize("which", keep(SAVE, lambda which: which in ("flux", "sdxl", "wan")))
def test_every_family_trains_on_data_and_on_own_drawings(pipelines, prompts, tmp_path, which):
    """Latents are the autoencoder's with the pipeline's scaling; the loss is finite."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        if which == "wan":
            gif(data / f"{i}.gif", 5)
        else:
            picture(data / f"{i}.png")
    for name, more in (("own", ("--data", data)), ("drawn", ("--data-free", "--prompts", prompts, "--samples", 2))):
        assert convert(pipelines[which], tmp_path / name, *more) == 0
        about = json.loads((tmp_path / name / "convert.json").read_text())
        assert about["status"] == "complete" and 0 < about["history"][0]["flow"] < 100
        assert len(made(tmp_path / name)) == 2
    sample = read_sample(made(tmp_path / "own")["000000"])
    conditions = sample.conditions.tensors
    if which == "wan":
        pixels = torch.stack([torch.full((3, 16, 16), gray(10 * i)) for i in range(5)], 1)[None]
    else:
        pixels = torch.tensor([gray(x) for x in (0, 90, 120)]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    wanted = latents_of(pipelines[which], pixels)
    if which == "flux":
        wanted = DiffusionPipeline.from_pretrained(pipelines["flux"])._pack_latents(wanted, *wanted.shape)
    torch.testing.assert_close(sample.latents, wanted, atol=1e-4, rtol=1e-4)
    keys = {
        "flux": {"pooled_projections", "img_ids", "txt_ids"}, "sd": set(), "sd3": {"pooled_projections"},
        "sdxl": {"added_cond_kwargs/text_embeds", "added_cond_kwargs/time_ids"}, "wan": set(),
    }[which]  # fmt: skip
    assert set(conditions) == keys | {"encoder_hidden_states"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips of every format: long, short, truncated and without a caption; and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    gif(folder / "a.gif", 13)
    movie(folder / "b.mp4", 9)
    movie(folder / "c.webm", 5)
    movie(folder / "d.mkv", 4)
    (folder / "e.mov").write_bytes((folder / "b.mp4").read_bytes()[:700])
    (folder / "e.txt").write_text("a circle")
    gif(folder / "f.gif", 9, caption=None)
    picture(folder / "g.png")
    return folder


def test_unusable_clips_are_skipped_and_counted(pipelines, clips, tmp_path, capsys):
    assert convert(pipelines["wan"], tmp_path, "--data", clips) == 0
    output = capsys.readouterr().out
    for line in (
        "Skipped 1 clips that are too short", "Skipped 1 clips that cannot be read",
        "Skipped 1 clips without a caption", "Skipped 1 pictures: WanPipeline draws clips",
    ):  # fmt: skip
        assert line in output
    skipped = json.loads((tmp_path / "samples/skipped.json").read_text())
    assert list(skipped) == [str(clips / "d.mkv"), str(clips / "e.mov")]
    assert "4 frames, expected 5 or more" in skipped[str(clips / "d.mkv")]
    assert list(made(tmp_path)) == ["000000", "000001", "000002"]
    assert {tuple(read_sample(path).latents.shape) for path in made(tmp_path).values()} == {(1, 4, 2, 2, 2)}
    wanted = latents_of(pipelines["wan"], clip_of([0, 30, 60, 90, 120]))  # evenly spaced from first to last
    torch.testing.assert_close(read_sample(made(tmp_path)["000000"]).latents, wanted, atol=1e-4, rtol=1e-4)


def clip_of(levels):
    return torch.stack([torch.full((3, 16, 16), gray(level)) for level in levels], 1)[None]


@pytest.mark.parametrize("by", ["option", "defaults"])
def test_frame_rate_samples_centered_frames(pipelines, tmp_path, by, capsys):
    """The file has 13 frames at 10 per second: 5 per second takes every second one, 5 in the middle."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    gif(data / "a.gif", 13)
    gif(data / "b.gif", 8)
    pipeline, more = pipelines["wan"], ("--fps", 5)
    if by == "defaults":
        pipeline, more = tmp_path / "pipeline", ()
        pipeline.mkdir()
        for part in pipelines["wan"].iterdir():
            (pipeline / part.name).symlink_to(part)
        (pipeline / "defaults.json").unlink()
        defaults = json.loads((pipelines["wan"] / "defaults.json").read_text())
        (pipeline / "defaults.json").write_text(json.dumps({**defaults, "fps": 5}))
    assert convert(pipeline, out, "--data", data, *more) == 0
    wanted = latents_of(pipelines["wan"], clip_of([20, 40, 60, 80, 100]))
    torch.testing.assert_close(read_sample(made(out)["000000"]).latents, wanted, atol=1e-4, rtol=1e-4)
    assert "4 frames at 5 per second, expected 5" in (out / "samples/skipped.json").read_text()


def test_pictures_go_to_the_bucket_of_their_aspect_ratio(pipelines, tmp_path, capsys, monkeypatch):
    """A batch has one size, and its kind distinguishes two sizes with equal shapes."""
    seen, draw = [], Trainer._batch
    monkeypatch.setattr(Trainer, "_batch", lambda *args: seen.append(draw(*args)) or seen[-1])
    data = tmp_path / "data"
    data.mkdir()
    sizes = {"a": (40, 80), "b": (80, 40), "c": (50, 50), "d": (500, 700), "e": (8, 8)}
    for name, size in sizes.items():
        picture(data / f"{name}.png", *size)
    out = tmp_path / "out"
    more = [part for size in ("16x32", "32x16", "32x32", "16x16") for part in ("--size", size)]
    assert (
        convert(pipelines["flux"], out, "--data", data, *more, "--steps", 4, "--recipe", "clear", attn="gna:window=8")
        == 0
    )
    kinds = [kind[0] for kind in Samples(list(made(out).values())).kinds]
    assert kinds == ["16×32", "32×16", "32×32", "32×32", "16×16"]
    assert [read_sample(path).latents.shape[1] for path in made(out).values()] == [32, 32, 64, 64, 16]
    first = json.loads((out / "convert.json").read_text())["history"][0]
    assert first["prediction"] < 1e-10  # a full window is dense attention, on every grid
    shapes = {batch.kind: batch.latents.shape for batch in seen}
    assert len({kind[0] for kind in shapes}) == len(shapes) == 4 and len(set(shapes.values())) < 4
    assert "gna on 16×32, 4×8 tokens: window 8x8 becomes 4x8" in capsys.readouterr().out
    more = (*more[:-2], "--steps", 4, "--recipe", "clear")
    assert convert(pipelines["flux"], out, "--data", data, *more, attn="gna:window=8") == 2
    assert "sizes" in capsys.readouterr().err  # another request


def test_clips_go_to_the_longest_bucket_they_fill(pipelines, clips, tmp_path):
    more = ("--size", "16x32x5", "--size", "16x32x9", "--size", "32x16x1")
    assert convert(pipelines["wan"], tmp_path, "--data", clips, *more) == 0
    kinds = [kind[0] for kind in Samples(list(made(tmp_path).values())).kinds]
    # d.mkv has 4 frames
    assert kinds == ["16×32, 9 frames", "16×32, 9 frames", "16×32, 5 frames", "32×16, 1 frames"]


def test_teacher_draws_every_prompt_in_every_size(pipelines, prompts, tmp_path):
    more = ("--data-free", "--prompts", prompts, "--samples", 4, "--size", "16x16", "--size", "16x32")
    assert convert(pipelines["sd"], tmp_path, *more) == 0
    found = set()
    for path in made(tmp_path).values():
        sample = read_sample(path)
        found.add((tuple(sample.latents.shape[2:]), float(sample.conditions.tensors["encoder_hidden_states"].sum())))
    assert len(found) == 4 and {size for size, _ in found} == {(8, 8), (8, 16)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two complete shards with an unreadable picture, a missing and a damaged caption; and a shard that is truncated
    within its second picture."""
    folder = tmp_path_factory.mktemp("shards")
    shard(folder / "s-000.tar", {
        "a": {"jpg": bytes_of(kind="JPEG"), "txt": "a red circle"},
        "b": {"png": bytes_of(), "json": json.dumps({"text": "a red circle"})},
        "c": {"png": b"torn", "txt": "a red circle"},
        "d": {"webp": bytes_of(kind="WEBP"), "json": json.dumps({"caption": "a green square"})},
    })  # fmt: skip
    shard(folder / "s-001.tar", {
        "a": {"png": bytes_of()},
        "b": {"png": bytes_of(), "json": "{"},
        "c/d": {"depth.png": bytes_of((0, 0, 0)), "png": bytes_of(), "txt": "a square"},
        "e": {"mp4": b"", "txt": "moving"},
    })  # fmt: skip
    whole = shard(folder / "s-002.tar", {
        "a": {"txt": "a circle", "png": bytes_of()}, "b": {"txt": "a circle", "png": bytes_of(height=512, width=512)},
    })  # fmt: skip
    whole.write_bytes(whole.read_bytes()[:3000])
    return folder


@pytest.mark.parametrize("damage", ["header", "end", "packed"])
def test_truncated_shard_gives_its_first_samples(tmp_path, damage):
    path = shard(tmp_path / "a.tar", {name: {"png": bytes_of(), "txt": "a circle"} for name in "abcdef"})
    whole = path.read_bytes()
    if damage == "header":  # Python's tarfile takes it for the end
        path.write_bytes(whole[:4096] + b"\xff" * 512 + whole[4608:])
    elif damage == "end":
        path.write_bytes(whole[:4096])
    else:
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress(whole)[:300])
    data = find_data(path, False, "FluxPipeline")
    names = "".join(example.name[-1] for example in data)
    assert names and names != "abcdef" and "abcdef".startswith(names)
    assert list(data.broken) == [str(path)]
    assert "cannot be read to its end" in data.broken[str(path)]


def test_broken_samples_of_shards_are_skipped_and_counted(pipelines, shards, tmp_path, capsys):
    assert convert(pipelines["flux"], tmp_path, "--data", shards / "s-{000..002}.tar") == 0
    output = capsys.readouterr().out
    for line in (
        "Skipped 1 pictures that cannot be read", "Skipped 1 pictures without a caption",
        "Skipped 1 clips: FluxPipeline draws pictures", "Skipped 2 shards or samples that cannot be read",
    ):  # fmt: skip
        assert line in output
    assert list(made(tmp_path)) == ["00000-000000", "00000-000001", "00000-000003", "00001-000002", "00002-000000"]
    skipped = json.loads((tmp_path / "samples/skipped.json").read_text())
    assert {name.removeprefix(f"{shards}/") for name in skipped} == {"s-000.tar:c", "s-001.tar:b", "s-002.tar"}
    first, second = (read_sample(made(tmp_path)[name]).latents for name in ("00000-000001", "00001-000002"))
    assert torch.equal(first, second)  # not the depth map


def test_preparation_resumes_and_remakes_damaged_samples(pipelines, shards, tmp_path):
    """Only missing samples and those of another origin are made, with the same numbers."""
    assert convert(pipelines["flux"], tmp_path, "--data", shards) == 0
    files = made(tmp_path)
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["00000-000003"].unlink()
    files["00001-000002"].write_bytes(files["00000-000000"].read_bytes())
    files["00002-000000"].write_bytes(b"torn")
    assert convert(pipelines["flux"], tmp_path, "--data", shards) == 0
    again = {name: path.stat().st_mtime_ns for name, path in made(tmp_path).items()}
    assert sorted(again) == sorted(times)
    assert {name for name in again if again[name] == times[name]} == {"00000-000000", "00000-000001"}


def test_clips_in_shards_are_trained_and_evaluated_on(pipelines, tmp_path):
    gif(tmp_path / "a.gif", 9)
    content = (tmp_path / "a.gif").read_bytes()
    shard(tmp_path / "a.tar", {name: {"gif": content, "txt": "a red circle"} for name in "ab"})
    assert convert(pipelines["wan"], tmp_path / "student", "--data", tmp_path / "a.tar") == 0
    more = ("--attn", tmp_path / "student", "--data", tmp_path / "a.tar", "--size", "16x16x5", "--size", "32x16x9")
    assert convert(pipelines["wan"], tmp_path / "o", *more, "--levels", 2, "--pictures", 0, command="evaluate") == 0
    about = json.loads((tmp_path / "o/evaluate.json").read_text())
    assert about["samples"] == 2 and about["sizes"] == ["16×16, 5 frames", "32×16, 9 frames"]


def test_full_disk_is_not_reported_as_unreadable_clips(pipelines, tmp_path, monkeypatch, capsys):
    """ffmpeg reads a clip of a shard from a temporary file."""
    gif(tmp_path / "a.gif", 9)
    shard(tmp_path / "a.tar", {name: {"gif": (tmp_path / "a.gif").read_bytes(), "txt": "a circle"} for name in "ab"})

    (tmp_path / "clip.gif").symlink_to("/dev/full")
    monkeypatch.setattr(media.tempfile, "TemporaryDirectory", lambda: nullcontext(tmp_path))
    assert convert(pipelines["wan"], tmp_path / "o", "--data", tmp_path / "a.tar") == 1
    assert f"cannot write {tmp_path}/clip.gif: the disk is full (" in capsys.readouterr().err


def test_missing_webdataset_is_reported(pipelines, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert convert(pipelines["flux"], tmp_path, "--data", shards / "s-000.tar") == 2
    assert "pip install 'dit-accel[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "which, more, message",
    [
        ("flux", ("--size", "32"), "--size takes HEIGHTxWIDTH"),
        ("flux", ("--size", "0x32"), "got '0x32'"),
        ("flux", ("--size", "32x32", "--height", "32"), "not both"),
        ("flux", ("--size", "32x32", "--size", "32x32"), "given twice"),
        ("flux", ("--size", "32x32", "--size", "30x32"), "got 30×32; nearest: 28×32 or 32×32"),
        ("flux", ("--size", "32x32x5"), "FluxPipeline draws pictures, got a size of 5 frames"),
        ("flux", ("--frames", "5"), "FluxPipeline draws pictures, got a size of 5 frames"),
        ("flux", ("--fps", "8"), "--fps applies to clips given with --data"),
        ("wan", ("--size", "16x16x6"), "nearest: 5 or 9"),
        ("wan", ("--data", "nowhere", "--fps", "0"), "--fps must be above 0"),
        ("flux", ("--attn", "gna:window=2x2x2"), "gna does not fit 16×16: window (2, 2, 2) has 3 values"),
        ("flux", ("--attn", "gna", "--size", "32x32", "--size", "64x16"), "such as --attn gna:window=3x3,stride=1x1"),
    ],
)  # fmt: skip
def test_invalid_sizes_are_refused_before_any_work(pipelines, tmp_path, which, more, message, capsys):
    assert convert(pipelines[which], tmp_path, *(more if "--data" in more else ("--data-free", *more))) == 2
    assert message in capsys.readouterr().err
    assert not made(tmp_path)


@pytest.mark.parametrize(
    "which, data, message",
    [
        ("flux", "clips", "FluxPipeline draws pictures, and"),
        ("wan", "pictures", "WanPipeline draws clips, and"),
        ("wan", "shards", "WanPipeline draws clips, and"),
        ("flux", "nothing.tar", "there is no folder or .tar file"),
        ("flux", "s-{0..2}.tar", "2 of the 3 shards of"),
        ("flux", "s-{0..", "is not a brace pattern"),
        ("flux", "file.zip", "takes a folder, a .tar file or a brace pattern of .tar files"),
        ("flux", "empty.tar", "no picture with a caption (0 without)"),
        ("flux", "torn.tar", "none of 1 shards can be read, first error"),
        ("flux", "both", "has both .tar shards (a.tar, …) and files of examples"),
        ("wan", "short", "none of 1 clips can be read, first error"),
    ],
)
def test_unusable_data_is_refused_before_any_work(pipelines, tmp_path, which, data, message, capsys):
    for name in ("clips", "pictures", "shards", "both", "short"):
        (tmp_path / name).mkdir()
    gif(tmp_path / "clips/a.gif", 5)
    gif(tmp_path / "short/a.gif", 2)
    for folder in ("pictures", "both"):
        picture(tmp_path / folder / "a.png")
    for path in ("shards/a.tar", "both/a.tar", "s-0.tar"):
        shard(tmp_path / path, {"a": {"png": bytes_of(), "txt": "a circle"}})
    shard(tmp_path / "empty.tar", {})
    for name in ("torn.tar", "file.zip"):
        (tmp_path / name).write_bytes(b"nothing of this kind" * 100)
    assert convert(pipelines[which], tmp_path / "out", "--data", tmp_path / data) == 2
    assert message in capsys.readouterr().err
    assert not made(tmp_path / "out")


@pytest.mark.parametrize("family, key", [("wan", "encoder_hidden_states"), ("sdxl", "added_cond_kwargs/text_embeds")])
def test_caption_dropout_uses_the_empty_prompt(pipelines, prompts, tmp_path, monkeypatch, family, key):
    """Its conditions are those of guidance, zeros for SDXL; the other samples keep their captions."""
    seen, draw = [], Trainer._batch

    def note(trainer, batch, number):
        made = draw(trainer, batch, number)
        seen.extend(zip(batch, made.conditions.tensors[key], strict=True))
        return made

    monkeypatch.setattr(Trainer, "_batch", note)
    more = ("--data-free", "--prompts", prompts, "--samples", 2, "--caption-dropout", "0.5", "--steps", "6")
    assert convert(pipelines[family], tmp_path, *more) == 0
    pipe = DiffusionPipeline.from_pretrained(pipelines[family])
    call = json.loads((pipelines[family] / "defaults.json").read_text())
    empty = unconditional(pipe, next(iter(denoisers(pipe).values())), call).tensors[key][0]
    assert family == "wan" or not empty.any()
    own = [read_sample(path).conditions.tensors[key][0] for path in made(tmp_path).values()]
    assert not any(torch.equal(x, empty) for x in own)
    dropped = [torch.equal(found, empty) for _, found in seen]
    assert 3 <= sum(dropped) <= 9 and len(dropped) == 12
    assert all(gone or torch.equal(found, own[i]) for (i, found), gone in zip(seen, dropped, strict=True))


def test_empty_caption_of_another_length_is_refused(pipelines, prompts, tmp_path):
    more = ("--data-free", "--prompts", prompts, "--samples", 2)
    assert convert(pipelines["sd"], tmp_path, *more) == 0
    samples = Samples(list(made(tmp_path).values()))
    conditions = samples[0].conditions
    samples.drop_captions({samples.kinds[0][0]: conditions})
    conditions.tensors = {name: x[:, :-1] for name, x in conditions.tensors.items()}
    with pytest.raises(ValueError, match="--caption-dropout: conditions of the empty prompt have the shapes"):
        samples.drop_captions({samples.kinds[0][0]: conditions})

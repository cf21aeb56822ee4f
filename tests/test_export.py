"""Weights out: exported networks, run in torch, give our features; what goes with them; what is refused."""

import json
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_reference as reference

from salcl_jax.weights import outgoing, targets

ROOT = Path(__file__).parents[1]
SIZES = ((224, 224), (97, 131))
pytestmark = pytest.mark.xdist_group("weights")


class Run:
    """A run of random weights, and its features, computed once."""

    def __init__(self, **model):
        self.c = reference.small_config(**model)
        self.state = reference.random_state(self.c)
        self.run, self.known = reference.run_of(self.c, self.state), {}

    def features(self, size, branch="online"):
        mark = "target_" if branch == "target" else ""
        params, stats = (getattr(self.state, f"{mark}{f}")["encoder"] for f in ("params", "batch_stats"))
        if (size, branch) not in self.known:
            found = reference.features(self.c, params, stats, reference.images(*size))
            self.known[size, branch] = found
        return self.known[size, branch]


@pytest.fixture(scope="module")
def runs():
    known = {}

    def get(name, **model):
        key = (name, *model.items())
        if key not in known:
            known[key] = Run(name=name, **model)
        return known[key]

    return get


def write(run, to, out, **how):
    outgoing.export(run.run, to, str(out), **how)
    return out


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_openmmlab_weights_give_our_features(name, size, runs, tmp_path):
    """mmdet takes torchvision's names at any width."""
    torch = pytest.importorskip("torch")
    run = runs(name)
    file = write(run, "mmdet", tmp_path / "w.pth")
    model = reference.classes()["ResNet"](name, 8)
    model.load_state_dict(torch.load(file, weights_only=True))  # strict
    reference.assert_close(reference.run_torch(model, reference.images(*size)), run.features(size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers_loads_the_folder_and_gives_our_features(name, size, runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    pytest.importorskip("torch")
    run = runs(name)
    folder = write(run, "huggingface", tmp_path / "hf")
    model, info = transformers.AutoModel.from_pretrained(str(folder), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # AutoBackbone.from_pretrained looks for names on the hub only; it would choose this class.
    assert type(transformers.AutoBackbone.from_config(model.config)) is transformers.ResNetBackbone
    stages = list(reference.STAGES)
    backbone = transformers.ResNetBackbone.from_pretrained(str(folder), out_features=stages)

    def forward(x):
        found = model(x, output_hidden_states=True)
        stages = dict(zip(("stem", *reference.STAGES), found.hidden_states, strict=True))
        maps = dict(zip(reference.STAGES, backbone(x).feature_maps, strict=True))
        assert all((maps[stage] == stages[stage]).all() for stage in maps)
        return stages | {"pooled": found.pooler_output[:, :, 0, 0]}

    theirs = reference.run_torch(types.SimpleNamespace(eval=lambda: forward), reference.images(*size))
    reference.assert_close(theirs, run.features(size))


def test_transformers_prepares_photos_as_training_does(runs, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    folder = write(runs("resnet18"), "huggingface", tmp_path / "hf", size=64)
    prepare = transformers.AutoImageProcessor.from_pretrained(str(folder))
    photo = np.full((100, 150, 3), 255, np.uint8)
    found = np.asarray(prepare(photo, return_tensors="np")["pixel_values"])
    assert found.shape == (1, 3, 64, 64)
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found[0, :, 32, 32], white, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_detectron2_weights_give_our_features(size, runs, tmp_path):
    torch = pytest.importorskip("torch")
    run = runs("resnet50")
    with open(write(run, "detectron2", tmp_path / "w.pkl"), "rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True and content["__author__"]
    model = reference.classes()["Detectron2"](8)
    given = {name: torch.from_numpy(x) for name, x in content["model"].items()}
    lacking, unknown = model.load_state_dict(given, strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in lacking)
    reference.assert_close(reference.run_torch(model, reference.images(*size)), run.features(size))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_weights_load_strictly_and_the_target_branch_can_be_chosen(suffix, runs, tmp_path):
    torch = pytest.importorskip("torch")
    run = runs("resnet18", width=64)
    file = write(run, "torchvision", tmp_path / f"w{suffix}", branch="target")
    if suffix == ".pth":
        given = torch.load(file, weights_only=True)
    else:
        given = pytest.importorskip("safetensors.torch").load_file(file)
    model = reference.classes()["ResNet"]("resnet18", 64)
    model.load_state_dict(given)
    assert sum(x.numel() for x in model.parameters()) == 11_689_512 - 513_000  # less the classifier
    assert model.bn1.num_batches_tracked == 7
    ours = run.features((33, 47), "target")
    reference.assert_close(reference.run_torch(model, reference.images(33, 47)), ours)


def test_timm_weights_of_a_vit_give_our_features(runs, tmp_path):
    pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    run = runs("vit_ti16")
    model = reference.classes()["ViT"](192, 12, 3, 36)
    model.load_state_dict(load_file(write(run, "timm", tmp_path / "w.safetensors", size=96)))
    theirs = reference.run_torch(model, reference.images(96, 96))
    reference.assert_close(theirs, run.features((96, 96)))


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_symmetric_as_in_torch(size, runs, tmp_path):
    """XLA's SAME would put the odd pixel of a strided convolution behind: other features at 224."""
    torch = pytest.importorskip("torch")
    run, pictures = runs("resnet18"), reference.images(*size)
    weights = torch.load(write(run, "mmdet", tmp_path / "w.pth"), weights_only=True)
    x = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    x = torch.nn.functional.conv2d(x, weights["conv1.weight"], stride=2, padding=3)
    norm = [weights[f"bn1.{end}"] for end in ("running_mean", "running_var", "weight", "bias")]
    x = torch.relu(torch.nn.functional.batch_norm(x, *norm))
    pooled = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    reference.assert_close({"conv1": x, "stem": pooled}, run.features(size))
    kernel = run.state.params["encoder"]["stem"]["conv"]["kernel"]
    pads = jax.lax.padtype_to_pads(size, kernel.shape[:2], (2, 2), "SAME")
    shifted = any(before != after for before, after in pads)
    assert shifted == (size == (224, 224))  # the trap: it opens at even sizes only
    if shifted:
        dims = ("NHWC", "HWIO", "NHWC")
        same = jax.lax.conv_general_dilated(
            jnp.asarray(pictures), kernel, (2, 2), "SAME", dimension_numbers=dims
        )
        ours = jax.lax.conv_general_dilated(
            jnp.asarray(pictures), kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=dims
        )
        assert np.abs(same - ours).max() > 0.1 * np.abs(ours).max()


# ---------------------------------------------------------------- what goes with the weights


def test_npz_holds_our_own_names_of_any_network(runs, tmp_path):
    run = runs("resnet18", stem="stride16", width=4)
    with np.load(write(run, "npz", tmp_path / "w.npz", heads=True)) as file:
        kernel = run.state.params["encoder"]["stage1_block1"]["conv1"]["kernel"]
        np.testing.assert_array_equal(file["encoder/stage1_block1/conv1/kernel"], kernel)
        mean = run.state.batch_stats["predictor"]["norm"]["mean"]
        np.testing.assert_array_equal(file["predictor/norm/mean"], mean)
        about = json.loads(str(file["salcl_jax"]))
    assert about == {
        "model": {"name": "resnet18", "width": 4, "stem": "stride16"}, "branch": "online", "step": 7,
    }  # fmt: skip


def test_heads_go_along_when_asked_for(runs, tmp_path):
    torch = pytest.importorskip("torch")
    run = runs("resnet18")
    plain = torch.load(write(run, "mmdet", tmp_path / "a.pth"), weights_only=True)
    full = torch.load(write(run, "mmdet", tmp_path / "b.pth", heads=True), weights_only=True)
    assert not any(name.startswith("pro") for name in plain)
    parts = {name.split(".")[0] for name in set(full) - set(plain)}
    assert parts == {"projector", "predictor"}
    nn = torch.nn
    head = nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8, bias=False))
    prefix = "projector."
    head.load_state_dict({n.removeprefix(prefix): x for n, x in full.items() if n.startswith(prefix)})
    of_target = torch.load(
        write(run, "mmdet", tmp_path / "c.pth", heads=True, branch="target"), weights_only=True
    )
    assert {name.split(".")[0] for name in set(of_target) - set(plain)} == {"projector"}


def test_the_fields_of_detectron2_match_its_colours_and_widths(runs, tmp_path):
    file = write(runs("resnet50"), "detectron2", tmp_path / "w.pkl")
    text = file.with_suffix(".yaml").read_text()
    fields = dict(re.findall(r"^ *(\w+): (.+)$", text, re.MULTILINE))
    assert fields["PIXEL_MEAN"] == "[123.675, 116.28, 103.53]"
    assert fields["PIXEL_STD"] == "[58.395, 57.12, 57.375]"
    expected = {"WEIGHTS": '"w.pkl"', "DEPTH": "50", "STRIDE_IN_1X1": "False", "FORMAT": '"RGB"'}
    expected |= {"STEM_OUT_CHANNELS": "8", "WIDTH_PER_GROUP": "8", "RES2_OUT_CHANNELS": "32"}
    assert {name: fields[name] for name in expected} == expected


def test_the_fields_of_mmdet_are_python(runs, tmp_path):
    pytest.importorskip("torch")
    file = write(runs("resnet18"), "mmdet", tmp_path / "w.pth")
    found: dict = {}
    exec(file.with_suffix(".py").read_text(), found)
    model = found["model"]
    assert model["data_preprocessor"]["mean"] == [123.675, 116.28, 103.53]
    assert model["data_preprocessor"]["bgr_to_rgb"] is True
    assert (model["backbone"]["depth"], model["backbone"]["base_channels"]) == (18, 8)
    assert model["backbone"]["init_cfg"]["checkpoint"] == "w.pth"


def test_the_model_card_tells_configuration_data_steps_and_figures(runs, tmp_path):
    run = runs("resnet18")
    meta = {"step": 7, "branch": "online", "size": 64}
    results = {"knn": {"trained": {"knn/top1": 0.4375, "knn/odd": None}, "untrained": {"knn/top1": 0.25}}}
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({"meta": meta, "about": {}, "results": results}))
    figures = {"figures": str(folder / "eval.json")}
    card = write(run, "npz", tmp_path / "w.npz", **figures).with_suffix(".md").read_text()
    network, row = "resnet18, width 8, stem imagenet", "| knn/top1 | 0.4375 | 0.25 |"
    for words in (network, row, "| optim.name | adamw |", "7 of"):
        assert words in card, words
    assert "Licence" in card and "numpy.load" in card and "Not these weights" not in card
    other = write(run, "npz", tmp_path / "t.npz", branch="target", **figures).with_suffix(".md").read_text()
    assert "Not these weights" in other
    (folder / "eval.json").unlink()
    card = write(run, "npz", tmp_path / "u.npz", **figures).with_suffix(".md").read_text()
    assert "Not judged yet" in card


def test_the_folder_for_transformers_has_a_card_with_front_matter(runs, tmp_path):
    pytest.importorskip("safetensors")
    folder = write(runs("resnet18"), "huggingface", tmp_path / "hf")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "to, model, words",
    [
        ("torchvision", {"name": "resnet18", "stem": "stride16", "width": 64}, "stem=stride16"),
        ("huggingface", {"name": "resnet50", "stem": "cifar", "width": 64}, "stem=cifar"),
        ("torchvision", {"name": "resnet18", "stem": "imagenet", "width": 16}, "width 64, this one 16"),
        ("detectron2", {"name": "resnet18", "stem": "imagenet", "width": 16}, "width 64, this one 16"),
        ("huggingface", {"name": "vit_s16", "stem": "imagenet", "width": 64}, "timm and npz"),
    ],
)
def test_what_a_destination_cannot_hold_is_one_line_that_offers_npz(to, model, words):
    with pytest.raises(ValueError, match=words) as caught:
        targets.check(to, model, 224)
    assert "npz" in str(caught.value) and "\n" not in str(caught.value)
    targets.check("npz", model, 224)


@pytest.mark.parametrize(
    "to, out, words",
    [
        ("torchvision", "w.npz", r"ends in .pth or .safetensors"),
        ("detectron2", "w.pth", r"ends in .pkl"),
        ("huggingface", "w.safetensors", "writes a folder"),
        ("npz", "gs://bucket/w.npz", "local disk"),
    ],
)
def test_a_file_of_another_kind_is_refused(to, out, words, runs):
    with pytest.raises(ValueError, match=words):
        outgoing.export(runs("resnet18").run, to, out)


def test_a_missing_package_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs PyTorch: pip install torch") as caught:
        write(runs("resnet18"), "mmdet", tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("w*"))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "salcl_jax.export", *map(str, arguments)], cwd=ROOT, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip


def test_the_program_writes_and_names_its_files(runs, tmp_path):
    run = runs("resnet18", stem="stride16", width=4)
    reference.save(tmp_path / "run", run.c, run.state)
    done = command(f"--checkpoint={tmp_path}/run/checkpoints/7", "--to=npz", f"--out={tmp_path}/new/w.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{tmp_path}/new/w.npz", f"{tmp_path}/new/w.md"]
    assert Path(f"{tmp_path}/new/w.md").is_file()
    with np.load(tmp_path / "new" / "w.npz") as file:
        kernel = run.state.params["encoder"]["stem"]["conv"]["kernel"]
        np.testing.assert_array_equal(file["encoder/stem/conv/kernel"], kernel)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "give --checkpoint"),
        (("--checkpoint=nonesuch", "--to=npz", "--out=w.npz"), "--checkpoint=nonesuch: no such folder"),
        (("--checkpoint=.", "--to=onnx", "--out=w"), "torchvision"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, words):
    done = command(*arguments)
    assert done.returncode == 2 and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert words in done.stderr

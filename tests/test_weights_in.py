"""Weights in: published layouts under any prefix, our own exports, what is refused and what is never run."""

import argparse
import json
import sys
import zipfile

import broken
import jax
import numpy as np
import pytest
import weights_reference as reference

from salcl_jax import checkpoint, evaluate, sharding, train, train_step
from salcl_jax import config as config_lib
from salcl_jax.models.network import build
from salcl_jax.train_step import make_init
from salcl_jax.weights import files, incoming, outgoing, targets

pytestmark = pytest.mark.xdist_group("weights")
torch = pytest.importorskip("torch")


def shapes_of(c):
    return jax.eval_shape(make_init(build(**c.model), c))


@pytest.fixture(scope="module")
def c():
    return reference.small_config(name="resnet18")


@pytest.fixture(scope="module")
def shapes(c):
    return shapes_of(c)


@pytest.fixture(scope="module")
def one():
    return reference.torch_resnet("resnet18", 8, seed=1).state_dict()


@pytest.fixture(scope="module")
def two():
    return reference.torch_resnet("resnet18", 8, seed=2).state_dict()


def load(path, shapes, c):
    return incoming.load(str(path), shapes, c.model)


def under(prefix, state):
    return {f"{prefix}{name}": x for name, x in state.items()}


def saved(folder, content, name="w.pth"):
    torch.save(content, folder / name)
    return folder / name


def head(parts, sizes, last_bias=False, seed=0):
    """Linear, batch norm, ReLU, linear in torch's names; parts: the names of the three with weights."""
    torch.manual_seed(seed)
    first, norm, last = parts
    inside, hidden, out = sizes
    found = {f"{first}.weight": torch.randn(hidden, inside), f"{first}.bias": torch.randn(hidden)}
    ends = ("weight", "bias", "running_mean", "running_var")
    found |= {f"{norm}.{end}": torch.rand(hidden) for end in ends}
    found |= {f"{norm}.num_batches_tracked": torch.tensor(3), f"{last}.weight": torch.randn(out, hidden)}
    return found | ({f"{last}.bias": torch.randn(out)} if last_bias else {})


def assert_encoder(found, state, mark=""):
    """Leaves that say it all: a convolution in the depth, a shortcut, and statistics."""
    params, stats = found.trees[f"{mark}params"]["encoder"], found.trees[f"{mark}batch_stats"]["encoder"]
    np.testing.assert_array_equal(
        params["stage4_block2"]["conv1"]["kernel"],
        state["layer4.1.conv1.weight"].numpy().transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        params["stage2_block1"]["shortcut_conv"]["kernel"][0, 0],
        state["layer2.0.downsample.0.weight"].numpy()[:, :, 0, 0].T,
    )
    np.testing.assert_array_equal(stats["stem"]["norm"]["var"], state["bn1.running_var"])
    np.testing.assert_array_equal(params["stage3_block1"]["norm2"]["bias"], state["layer3.0.bn2.bias"])


def test_a_torchvision_file_gives_its_features(c, shapes, one, tmp_path):
    content = one | {"fc.weight": torch.randn(1000, 64), "fc.bias": torch.randn(1000)}
    found = load(saved(tmp_path, content), shapes, c)
    pictures = reference.images(97, 131)
    model = reference.torch_resnet("resnet18", 8, seed=1)
    for mark in ("", "target_"):  # the file has one network: both branches start from it
        params, stats = found.trees[f"{mark}params"]["encoder"], found.trees[f"{mark}batch_stats"]["encoder"]
        for tree, like in ((params, shapes.params), (stats, shapes.batch_stats)):
            assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda x: x.shape, like["encoder"])
    ours = reference.features(c, params, stats, pictures)
    reference.assert_close(reference.run_torch(model, pictures), ours)
    assert "took 100 arrays" in found.line and "not used: 2 (fc.weight, fc.bias)" in found.line
    assert "not in the file: 14 (projector/dense1/" in found.line  # twice 5 parameters and 2 statistics
    assert "\n" not in found.line and set(found.trees["params"]) == {"encoder"}


MM, SEQUENTIAL = ("fc0", "bn0", "fc1"), ("0", "1", "3")
PROJECTOR, PREDICTOR = (64, 12, 8), (8, 10, 8)


def mmselfsup_byol(one, two):
    """mmselfsup 1.x."""
    content = under("backbone.", one) | under("neck.", head(MM, PROJECTOR))
    content |= under("target_net.module.0.", two) | under("target_net.module.1.", head(MM, PROJECTOR, seed=1))
    return {"meta": {"epoch": 1}, "state_dict": content | under("head.predictor.", head(MM, PREDICTOR))}


def orl(one, two):
    """ORL on OpenSelfSup: the online network under two names, heads with a last bias that ours lack."""
    neck = under("mlp.", head(SEQUENTIAL, PROJECTOR, last_bias=True))
    content = under("online_net.0.", one) | under("online_net.1.", neck)
    content |= under("target_net.0.", two) | under("target_net.1.", neck)
    content |= under("backbone.", one) | under("neck.", neck)
    predictor = under("predictor.mlp.", head(SEQUENTIAL, PREDICTOR, last_bias=True))
    return {"state_dict": content | under("global_head.", predictor) | under("local_intra_head.", predictor)}


def moco(one, two):
    """MoCo v2: heads of another kind in the place of the classifier, and a queue."""
    fc = {"fc.0.weight": torch.randn(64, 64), "fc.2.weight": torch.randn(8, 64)}
    content = under("module.encoder_q.", one | fc) | under("module.encoder_k.", two | fc)
    content |= {"module.queue": torch.randn(8, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    state = {0: {"momentum_buffer": torch.randn(3)}}
    return {"epoch": 200, "arch": "resnet18", "state_dict": content, "optimizer": {"state": state}}


def densecl(one, two):
    """DenseCL on OpenSelfSup."""
    neck = {"1.mlp.0.weight": torch.randn(64, 64), "1.mlp2.0.weight": torch.randn(64, 64, 1, 1)}
    content = under("encoder_q.0.", one) | under("encoder_q.", neck) | under("backbone.", one)
    return {"state_dict": content | under("encoder_k.0.", two) | under("encoder_k.", neck)}


def slotcon(one, two):
    """SlotCon: convolutional heads, and the program's arguments as an object."""
    conv = {"mlp.0.weight": torch.randn(12, 64, 1, 1), "mlp.1.running_mean": torch.randn(12)}
    conv |= {"mlp.3.weight": torch.randn(8, 12, 1, 1)}
    content = under("module.encoder_q.", one) | under("module.encoder_k.", two)
    content |= under("module.projector_q.", conv) | under("module.projector_k.", conv)
    return {"args": argparse.Namespace(arch="resnet18", lr=1.0), "model": content}


def openselfsup_extracted(one, two):
    """A backbone cut out of a checkpoint."""
    return {"state_dict": one, "author": "OpenSelfSup"}


@pytest.mark.parametrize("layout", [mmselfsup_byol, orl, moco, densecl, slotcon, openselfsup_extracted])
def test_published_layouts(layout, c, shapes, one, two, tmp_path):
    found = load(saved(tmp_path, layout(one, two), "w.pth.tar"), shapes, c)
    assert_encoder(found, one)
    assert_encoder(found, one if layout is openselfsup_extracted else two, "target_")
    heads = {"encoder", "projector", "predictor"} if layout is mmselfsup_byol else {"encoder"}
    assert set(found.trees["params"]) == set(found.trees["batch_stats"]) == heads
    if layout is orl:  # three necks and two predictors of 8; not the second name of the encoder
        assert "not used: 40 (state_dict.online_net.1.mlp.0.weight" in found.line
    if layout is moco:  # two heads of 2, the queue and its position; not the optimizer
        assert "not used: 6 (" in found.line


def test_heads_that_fit_are_taken(c, shapes, one, two, tmp_path):
    found = load(saved(tmp_path, mmselfsup_byol(one, two)), shapes, c)
    for mark, seed in (("", 0), ("target_", 1)):
        like = head(MM, PROJECTOR, seed=seed)
        ours = found.trees[f"{mark}params"]["projector"]
        stats = found.trees[f"{mark}batch_stats"]["projector"]
        np.testing.assert_array_equal(ours["dense1"]["kernel"], like["fc0.weight"].T)
        np.testing.assert_array_equal(ours["dense2"]["kernel"], like["fc1.weight"].T)
        np.testing.assert_array_equal(stats["norm"]["mean"], like["bn0.running_mean"])
    bias = found.trees["params"]["predictor"]["dense1"]["bias"]
    np.testing.assert_array_equal(bias, head(MM, PREDICTOR)["fc0.bias"])


@pytest.mark.parametrize("prefix", ["", "resnet."])
def test_a_file_of_transformers(prefix, c, shapes, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_file = pytest.importorskip("safetensors.torch").save_file
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [2, 2, 2, 2]}
    how = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=3)
    classes = {"": transformers.ResNetModel, "resnet.": transformers.ResNetForImageClassification}
    torch.manual_seed(4)
    model = classes[prefix](how).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("var"):
                buffer.uniform_(0.5, 1.5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = load(files.weights_file(str(tmp_path)), shapes, c)  # the folder
    params, stats = found.trees["params"]["encoder"], found.trees["batch_stats"]["encoder"]
    pictures = reference.images(64, 64)
    ours = reference.features(c, params, stats, pictures)
    base = model if not prefix else model.resnet
    with torch.no_grad():
        theirs = base(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))
    reference.assert_close({"stage4": theirs.last_hidden_state}, ours)
    assert ("classifier.1.weight" in found.line) == bool(prefix)


# ---------------------------------------------------------------- our own exports


ROUND_TRIPS = [  # destination, file, architecture
    ("npz", "w.npz", {"name": "resnet18", "stem": "cifar", "width": 4}),
    ("huggingface", "hf", {"name": "resnet50", "width": 4}),
    ("mmdet", "w.pth", {"name": "resnet50", "width": 4}),
    ("timm", "w.pth", {"name": "vit_ti16"}),
]


@pytest.mark.parametrize("to, name, model", ROUND_TRIPS)
def test_a_round_trip_keeps_every_bit(to, name, model, tmp_path):
    if to == "huggingface":
        pytest.importorskip("safetensors")
    c = reference.small_config(**model)
    state = reference.random_state(c)
    run = reference.run_of(c, state)
    for branch, mark in (("online", ""), ("target", "target_")):
        outgoing.export(run, to, str(tmp_path / name), branch=branch, heads=True)
        found = load(files.weights_file(str(tmp_path / name)), shapes_of(c), c)
        wanted = {"encoder", "projector"} | ({"predictor"} if branch == "online" else set())
        assert set(found.trees["params"]) == wanted
        for field in ("params", "batch_stats"):
            expected = getattr(state, f"{mark}{field}")
            got = found.trees[field]
            for module in wanted:
                jax.tree.map(np.testing.assert_array_equal, got[module], dict(expected[module]))
            assert set(found.trees[f"target_{field}"]) == {"encoder", "projector"}


def test_detectron2_names_are_understood(c, shapes, tmp_path):
    state = reference.random_state(c)
    trees = [jax.tree.map(np.asarray, x) for x in (state.params, state.batch_stats)]
    arrays = targets.arrays("detectron2", c.model, *({"encoder": x["encoder"]} for x in trees), 64, 7)
    content = {f"backbone.bottom_up.{name}": torch.from_numpy(np.array(x)) for name, x in arrays.items()}
    found = load(saved(tmp_path, {"model": content}), shapes, c)
    jax.tree.map(np.testing.assert_array_equal, found.trees["params"]["encoder"], state.params["encoder"])


# ---------------------------------------------------------------- what is refused


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_not_run(zipped, c, shapes, one, tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": one, "x": Hostile(trace)}, tmp_path / "w.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(ValueError, match="would run code") as caught:
        load(tmp_path / "w.pth", shapes, c)
    assert not trace.exists() and "\n" not in str(caught.value)
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert trace.exists()  # it was hostile


def test_a_hostile_npz_is_refused_and_not_run(c, shapes, tmp_path):
    trace = tmp_path / "trace"
    np.savez(tmp_path / "w.npz", x=np.array([Hostile(trace)], object))
    with pytest.raises(ValueError, match="w.npz cannot be read"):
        load(tmp_path / "w.npz", shapes, c)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("content", [b"", b"what is this", bytes(64)], ids=["empty", "text", "zeros"])
def test_other_files_are_one_line(suffix, content, c, shapes, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load(tmp_path / f"w{suffix}", shapes, c)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["w.pth", "w.safetensors", "w.npz", "compressed.npz"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_read_or_told_in_one_line(form, tmp_path):
    pytest.importorskip("safetensors")
    file, told = tmp_path / form, 0
    arrays = {f"layer{i}.weight": np.random.default_rng(i).random((4, 5), np.float32) for i in range(3)}
    files.write(file, arrays, {"step": 1})
    if form == "compressed.npz":
        np.savez_compressed(file, **arrays)
    whole = file.read_bytes()
    for bad in (bad for seed in range(8) for bad in broken.mutations(whole, seed)):
        file.write_bytes(bad)
        try:
            files.read(str(file))
        except ValueError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            told += 1
    assert told > 100


def test_a_file_with_something_else_beside_the_arrays_is_one_line(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.ones(2))
    with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive:
        archive.writestr("notes.txt", "text")
    with pytest.raises(ValueError, match="w.npz cannot be read: .*notes.txt is no array"):
        files.read(str(tmp_path / "w.npz"))


GOOD = {"name": "resnet18", "width": 8, "stem": "imagenet"}
RECORDS = [[1], "text", None, {"model": None}, {"model": "resnet18"}, {"model": {}}, {"model": [1]},
           *({"model": {n: x for n, x in GOOD.items() if n != name}} for name in GOOD),
           {"model": GOOD | {"name": 3}}, {"model": GOOD | {"width": "8"}}, {"model": GOOD | {"width": True}},
           {"model": GOOD | {"stem": ["imagenet"]}}]  # fmt: skip


@pytest.mark.parametrize("about", RECORDS, ids=str)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_record_of_another_form_is_one_line(suffix, about, c, shapes, tmp_path):
    file, arrays, record = tmp_path / f"w{suffix}", {"x": np.ones(2, np.float32)}, json.dumps(about)
    if suffix == ".npz":
        np.savez(file, **arrays, **{files.KEY: np.array(record)})
    else:
        pytest.importorskip("safetensors.numpy").save_file(arrays, file, metadata={files.KEY: record})
    with pytest.raises(ValueError, match="its record") as caught:
        load(file, shapes, c)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_an_array_type_that_numpy_lacks_is_one_line(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"conv1.weight": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no arrays of type 'BF16'; save them as float32"):
        files.read(str(tmp_path / "w.safetensors"))
    torch.save({"x": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w.pth")
    np.testing.assert_array_equal(files.read(str(tmp_path / "w.pth"))[0]["x"], np.ones(2, np.float32))


def test_a_half_file_is_one_line(c, shapes, one, tmp_path):
    file = saved(tmp_path, one)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load(file, shapes, c)


def other_networks(one, two):
    deep = reference.torch_resnet("resnet50", 8).state_dict()
    return {
        "wider": (reference.torch_resnet("resnet18", 16).state_dict(), "layer.*there and.*here"),
        "deep": (deep, "is of another network"),
        "more blocks": (one | {"layer1.2.conv1.weight": torch.zeros(8)}, r"has besides 1 \(layer1.2"),
        "squeeze": (one | {"layer3.0.se.fc1.weight": torch.zeros(2)}, r"has besides 1 \(layer3.0.se.fc1"),
        "cut": ({n: x for n, x in one.items() if "layer3.1" not in n}, r"lacks 10 \(layer3.1.conv1.weight, "),
        "two of a kind": (under("left.", one) | under("right.", two), "several encoders, 'left.', 'right.'"),
        "none": ({"x.weight": torch.zeros(3)}, r"no such encoder .*it has 1 \(x.weight\)"),
    }


@pytest.mark.parametrize("name", [*other_networks({}, {})])
def test_another_network_is_one_line_with_names(name, c, shapes, one, two, tmp_path):
    content, words = other_networks(one, two)[name]
    with pytest.raises(ValueError, match=words) as caught:
        load(saved(tmp_path, content), shapes, c)
    assert "\n" not in str(caught.value) and "w.pth" in str(caught.value)


def test_a_file_of_ours_names_the_flags_that_it_needs(c, shapes, tmp_path):
    of_file = reference.small_config(name="resnet18", stem="stride16")
    run = reference.run_of(of_file, reference.random_state(of_file))
    outgoing.export(run, "npz", str(tmp_path / "w.npz"))
    cifar = reference.small_config(name="resnet18", stem="cifar")  # of the same shapes
    with pytest.raises(ValueError, match="--config.model.width=8 --config.model.stem=stride16"):
        load(tmp_path / "w.npz", shapes_of(cifar), cifar)


def moco_v3_positions(side, width):
    """Sines and cosines of the row, then of the column, at integer places."""
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    places = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies[None] for place in places]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def vit_file(folder, positions):
    model = reference.classes()["ViT"](192, 12, 3, 196)
    model.pos_embed.data[0, 1:] = torch.from_numpy(positions)
    return saved(folder, under("module.base_encoder.", model.state_dict()))


def test_learnt_positions_are_refused_and_fixed_ones_are_known(tmp_path):
    c = reference.small_config(name="vit_ti16")
    fixed = moco_v3_positions(14, 192)
    found = load(vit_file(tmp_path, fixed), shapes_of(c), c)
    assert found.line.endswith("not used: none; attention heads are not in the file: taken as 3")
    with pytest.raises(ValueError, match="learnt positions"):
        load(vit_file(tmp_path, fixed + 0.01), shapes_of(c), c)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*w.pth: give a file of weights, or the workdir"):
        files.weights_file(str(tmp_path / "w.pth"))
    assert files.weights_file(str(tmp_path)) is None  # a workdir


@pytest.mark.parametrize("package, suffix", [("torch", ".pth"), ("safetensors", ".safetensors")])
def test_a_missing_package_is_one_line(package, suffix, tmp_path, monkeypatch):
    (tmp_path / f"w{suffix}").touch()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.numpy", None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        files.read(str(tmp_path / f"w{suffix}"))


# ---------------------------------------------------------------- where they are used


def test_training_starts_from_a_file(c, one, two, tmp_path, capsys, monkeypatch):
    initial = reference.random_state(c)
    monkeypatch.setattr(train, "make_init", lambda *_: lambda: initial)
    file = saved(tmp_path, orl(one, two))
    start = config_lib.ConfigDict(c.to_dict())
    start.init_from = str(file)
    network, mesh = build(**start.model), sharding.make_mesh()
    with checkpoint.Checkpointer(str(tmp_path / "run"), every_steps=0, keep=1) as runs:
        state, _, step = train._restore_or_init(start, network, mesh, runs)
    assert step == 0 and "weights: " in capsys.readouterr().out
    found = incoming.Incoming({n: getattr(state, n) for n in checkpoint.MODEL_FIELDS}, "")
    assert_encoder(found, one)
    assert_encoder(found, two, "target_")
    for field in checkpoint.MODEL_FIELDS:  # heads keep their initial values
        for module in set(getattr(state, field)) - {"encoder"}:
            a, b = getattr(state, field)[module], getattr(initial, field)[module]
            jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("branch", ["online", "target"])
def test_the_evaluation_judges_a_file(branch, c, one, two, tmp_path, capsys, monkeypatch):
    initial = reference.random_state(c)
    monkeypatch.setattr(train_step, "make_init", lambda *_: lambda: initial)
    file = saved(tmp_path, moco(one, two))
    judged = config_lib.ConfigDict(c.to_dict())
    judged.eval.branch = branch
    judged.tasks.cache = "none"
    _, subjects, step = evaluate._open(judged, str(file), {})
    state = {subject.name: subject.state for subject in subjects}["trained"]
    fields = ("target_params", "target_batch_stats") if branch == "target" else ("params", "batch_stats")
    trees = dict(zip(("params", "batch_stats"), (getattr(state, f) for f in fields), strict=True))
    assert step is None
    assert_encoder(incoming.Incoming(trees, ""), two if branch == "target" else one)
    assert "not used: " in capsys.readouterr().out

"""The recipe of the packaged backbone, loaded from its file."""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from loftup import Backbone, load_backbone
from loftup.weights.catalogue import TINY_BACKBONES

WEIGHTS = TINY_BACKBONES["tiny"] / "model.safetensors"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recipes" / "distill_tiny.py"
spec = importlib.util.spec_from_file_location("distill_tiny", SCRIPT)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

pil = pytest.importorskip("PIL.Image")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pil.new("RGB", (64, 48), (200, 30, 60)).save(folder / "a.jpg")
    pil.effect_noise((64, 48), 80).convert("RGB").save(folder / "b.jpg")
    return folder


@pytest.fixture
def command(photos, tmp_path):
    """Two steps with a small random teacher of stride 16; the folder of the run is still to be added."""
    file = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("mobilenetv2_035", pretrained=False).state_dict(), file)
    words = [str(photos), "--teacher", "mobilenetv2_035", "--teacher-weights", str(file), "--layers", "3"]
    return [*words, "--batch", "1", "--sizes", "96", "--steps", "2", "-o"]


@pytest.fixture
def trunk(tmp_path):
    """A file as timm's ImageNet weights are: the whole network, its batch norms with a history."""
    torch.manual_seed(5)
    state = timm.create_model("mobilenetv2_100", pretrained=False).state_dict()
    for key in state:
        if key.endswith("running_mean"):
            state[key].normal_(0, 0.1)
        if key.endswith("running_var"):
            state[key].uniform_(0.5, 1.5)
        if key.endswith("num_batches_tracked"):
            state[key].fill_(400_000)  # more than float16 holds
    save_file(state, tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


def same(first, second):
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[key].float(), second[key].float()) for key in first)


def interrupt_at(step):
    """Reading the pictures of that step is where the user stops the run."""
    read = recipe.Pictures.__getitem__

    def interrupted(self, index):
        if index + self.start == step:
            raise KeyboardInterrupt
        return read(self, index)

    return interrupted


def test_what_it_makes_is_the_packaged_backbone_with_other_weights(command, tmp_path, capsys):
    recipe.main([*command, str(tmp_path / "run")])
    assert "2.78 M parameters" in capsys.readouterr().out
    file = tmp_path / "run" / "model.safetensors"
    made, known = load_file(file), load_file(WEIGHTS)
    assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in known.items()}
    assert all(value.dtype == torch.float16 for value in made.values() if value.is_floating_point())
    assert all(value.isfinite().all() for value in made.values())
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == state["steps"] == 2
    with torch.inference_mode():
        assert load_backbone("tiny", weights=file)(torch.rand(1, 3, 64, 96)).shape == (1, 192, 4, 6)


def test_it_stops_and_goes_on_as_if_it_had_not(command, trunk, tmp_path, monkeypatch):
    command[-1:] = ["--trunk", str(trunk), "--teacher-bfloat16", "-o"]
    recipe.main([*command, str(tmp_path / "run")])
    with monkeypatch.context() as patched:
        patched.setattr(recipe.Pictures, "__getitem__", interrupt_at(1))
        with pytest.raises(SystemExit, match="stopped after step 1, saved"):
            recipe.main([*command, str(tmp_path / "stopped")])
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    recipe.main([*command, str(tmp_path / "stopped")])
    assert same(tmp_path / "run" / "model.safetensors", tmp_path / "stopped" / "model.safetensors")


def test_convolutions_begin_with_the_trunk_and_keep_its_statistics(command, trunk, tmp_path):
    command[-1:] = ["--trunk", str(trunk), "-o"]
    recipe.main([*command, str(tmp_path / "run")])
    made, given = load_file(tmp_path / "run" / "model.safetensors"), load_file(trunk)
    moved = 0.0
    for key, value in made.items():
        name = key.removeprefix("patch_embed.backbone.network.")
        if name == key:
            continue
        if "running" in name or "tracked" in name:
            assert torch.equal(value, given[name].to(value.dtype)), key
        else:
            difference = (value.float() - given[name]).abs().max()
            assert difference < 0.01, key
            moved = max(moved, float(difference))
    assert moved > 1e-5
    assert made["patch_embed.backbone.network.bn1.num_batches_tracked"] == 400_000


def test_batch_norms_stay_as_they_are_in_training(trunk):
    network = recipe.Distillation([5], trunk=str(trunk))
    assert network.training
    before = network.convolutions.bn1.running_mean.clone()
    (out,) = network.train()(torch.rand(2, 3, 64, 96))
    assert out.shape == (2, 24, 5)
    assert torch.equal(network.convolutions.bn1.running_mean, before)


def test_convolutions_learn_at_a_share_of_the_rate(command, tmp_path):
    network = recipe.Distillation([5])
    others, convolutions = recipe.groups(network)
    assert (others["share"], convolutions["share"]) == (1.0, recipe.TRUNK_SHARE)
    assert len(others["params"]) + len(convolutions["params"]) == len(list(network.parameters()))
    assert {id(p) for p in convolutions["params"]} == {id(p) for p in network.convolutions.parameters()}
    recipe.main([*command, str(tmp_path / "run")])
    groups = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(recipe.TRUNK_SHARE * groups[0]["lr"])


def test_a_file_of_another_trunk_is_refused(command, tmp_path):
    teacher = command[command.index("--teacher-weights") + 1]  # of the same names, but narrower
    command[-1:] = ["--trunk", teacher, "-o"]
    with pytest.raises(SystemExit, match=r"holds no .* of the expected shape; give weights of timm's mobilenetv2_100"):
        recipe.main([*command, str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_start_leaves_the_student_alone_until_the_heads_can_read_it(command, trunk, tmp_path, capsys):
    command[-1:] = ["--start", str(WEIGHTS), "-o"]
    recipe.main([*command, str(tmp_path / "run")])
    assert same(tmp_path / "run" / "model.safetensors", WEIGHTS)
    with pytest.raises(SystemExit):
        recipe.main([*command[:-1], "--trunk", str(trunk), "-o", str(tmp_path / "both")])
    assert "not allowed with argument --start" in capsys.readouterr().err


class TestTeachers:
    @pytest.mark.parametrize(("patch", "size"), [(16, (96, 160)), (14, (84, 140)), (8, (48, 80)), (32, (192, 320))])
    def test_crops_at_the_size_of_the_students_grid(self, patch, size):
        image = torch.rand(1, 3, 96, 160)
        seen = recipe.at_stride(image, patch)
        assert tuple(seen.shape[-2:]) == size
        assert (seen is image) == (patch == 16)
        assert (seen.mean() - image.mean()).abs() < 0.01

    def test_one_of_patch_14(self, command, tmp_path):
        file = tmp_path / "vit.safetensors"
        model = timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=224, depth=2, num_classes=0)
        save_file(model.state_dict(), file)
        options = '{"patch_size": 14, "img_size": 224, "depth": 2, "num_classes": 0}'
        names = {"--teacher": "vit_tiny_patch16_224", "--teacher-weights": str(file), "--layers": "1"}
        for name, value in names.items():
            command[command.index(name) + 1] = value
        command[-1:] = ["--options", options, "-o"]
        recipe.main([*command, str(tmp_path / "run")])
        assert (tmp_path / "run" / "model.safetensors").exists()

    def test_bfloat16_is_the_teachers_alone(self, command, tmp_path, monkeypatch):
        seen = []
        forward = recipe.Distillation.forward

        def look(self, image):
            seen.append(torch.is_autocast_enabled("cpu"))
            return forward(self, image)

        def teach(image):
            seen.append(torch.is_autocast_enabled("cpu"))
            return image[:, :, ::16, ::16].bfloat16()

        teacher = Backbone(torch.nn.Identity(), teach, channels=3, patch_size=16, check=False)
        load = recipe.load_backbone
        monkeypatch.setattr(recipe.Distillation, "forward", look)
        monkeypatch.setattr(recipe, "load_backbone", lambda name, **o: load(name, **o) if name == "tiny" else teacher)
        recipe.main([*command[:-1], "--teacher-bfloat16", "-o", str(tmp_path / "run")])
        assert seen == [True, False] * 2

    def test_one_whose_grid_does_not_fit_is_refused(self, command, tmp_path, monkeypatch):
        def teach(image):
            return image[:, :, :7, :7]

        teacher = Backbone(torch.nn.Identity(), teach, channels=3, patch_size=16, check=False)
        load = recipe.load_backbone
        monkeypatch.setattr(recipe, "load_backbone", lambda name, **o: load(name, **o) if name == "tiny" else teacher)
        with pytest.raises(SystemExit, match="gives a grid of 7x7 for crops of 96x96 pixels, expected 6x6"):
            recipe.main([*command, str(tmp_path / "run")])


class TestPictures:
    def test_folders_and_lists(self, photos, tmp_path):
        (photos / "deep").mkdir()
        pil.new("RGB", (9, 9)).save(photos / "deep" / "c.jpg")
        (photos / "deep" / "d.png").touch()
        listed = tmp_path / "list.txt"
        listed.write_text("\n/x/é one.jpg\r\ny.JPEG\n\n", "utf-8")
        found = recipe.find_pictures([photos, listed])
        assert found == [
            photos / "a.jpg",
            photos / "b.jpg",
            photos / "deep" / "c.jpg",
            Path("/x/é one.jpg"),
            Path("y.JPEG"),
        ]

    def test_a_list_does_as_its_folder_does(self, command, photos, tmp_path):
        recipe.main([*command, str(tmp_path / "folder")])
        listed = tmp_path / "list.txt"
        listed.write_text(f"{photos / 'a.jpg'}\n{photos / 'b.jpg'}\n", "utf-8")
        recipe.main([str(listed), *command[1:], str(tmp_path / "list")])
        assert same(tmp_path / "folder" / "model.safetensors", tmp_path / "list" / "model.safetensors")

    def test_none_is_said(self, tmp_path):
        (tmp_path / "empty.txt").write_text("\n")
        words = ["--teacher", "resnet18", "--teacher-weights", "none", "--layers", "3", "-o", str(tmp_path / "run")]
        with pytest.raises(SystemExit, match=r"no \.jpg file in .*give folders of pictures or lists of them"):
            recipe.main([str(tmp_path), str(tmp_path / "empty.txt"), *words])
        for wrong in ("nowhere", "nowhere.txt"):
            with pytest.raises(SystemExit, match=f"{wrong} is neither a folder of pictures nor a .txt file"):
                recipe.main([str(tmp_path / wrong), *words])

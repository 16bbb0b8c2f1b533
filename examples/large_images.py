"""Large outputs in little memory: a probe applied on the way, a memory-mapped map, features at a few points.

Runs as it stands, without a network: the weights are random, so only shapes and memory mean something here.
"""

import tempfile

import torch

from loftup import LoftUp

up = LoftUp(96).eval()  # LoftUp.from_pretrained(...) for real
features, image = torch.randn(1, 96, 12, 16), torch.rand(1, 3, 192, 256)

with torch.inference_mode():
    # 21 logits a pixel; the (1, 96, 192, 256) map never exists.
    probe = torch.nn.Linear(96, 21)
    logits = up(features, image, head=probe)

    # The whole map, larger than memory if need be, in a file.
    with tempfile.TemporaryDirectory() as folder:
        shape = torch.Size((1, 96, 192, 256))
        mapped = torch.from_file(f"{folder}/map", shared=True, size=shape.numel(), dtype=torch.float16).view(shape)
        up(features, image, out=mapped)

        # Vectors at points (x, y): the cost grows with their number.
        points = torch.tensor([[[10.0, 20.0], [200.5, 100.25]]])
        vectors = up.at(features, image, points)
        assert torch.allclose(vectors[0, 0], mapped[0, :, 20, 10].float(), atol=1e-2)
        del mapped

print(f"logits {tuple(logits.shape)}, map {tuple(shape)} in a file, vectors {tuple(vectors.shape)}")

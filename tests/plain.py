"""LoftUp written straight from the paper's section 3.1, one image at a time, materialised, in float64.

Shares no code with the package. The angles of the Fourier codes alone are float32, as the method defines them: at
frequency e^10 their last bit is part of the result.
"""

import torch


def fourier(values: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """(values, H, W) to sines and cosines, frequency outer, value inner."""
    count = phases.shape[-1]
    frequencies = torch.exp(torch.linspace(-2, 10, count))
    rows = []
    for which, function in enumerate((torch.sin, torch.cos)):
        flat = phases[which].float().flatten()
        for index in range(count * len(values)):
            angle = frequencies[index // len(values)] * values[index % len(values)] + flat[index]
            rows.append(function(angle.double()))
    return torch.stack(rows)


def grid(height: int, width: int) -> torch.Tensor:
    rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(-1, 1, width)[None].expand(height, width)
    return torch.stack([rows, columns])


def norm(x, weight, bias, eps=1e-5):
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def conv_bn_relu(x, state, conv, bn):
    x = torch.nn.functional.conv2d(x[None], state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)[0]
    mean, var = state[f"{bn}.running_mean"][:, None, None], state[f"{bn}.running_var"][:, None, None]
    x = (x - mean) / (var + 1e-5).sqrt() * state[f"{bn}.weight"][:, None, None] + state[f"{bn}.bias"][:, None, None]
    return x.clamp(min=0)


def attention(x, tokens, state, key, heads):
    q_weight, k_weight, v_weight = state[f"{key}.in_proj_weight"].chunk(3)
    q_bias, k_bias, v_bias = state[f"{key}.in_proj_bias"].chunk(3)
    q, k, v = x @ q_weight.T + q_bias, tokens @ k_weight.T + k_bias, tokens @ v_weight.T + v_bias
    d = q.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        out.append(torch.softmax(q[:, part] @ k[:, part].T / d**0.5, dim=-1) @ v[:, part])
    return torch.cat(out, dim=-1) @ state[f"{key}.out_proj.weight"].T + state[f"{key}.out_proj.bias"]


def loftup(state: dict, features: torch.Tensor, image: torch.Tensor, heads: int = 4) -> torch.Tensor:
    """Features (C, h, w) and an image at output size (3, H, W) to (C, H, W), float64."""
    phases = {key: value for key, value in state.items() if "biases" in key}
    state = {key: value.double() for key, value in state.items()}
    channels, h, w = features.shape
    features, image = features.double(), image.float()
    tokens = norm(features.flatten(1).T, state["channelnorm.norm.weight"], state["channelnorm.norm.bias"])
    if "upsampler.lr_pe.biases" in state:
        tokens = torch.cat([tokens, fourier(grid(h, w), phases["upsampler.lr_pe.biases"]).flatten(1).T], dim=-1)
    else:
        table = state["upsampler.lr_pe"][0].T
        side = round(table.shape[1] ** 0.5)
        table = table.reshape(1, channels, side, side)
        if (h, w) != (side, side):
            table = torch.nn.functional.interpolate(table, (h, w), mode="bicubic", align_corners=False)
        tokens = tokens + table[0].flatten(1).T

    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    rgb = (image - low) / (high - low).clamp(min=1e-4) - 0.5
    height, width = image.shape[1:]
    code = fourier(torch.cat([grid(height, width), rgb]), phases["upsampler.fourier_feat.1.biases"])
    code = torch.cat([code, rgb.double()]).movedim(0, -1)
    stem = "upsampler.first_conv"
    code = norm(code, state[f"{stem}.0.norm.weight"], state[f"{stem}.0.norm.bias"]).movedim(-1, 0)
    code = conv_bn_relu(code, state, f"{stem}.1", f"{stem}.2")
    code = conv_bn_relu(code, state, f"{stem}.4", f"{stem}.5")

    x = code.flatten(1).T
    block = 0
    while f"upsampler.ca_transformer.layers.{block}.0.norm_q.weight" in state:
        key = f"upsampler.ca_transformer.layers.{block}"
        q = norm(x, state[f"{key}.0.norm_q.weight"], state[f"{key}.0.norm_q.bias"])
        kv = norm(tokens, state[f"{key}.0.norm_kv.weight"], state[f"{key}.0.norm_kv.bias"])
        x = x + attention(q, kv, state, f"{key}.0.attention", heads)
        hidden = norm(x, state[f"{key}.1.net.0.weight"], state[f"{key}.1.net.0.bias"])
        hidden = hidden @ state[f"{key}.1.net.1.weight"].T + state[f"{key}.1.net.1.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ state[f"{key}.1.net.4.weight"].T + state[f"{key}.1.net.4.bias"]
        block += 1
    x = norm(x, state["upsampler.ca_transformer.norm.weight"], state["upsampler.ca_transformer.norm.bias"])
    final = "upsampler.final_conv"
    if f"{final}.0.weight" in state:
        x = x @ state[f"{final}.0.weight"][:, :, 0, 0].T + state[f"{final}.0.bias"]
        final += ".1"
    x = norm(x, state[f"{final}.weight"], state[f"{final}.bias"], eps=1e-6)
    return x.T.reshape(channels, height, width)

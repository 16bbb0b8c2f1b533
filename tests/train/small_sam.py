"""A SAM small enough for tests."""

import torch
from transformers import SamConfig, SamImageProcessor, SamModel


def write_small_sam(folder):
    """A SAM of random weights, with its image processor; its masks mean nothing."""
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 8, "mlp_dim": 16, "num_pos_feats": 4, "global_attn_indexes": [0],
            "window_size": 4,
        },
        prompt_encoder_config={
            "hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4, "image_embedding_size": 8,
        },
        mask_decoder_config={
            "hidden_size": 8, "mlp_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 8, "iou_head_depth": 2,
        },
    )  # fmt: skip
    model = SamModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder)
    return folder

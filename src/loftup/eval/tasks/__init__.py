"""The tasks that upsampled features are judged by, each a function of (backbone, upsampler, dataset, config)."""

"""PUNet: a U-Net whose attention reads prompt tokens."""

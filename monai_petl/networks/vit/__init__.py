"""Networks around MONAI's vision transformer."""

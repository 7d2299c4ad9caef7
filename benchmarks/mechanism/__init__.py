"""The gate's mechanism on a pretrained model, without training (docs/measurements/mechanism.md)."""

"""`make demo-llm`: a pretrained model of 135M parameters on word problems (README.md)."""

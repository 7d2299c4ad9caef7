"""The old name of megatron_egrsd.run.metrics, kept for one release: `python -m megatron_egrsd.console`."""

from megatron_egrsd.run.metrics import metrics_page

if __name__ == "__main__":
    print(metrics_page(), end="")

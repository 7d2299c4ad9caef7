"""The published tables of the EGRSD paper (arXiv 2605.13255, version 1), beside which ours are set.

The rows of Tables 2, 3 and A4, and with them those of Table 5, are in megatron_egrsd/evaluation/protocol.py.
"""

from megatron_egrsd.evaluation.protocol import PUBLISHED, SETS, summary_columns

SUMMARY = {"avg": "Avg", "avg_len": "AvgLen", "eff": "Eff"}
COLUMNS = SETS | SUMMARY  # key -> name of a column
Row = dict[str, float]  # column -> published value


def of_method(model: str, method: str) -> Row:
    """Return a row of Tables 2, 3, 5 and A4: the columns that are published, Avg and Eff computed from them."""
    if method not in PUBLISHED.get(model, {}):
        return {}
    accuracies, tokens = PUBLISHED[model][method]
    return row(accuracies, tokens)


def row(accuracies: list[float], tokens: int | None = None) -> Row:
    """Return the row of accuracies in per cent, in the order of SETS, and mean tokens if they are published."""
    summary = summary_columns(accuracies, None if tokens is None else [tokens])
    columns = zip(COLUMNS, (*accuracies, *summary), strict=True)
    return {name: value for name, value in columns if value is not None}


# Average accuracy after the last of four snapshots (S4) by gamma; gamma 0.3 is the EGRSD of Table 3.
TABLE_4 = {0.0: 66.81, 0.1: 68.32, 0.2: 67.79, 0.3: 68.23, 0.4: 66.82, 0.6: 68.06, 0.7: 68.00, 0.8: 67.23, 0.9: 67.83}

# By W. The row of W 5 is the CL-EGRSD of Table 3, so of gamma 1.0; that of W 0 is the EGRSD of Table 3, of gamma 0.3.
TABLE_6 = {
    0: row([76.67, 70.00, 45.42, 87.20, 35.48, 94.61], 11_836),
    1: row([75.56, 71.67, 46.67, 86.95, 36.12, 94.66], 11_962),
    3: row([75.00, 66.67, 50.00, 87.50, 34.74, 94.41], 12_005),
    5: row([77.22, 70.00, 52.50, 86.95, 34.83, 94.43], 12_232),
    7: row([74.72, 74.16, 41.25, 87.15, 36.31, 94.51], 12_231),
}

TABLE_7 = {
    "frozen": row([76.67, 70.00, 45.42, 87.20, 35.48, 94.61]),
    "EMA 0.99": row([73.89, 70.83, 45.00, 87.25, 35.29, 94.73]),
    "copy every 20": row([73.89, 67.50, 45.00, 87.45, 34.19, 94.67]),
    "copy every 50": row([74.44, 67.50, 40.83, 87.30, 35.20, 94.56]),
}

# By (gamma, W), on four sets.
_SETS_A3 = ("aime24", "aime25", "hmmt25", "minerva")
TABLE_A3 = {
    settings: dict(zip(_SETS_A3, values, strict=True))
    for settings, values in {
        (1.0, 0): (76.39, 66.67, 47.50, 34.56),
        (1.0, 3): (74.17, 65.83, 37.50, 34.56),
        (1.0, 5): (77.22, 70.00, 52.50, 34.83),
        (1.0, 7): (74.44, 70.83, 43.33, 35.39),
        (0.3, 5): (74.72, 69.17, 45.00, 35.11),
        (0.5, 0): (75.00, 67.50, 43.33, 34.56),
        (0.5, 5): (76.11, 65.00, 47.50, 34.38),
    }.items()
}

CLIP = 0.1  # of the gradient norm; Figure A1 draws it

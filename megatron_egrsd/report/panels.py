"""The curves of a run: (key of metrics.jsonl, title) by picture. The report, and `watch`, draw them."""

TRAINING = [
    ("accuracy", "share of right responses"),
    ("response/length", "response length, tokens"),
    ("response/truncated", "share cut off"),
    ("optimizer/grad_norm", "gradient norm"),
    ("batch/degenerate_share", "share without advantage"),
    ("sync/log_prob_difference", "|log-prob SGLang − engine|, nats"),
]
GATE = [
    ("student/entropy", "student entropy, nats"),
    ("teacher/entropy", "teacher entropy, nats"),
    ("weight/log_ratio", "gap δ = log p_T − log p_S, nats"),
    ("gate/mean", "mean confidence ω"),
    ("gate/closed_share", "share of tokens with ω < 1 − γ/2"),
    ("weight/clip_share", "share of tokens with exp(Dδ) clipped"),
]

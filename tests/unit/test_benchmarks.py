"""The settings of benchmarks that are runs of their own, and how they end if such a run fails."""

import sys

import pytest

from benchmarks import end_to_end
from benchmarks.runs import CONFIG, run
from megatron_egrsd.config_reader import parse_config


@pytest.mark.parametrize("case", end_to_end.CASES.values(), ids=list(end_to_end.CASES))
@pytest.mark.parametrize("system", ["ours", "ours, one step off"])
def test_the_run_beside_trl_is_grpo_as_trl_has_it(case, system, tmp_path):
    """Whatever the demo's configuration trains, on which the run is built."""
    own = end_to_end.SYSTEMS[system][1]
    values = end_to_end.settings(case, end_to_end.TINY, tmp_path) | own
    config = parse_config([*CONFIG, *end_to_end.words(values)])
    o = config.objective
    assert (o.function, o.advantage, o.length_bonus, o.mix, o.attenuation, o.lookahead) == ("", "group", 0, 0, 0, 0)
    assert (o.loss, o.loss_normalization, o.kl_coef, o.clip_low, o.clip_high) == ("ppo", "token_mean", 0, 0.2, 0.28)
    assert o.importance_cap == own.get("objective.importance_cap")
    assert (config.optimizer.clip_grad, config.optimizer.beta2, config.optimizer.lr) == (1.0, 0.95, case.lr)
    assert config.optimizer.updates_per_batch == 1
    sizes = config.rollout.prompts_per_step, config.rollout.rollouts_per_prompt, config.rollout.max_response_tokens
    assert sizes == (case.prompts, case.per_prompt, case.longest)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("a line\nmegatron-egrsd: error: no data\nresource_tracker: leaked", "megatron-egrsd: error: no data"),
        ("Traceback\nKeyError: 3\n", "KeyError: 3"),
        ("", "no message"),
    ],
)
def test_a_run_that_fails_ends_with_its_own_reason(said, reason):
    with pytest.raises(SystemExit, match=f"error: case A failed: {reason}$"):
        run([sys.executable, "-c", f"import sys; sys.exit({said!r} or 1)"], threads=1, name="case A")

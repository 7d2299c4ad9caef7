"""parse_config: YAML and overrides, and one clear sentence for every mistake."""

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_egrsd.config.page import page
from megatron_egrsd.config_reader import PATHS, RENAMED, parse_config, valid_keys
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives import DivergenceForm, presets
from megatron_egrsd.objectives.load import load_objective, needs_teacher
from megatron_egrsd.report.family import NAMES
from megatron_egrsd.system.arguments import Parser, path
from tests.presets import preset_objective

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
BASE = ["--model.path", "m", "--data.train", "t.jsonl"]
PARTIAL = ["--rollout.partial", "true"]
ADAPTERS = ["--lora.rank", "4", "--rollout.sync.lora", "adapter", "--rollout.sync.transport", "ipc"]
GROUP = ["--objective.advantage", "group"]
CAP = ["--objective.importance_cap", "2"]
PAPER = {"objective.advantage": "running", "objective.loss": "reinforce", "objective.mix": 1.0,
         "rollout.rollouts_per_prompt": 1, "objective.length_bonus": 0.5, "objective.importance_cap": None,
         "teacher.weights": "frozen"}  # fmt: skip
GROUPS = {"objective.advantage": "group", "objective.loss": "ppo", "rollout.rollouts_per_prompt": 8,
          "objective.length_bonus": 0.0, "objective.attenuation": 0.0, "objective.lookahead": 0}  # fmt: skip
SIBLING = GROUPS | {"objective.mix": 0.0, "objective.importance_cap": 2.0, "teacher.weights": "ema",
                    "teacher.ema_decay": 0.95, "data.teacher_context": "sibling",
                    "objective.loss_normalization": "token_mean"}  # fmt: skip
PRESETS = {
    "egrsd": PAPER | {"objective.attenuation": 0.3, "objective.lookahead": 0},
    "cl_egrsd": PAPER | {"objective.attenuation": 0.3, "objective.lookahead": 3},
    "gate_off": PAPER | {"objective.attenuation": 0.0, "objective.lookahead": 0},
    "grpo": GROUPS | {"objective.mix": 0.0, "objective.clip_high": 0.28, "objective.importance_cap": None},
    "opsd": PAPER
    | {"objective.length_bonus": 0.0, "objective.loss_normalization": "seq_mean",
       "objective.options": {"kind": "forward_kl", "entry_clip": 0.05}, "data.teacher_context": "template"},
    "crisp": PAPER
    | {"objective.length_bonus": 0.0, "objective.loss_normalization": "seq_mean",
       "objective.options": {"kind": "reverse_kl"}, "teacher.weights": "snapshot", "teacher.snapshot_every": 50,
       "data.teacher_context": "concise"},
    "sft": PAPER
    | {"objective.length_bonus": 0.0, "objective.loss_normalization": "token_mean", "objective.score_temperature": 1.0},
    "rlcsd": GROUPS
    | {"objective.mix": 0.0, "objective.clip_high": 0.2, "objective.importance_cap": 2.0, "teacher.weights": "snapshot",
       "teacher.snapshot_every": 10, "data.teacher_context": "contrast"},
    "sdpo": SIBLING | {"objective.function": "megatron_egrsd.objectives.sdpo:SDPO", "objective.loss": "reinforce"},
    "srpo": SIBLING
    | {"objective.function": "megatron_egrsd.objectives.sdpo:SRPO", "objective.loss": "ppo",
       "objective.clip_high": 0.28},
    "antisd": GROUPS
    | {"objective.mix": 0.0, "objective.clip_high": 0.2, "objective.importance_cap": None, "teacher.weights": "live",
       "data.teacher_context": "template"},
    "rlsd": GROUPS
    | {"objective.mix": 0.5, "objective.mix_decay_steps": 50, "objective.clip_high": 0.28,
       "objective.importance_cap": 2.0, "teacher.weights": "snapshot", "teacher.snapshot_every": 10},
}  # fmt: skip


def parse_error(arguments):
    with pytest.raises(BadArgument) as error:
        parse_config(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_yaml_with_overrides_the_later_one_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: a}\ndata: {train: b}\noptimizer:\n  lr: 1e-5\nsteps: 7\nobjective: {lookahead: 1}\n")
    config = parse_config(
        ["--config", str(file), "--objective.lookahead", "4", "--rollout.servers.urls", "[http://h:1]"]
    )
    assert (config.steps, config.optimizer.lr, config.objective.lookahead) == (7, 1e-5, 4)
    assert config.objective.mix == 1.0 and config.rollout.servers.urls == ["http://h:1"]
    assert isinstance(config, Config) and isinstance(config.model, ModelConfig)
    assert parse_config(["--objective.lookahead", "4", "--config", str(file)]).objective.lookahead == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "3"], ["stepz", "did you mean steps?"]),
        (["--objective.lookahed", "3"], ["did you mean objective.lookahead?"]),
        (["--lookahead", "3"], ["did you mean objective.lookahead?"]),
        (["--rollout.tensor", "3"], ["did you mean parallel.tensor?"]),
        (["--objective.lookahead", "two"], ["objective.lookahead", "'two'", "int"]),
        (["--steps", "1.5"], ["steps", "int"]),
        (["--teacher.weights", "old"], ["teacher.weights", "'frozen', 'live', 'ema', 'snapshot'"]),
        (["--objective.lookahead", "-1"], ["objective.lookahead is -1"]),
        (["--objective.mix", "1.5"], ["[0, 1]"]),
        (["--objective.attenuation", "1.5"], ["objective.attenuation is 1.5", "[0, 1]"]),
        (["--objective.attenuation", "1", "--objective.gate_floor", "0"], ["gate_floor 0", "lose its whole weight"]),
        (["--objective.gate_floor", "-0.1"], ["objective.gate_floor is -0.1", "[0, 1]"]),
        (["--objective.length_bonus", "-1"], ["objective.length_bonus is -1", "negative"]),
        (["--objective.score_temperature", "0"], ["objective.score_temperature must be positive"]),
        (["--objective.preset", "ppo"], ["objective.preset is 'ppo'", "cl_egrsd, gate_off, grpo"]),
        (["--teacher.snapshot_every", "0"], ["teacher.snapshot_every is 0; it must be positive"]),
        (["--optimizer.lr", "nan"], ["optimizer.lr"]),
        (["--objective.loss_normalization", "fixed"], ["objective.fixed_length"]),
        (["--rollout.rollouts_per_prompt", "0"], ["rollout.rollouts_per_prompt is 0", "positive"]),
        ([*GROUP, "--rollout.rollouts_per_prompt", "1"], ["the rollouts of one prompt", "set it to 2 or more"]),
        (["--objective.preset", "grpo", "--rollout.rollouts_per_prompt", "1"], ["compares the rollouts of one prompt"]),
        (["--rollout.dynamic_sampling", "1"], ['"running" every rollout has one', "set dynamic_sampling to 0"]),
        ([*CAP, "--rollout.top_p", "0.95"], ["before rollout.top_p and rollout.top_k", "set importance_cap to null"]),
        ([*CAP, "--rollout.top_k", "20"], ["before rollout.top_p and rollout.top_k", "set importance_cap to null"]),
        (["--objective.preset", "rlsd", "--rollout.top_k", "20"], ["before rollout.top_p and rollout.top_k"]),
        (
            [*CAP, "--objective.score_temperature", "1", "--rollout.temperature", "0.8"],
            ["score_temperature is 1 and rollout.temperature 0.8", "one temperature for both"],
        ),
        (["--rollout.top_p", "0"], ["rollout.top_p is 0", "(0, 1]"]),
        (["--rollout.top_p", "1.5"], ["rollout.top_p is 1.5", "(0, 1]"]),
        (["--rollout.top_k", "-1"], ["rollout.top_k is -1", "negative"]),
        (["--rollout.temperature", "0"], ["positive"]),
        (["--rollout.prompts_per_step", "5", "--optimizer.updates_per_batch", "2"], ["5 does not divide", "2 equal"]),
        (["--rollout.staleness", "2"], ["rollout.staleness is 2", "0 (on-policy) or 1"]),
        (["--rollout.partial", "true"], ["rollout.staleness is 0", "set rollout.staleness to 1 or more"]),
        ([*PARTIAL, "--rollout.staleness", "2"], ["older weights", "set objective.importance_cap"]),
        ([*PARTIAL, "--rollout.staleness", "-1"], ["rollout.staleness is -1"]),
        ([*PARTIAL, "--rollout.staleness", "1", "--rollout.dynamic_sampling", "1"], ["do not go together"]),
        (
            [*PARTIAL, "--rollout.staleness", "1", "--rollout.servers.args", '{"speculative-algorithm": "NGRAM"}'],
            ["with speculative decoding", "rollout.servers.args"],
        ),
        (["--rollout.servers.args", '{"tp-size": 1, "tp_size": 2}'], ["tp-size", "tp_size", "leave one out"]),
        (["--rollout.extra_prompts", "1"], ["rollout.extra_prompts is 1", "0 without rollout.partial"]),
        ([*PARTIAL, "--rollout.staleness", "1", "--rollout.extra_prompts", "1"], ["extra_prompts is 1", "2 or more"]),
        (
            [*PARTIAL, "--rollout.staleness", "2", "--rollout.extra_prompts", "33"],
            ["between 0 and rollout.prompts_per_"],
        ),
        (["--rollout.staleness", "1"], ["older weights", "set objective.importance_cap"]),
        (["--rollout.servers.colocated", "true"], ["rollout.sync.transport", "no two processes on one GPU"]),
        (
            ["--rollout.servers.colocated", "true", "--rollout.servers.urls", '["http://a:1"]'],
            ["empty rollout.servers.urls"],
        ),
        (
            ["--rollout.servers.colocated", "true", "--rollout.sync.transport", "ipc", "--rollout.staleness", "1"],
            ["takes turns", "one of the two"],
        ),
        (["--parallel.context", "0"], ["parallel.context is 0; it must be positive"]),
        (
            ["--parallel.timeout", "60"],
            ["parallel.timeout is 60 s; it must exceed rollout.servers.request_timeout = 3600"],
        ),
        (["--parallel.sequence_parallel", "true"], ["parallel.tensor > 1"]),
        (["--data.teacher_template", "{problem}"], ["{solution} or {answer}"]),
        (["--data.teacher_context", "brief"], ["data.teacher_context is 'brief'", "template, answer, concise"]),
        (["--data.teacher_template", "{problem} {answer} {solutions}"], ["{solutions}", "did you mean {solution}"]),
        (["--data.student_template", "Solve!"], ["student_template", "{problem}"]),
        (["--data.student_template", "{problem} {solution}"], ["only the teacher"]),
        (
            ["--data.teacher_template", '[{"role": "assistant", "content": "{solution}"}]'],
            ["end with a turn of the user"],
        ),
        (["--data.teacher_template", '[{"role": "tutor", "content": "{solution}"}]'], ["list of turns", "tutor"]),
        (["--lora.rank", "-1"], ["lora.rank is -1", "negative"]),
        (["--lora.alpha", "0"], ["lora.alpha is 0", "positive"]),
        (["--lora.targets", '["q_proj", "lm_head"]'], ["lora.targets names 'lm_head'", "q_proj, k_proj"]),
        (["--lora.targets", "[]"], ["lora.targets is empty", "set lora.rank to 0"]),
        ([*ADAPTERS, "--rollout.servers.urls", '["http://a:1"]'], ["servers that the run launches"]),
        ([*ADAPTERS, "--rollout.servers.colocated", "true"], ["servers that keep their weights", "take merged"]),
        ([*ADAPTERS, "--rollout.sync.transport", "distributed"], ['"ipc" or "disk"', "no adapters from a process"]),
        (
            [*ADAPTERS, "--rollout.sync.transport", "disk", "--rollout.sync.verify", "true"],
            ["rollout.sync.verify needs"],
        ),
        (["--config", "/no/such.yaml"], ["--config", "does not exist"]),
        (["word"], ["'word' is no option"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    message = parse_error(BASE + arguments)
    assert all(word in message for word in words), message


def test_the_allowed_difference_of_log_probs_depends_on_the_staleness():
    stale = ["--rollout.staleness", "1", "--objective.importance_cap", "2"]
    assert [parse_config(BASE + more).log_prob_limit for more in ([], stale)] == [0.1, 0.2]
    assert parse_config([*BASE, *stale, *PARTIAL, "--rollout.staleness", "3"]).log_prob_limit == 0.4
    assert parse_config([*BASE, *stale, "--max_log_prob_difference", "0.05"]).log_prob_limit == 0.05


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("objective:\n  lookahed: 3\n", "did you mean objective.lookahead?"),
        ("objectiv:\n  mix: 1\n", "did you mean objective.mix?"),
        ("rollout: {prompts-per-step: 3}\n", "did you mean rollout.prompts_per_step?"),
        ("rollout: {servers: {max-restarts: 3}}\n", "did you mean rollout.servers.max_restarts?"),
        ("batch-size: 3\n", "no configuration key is called batch-size"),
        ("model: {path: x}\ndata: {train: y}\nsteps: ten\n", "steps is 'ten'"),
        ("model: {path: x}\n", "data.train is not set"),
        ("data: {train: y}\n", "model.path is not set"),
        ("model: 3\n", "section"),
        ("", "empty"),
        ("a: [", "pars"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert words in parse_error(["--config", str(file)])


def value(config: Config, key: str):
    return functools.reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_makes_it_one_and_any_key_beside_it_overrides_it(name, tmp_path):
    """In YAML and on the command line, before the preset and after it."""
    preset = ["--objective.preset", name]
    config = parse_config(BASE + preset)
    assert {key: value(config, key) for key in PRESETS[name]} == PRESETS[name]
    assert config.objective == preset_objective(name)
    assert needs_teacher(config.objective) == (name not in ("grpo", "sft"))

    overrides = {"objective.mix": 0.25, "objective.ratio_clip": 0.1, "objective.length_bonus": 0.125,
                 "objective.importance_cap": None, "rollout.rollouts_per_prompt": 3,
                 "teacher.weights": "live"}  # fmt: skip
    words = [word for key, new in overrides.items() for word in (f"--{key}", "null" if new is None else str(new))]
    tree = {}
    for key, new in overrides.items():
        section, _, field = key.partition(".")
        tree.setdefault(section, {})[field] = new
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    other = tmp_path / "other.yaml"
    other.write_text("{objective: {mix: 0.75, lookahead: 3}, teacher: {weights: frozen}}")
    both = tmp_path / "both.yaml"
    both.write_text(yaml.safe_dump(tree | {"objective": tree["objective"] | {"preset": name}}))
    for arguments in ([*preset, *words], [*words, *preset], [*preset, "--config", str(file)],
                      ["--config", str(file), *preset, *words], ["--config", str(both)],
                      [*words, "--config", str(other), *preset]):  # fmt: skip
        got = parse_config([*BASE, *arguments])
        expected = PRESETS[name] | overrides
        assert {key: value(got, key) for key in expected} == expected
    # A preset on the command line wins over a file, or the file's objective would silently be trained.
    got = parse_config([*BASE, "--config", str(file), *preset])
    assert {key: value(got, key) for key in PRESETS[name]} == PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_the_command_line_leaves_nothing_of_the_files_objective(name, tmp_path):
    others = {"preset": "opsd", "advantage": "outcome", "entropy_normalization": "log_vocab", "loss": "ppo",
              "loss_normalization": "fixed", "advantage_std": False, "function": "f.py:F", "options": {"a": 1},
              "importance_cap": 3.0, "score_temperature": 0.5, "mix_decay_steps": 7}  # fmt: skip
    default = ObjectiveConfig()
    others |= {
        key: value + 1 if isinstance(value, int) else value / 2 + 0.125
        for key, value in vars(default).items()
        if key not in others
    }
    assert all(others[key] != value for key, value in vars(default).items())
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"objective": others}))
    config = parse_config([*BASE, "--config", str(file), "--objective.preset", name])
    assert config.objective == preset_objective(name)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("qwen3_*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_the_place_of_the_examples_objective(name, file):
    config = parse_config(["--config", str(file), "--objective.preset", name])
    assert config.objective == preset_objective(name)


def test_the_defaults_are_the_papers_cl_egrsd():
    default, preset = parse_config(BASE), parse_config([*BASE, "--objective.preset", "cl_egrsd"])
    assert replace(preset.objective, preset="") == default.objective == ObjectiveConfig()
    assert (preset.teacher, preset.rollout) == (default.teacher, default.rollout)
    assert default.objective.entropy_normalization == "batch_max" and default.objective.gate_floor == 0.1
    assert list(presets()) == list(PRESETS)
    assert preset_objective("egrsd", mix=0.25).mix == 0.25


def test_every_preset_has_a_printed_name_and_is_in_the_help():
    assert NAMES.keys() - {"run"} == presets().keys()  # "run" is an objective that is none of them
    said = ObjectiveConfig.__doc__.partition("    preset: ")[2].partition("    mix: ")[0]
    assert presets().keys() <= set(re.findall(r"\w+", said))


def test_options_of_a_preset_are_overridden_one_by_one_and_another_preset_drops_them(tmp_path):
    words = ["--objective.preset", "opsd", "--objective.options.entry_clip", "0.1"]
    assert parse_config([*BASE, *words]).objective.options == {"kind": "forward_kl", "entry_clip": 0.1}
    file = tmp_path / "config.yaml"
    file.write_text("objective: {preset: opsd, options: {entry_clip: 0.2}}\n")
    before = parse_config([*BASE, *words[2:], "--config", str(file), *words[:2]])
    assert before.objective.options == {"kind": "forward_kl", "entry_clip": 0.1}
    config = parse_config([*BASE, "--config", str(file)])
    assert load_objective(config.objective).divergence == DivergenceForm("forward_kl", 0.2)
    config = parse_config([*BASE, "--config", str(file), "--objective.preset", "egrsd"])
    assert config.objective == preset_objective("egrsd")


@pytest.mark.parametrize("advantage", ["running", "outcome"])
def test_one_response_a_prompt_is_enough_without_groups(advantage):
    config = parse_config([*BASE, "--objective.advantage", advantage, "--rollout.rollouts_per_prompt", "1"])
    assert config.rollout.rollouts_per_prompt == 1


def test_the_paper_has_a_grpo_with_the_running_advantage():
    words = ["--objective.preset", "grpo", "--objective.advantage", "running", "--rollout.rollouts_per_prompt", "1"]
    assert parse_config([*BASE, *words]).objective.loss == "ppo"


def test_the_scoring_temperature_is_that_of_sampling_unless_it_is_set():
    sampling = [*BASE, "--rollout.temperature", "1.1"]
    assert parse_config(sampling).score_temperature == 1.1
    apart = parse_config([*sampling, "--objective.score_temperature", "1"])
    assert apart.score_temperature == 1 and apart.log_prob_limit == math.inf
    assert parse_config([*sampling, *CAP, "--objective.score_temperature", "1.1"]).log_prob_limit == 0.1


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "context", "prompts", "expected"),
    [(1, 1, 1, 1, 1, 1), (8, 2, 2, 1, 4, 2), (4, 2, 2, 1, 3, 1), (6, 2, 1, 1, 3, 3), (3, 2, 1, 1, 4, None),
     (8, 1, 1, 1, 3, None), (16, 2, 2, 2, 4, 2), (4, 2, 1, 2, 3, 1), (4, 2, 2, 2, 4, None)],
)  # fmt: skip
def test_world_size_arithmetic(world, tensor, pipeline, context, prompts, expected):
    config = parse_config(
        [
            *BASE,
            "--parallel.tensor",
            str(tensor),
            "--parallel.pipeline",
            str(pipeline),
            "--parallel.context",
            str(context),
            "--rollout.prompts_per_step",
            str(prompts),
            "--rollout.rollouts_per_prompt",
            "2",
        ]
    )
    if expected:
        assert config.check_world(world) == expected
    else:
        with pytest.raises(BadArgument, match="do not divide"):
            config.check_world(world)


def test_every_key_is_on_the_command_line():
    keys = valid_keys()
    assert {"steps", "objective.lookahead", "rollout.servers.args", "data.reward"} <= set(keys)
    assert Config(ModelConfig("m"), DataConfig(train="t.jsonl")) == parse_config(BASE)


def test_the_page_of_every_key_is_current():
    path = "docs/reference/configuration.md"
    text = page()
    assert all(f"| `{key}` |" in text or f"## {key}\n" in text for key in valid_keys())
    stale = f"{path} is stale; regenerate it: python -m megatron_egrsd.config.page > {path}"
    assert (Path(__file__).parents[2] / path).read_text() == text, stale


@pytest.mark.parametrize(
    ("parallel", "multiple"),
    [
        ({}, 1),
        ({"tensor": 4}, 1),
        ({"tensor": 4, "sequence_parallel": True}, 4),
        ({"context": 2, "tensor": 4, "sequence_parallel": True}, 16),
        ({"context": 2, "tensor": 4, "sequence_parallel": True, "megatron": {"fp8": "hybrid"}}, 512),
        ({"megatron": {"fp8": "hybrid"}}, 32),
    ],
)
def test_every_rank_gets_the_rows_that_its_products_want(parallel, multiple):
    """FP8 needs multiples of 32 rows on each of the context- and sequence-parallel ranks."""
    assert ParallelConfig(**parallel).token_multiple == multiple


def test_old_keys_work_on_the_command_line_and_in_yaml(tmp_path):
    default, values = parse_config(BASE), {}
    for old, new in RENAMED.items():
        kind = type(functools.reduce(getattr, new.split("."), default))
        values[old] = {bool: True, int: 2, float: 7.5, list: ["x"], dict: {"x": 1}, str: "x"}[kind]
    values |= {"rollout.weight_sync": "ipc", "evaluation.deterministic": False, "rollout.urls": []}
    values |= {"rollout.lora_sync": "adapter", "rollout.temperature": 0.5}  # the latter keeps its name
    tree = {section: {k.partition(".")[2]: v for k, v in values.items() if k.startswith(section)}
            for section in ("objective", "rollout", "evaluation")}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    words = [w for k, v in values.items() for w in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]
    config = parse_config(BASE + words)
    assert config == parse_config([*BASE, "--config", str(tmp_path / "config.yaml")])
    for old, value in values.items():
        assert functools.reduce(getattr, RENAMED.get(old, old).split("."), config) == value


def test_old_keys_stand_beside_new_ones_and_mistakes_name_the_new(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("rollout: {server_args: {a: 1}, port: 5, servers: {host: h}}\n")
    servers = parse_config([*BASE, "--config", str(file), "--rollout.server_args.b", "2", "--rollout.urls=[http://u]"])
    servers = servers.rollout.servers
    assert (servers.args, servers.host, servers.port, servers.urls) == ({"a": 1, "b": 2}, "h", 5, ["http://u"])
    assert parse_error([*BASE, "--rollout.port", "x"]).startswith("rollout.servers.port is 'x'")
    assert "did you mean rollout.servers.args?" in parse_error([*BASE, "--parallel.server_args", "1"])


def test_latex_in_templates_is_text():
    """LaTeX is full of braces; only a misspelt placeholder is refused."""
    for text in (
        r"Put your final answer within \boxed{}.",
        r"\boxed{answers}, \text{solutions}",
        r"\frac{1}{2}",
        "{}",
        "{ }",
    ):
        config = DataConfig(
            teacher_template=f"{{problem}}\n{{solution}}\n{text}", student_template=f"{{problem}} {text}"
        )
        assert text in config.teacher_template
    for text in ("{solutions}", "{Problem}"):
        with pytest.raises(BadArgument, match="did you mean"):
            DataConfig(teacher_template=f"{{problem}} {{solution}} {text}")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("optimizer.beta1", "1.5", "optimizer.beta1 is 1.5; it must lie in [0, 1)"),
        ("optimizer.beta2", "-0.1", "optimizer.beta2 is -0.1; it must lie in [0, 1)"),
        ("optimizer.eps", "0", "optimizer.eps is 0.0; it must be positive"),
        ("optimizer.weight_decay", "-1", "optimizer.weight_decay is -1.0; it must not be negative"),
        ("optimizer.clip_grad", "-1", "optimizer.clip_grad is -1.0; it must not be negative"),
        ("optimizer.lr", ".inf", "optimizer.lr is inf; it must be a finite number"),
        ("optimizer.lr", ".nan", "optimizer.lr is nan; it must be positive"),
        ("objective.advantage_baseline", ".nan", "objective.advantage_baseline is nan; it must be a finite number"),
        ("rollout.sync.timeout", ".inf", "rollout.sync.timeout is inf; it must be a finite number"),
        ("max_log_prob_difference", "-1", "max_log_prob_difference is -1.0; it must be positive"),
        ("seed", "-1", "seed is -1; it must lie in [0, 2^31)"),
        (
            "rollout.servers.urls",
            '["localhost:30000"]',
            "'localhost:30000', which is no address; write http://localhost:30000",
        ),
        ("rollout.servers.urls", '["ftp://a:1"]', "'ftp://a:1', which is no address; write http://a:1"),
        ("rollout.servers.urls", '["http://"]', "which is no address"),
    ],
)
def test_values_that_torch_or_megatron_core_would_refuse_later(key, value, reason):
    assert reason in parse_error([*BASE, f"--{key}", value])


def test_home_is_expanded_wherever_a_path_is_taken(monkeypatch, tmp_path):
    """A shell leaves --output=~/run as it is, and YAML has no shell."""
    monkeypatch.setenv("HOME", "/home/me")
    words = [f"--{key}=~/x:y" for key in PATHS if key != "evaluation.benchmarks.sets"]
    config = parse_config(
        [*words, "--debug=train-only", '--evaluation.benchmarks.sets=["~/a.jsonl","b=~/b.jsonl","c~d"]']
    )
    assert {"objective.function", "data.reward", "data.teacher_context"} <= {*PATHS}  # import paths may name a file
    for key in PATHS[:-1]:
        assert functools.reduce(getattr, key.split("."), config) == "/home/me/x:y", key
    assert config.evaluation.benchmarks.sets == ["/home/me/a.jsonl", "b=/home/me/b.jsonl", "c~d"]
    parser = Parser()
    parser.add_argument("file", type=path)
    assert parser.parse_args(["~/f"]).file == Path("/home/me/f")

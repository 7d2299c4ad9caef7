"""EGRSD and CL-EGRSD: the training loop. Every rank runs this file; rank 0 alone speaks to SGLang.

Each step: the student samples n responses to each prompt and they are rewarded (sampling/); `learn` takes the direction
from the rewards, the magnitude and the gate from the teacher, and updates the weights (learn.py); the new weights go
into SGLang, checked by version (run/rollout_source.py). One step off, the next batch is sampled meanwhile.
"""

from megatron_egrsd.config import Config
from megatron_egrsd.engine.build import build_engine
from megatron_egrsd.errors import RunError
from megatron_egrsd.learn import learn
from megatron_egrsd.objectives.load import needs_teacher
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.rollout.process_group import use_sglangs_nccl_settings
from megatron_egrsd.run.agreement import facts
from megatron_egrsd.run.preemption import Preemption
from megatron_egrsd.run.rollout_only import rollout_only
from megatron_egrsd.run.session import open_session
from megatron_egrsd.run.stopwatch import Stopwatch


def main(config: Config) -> None:
    """Train as `config` says.

    Raises BadArgument if the run cannot work; nothing was started then. Raises RunError if something failed later: on
    every rank alike, between two updates, and after the state was saved.
    """
    prompts, heldout, tokenizer = prepare(config)
    if config.debug == "rollout-only":
        rollout_only(config, prompts, tokenizer)
        return
    if config.rollout.sync.transport == "distributed":
        use_sglangs_nccl_settings()
    with (
        build_engine(config, facts(config, prompts), needs_teacher=needs_teacher(config.objective)) as engine,
        Preemption() as preemption,
        open_session(config, engine, tokenizer, preemption) as session,
    ):
        step = session.resume()
        preemption.save_on_interrupt()
        try:
            # A run that was stopped while it evaluated has saved the step, but not its evaluation.
            missed = step > 0 and _is_due(step, config.evaluation.every or config.steps, config.steps)
            if config.evaluation.at_start or missed:
                session.evaluate(heldout, step)
            while step < config.steps:
                session.check_preemption()
                session.checkpoints.publish()
                watch = Stopwatch()
                with watch("time/step"):
                    with watch("time/wait"):
                        batch = session.rollouts.batch(prompts, step)
                    recorder = session.recorder(step + 1, batch.rollouts)
                    metrics, session.history = learn(engine, batch.rollouts, config, recorder, session.history)
                    step += 1
                    session.check_update(step, batch.rollouts, metrics)
                    session.rollouts.push_weights(step, watch)
                metrics |= {"batch/sampled": batch.sampled, "time/generate": batch.seconds} | watch.seconds
                session.report(step, batch.rollouts, metrics)
                if _is_due(step, config.evaluation.every or config.steps, config.steps):
                    session.evaluate(heldout, step)
                if _is_due(step, config.checkpoint.every, config.steps):
                    session.save(step)
            session.checkpoints.publish(wait=True)
        except RunError as error:
            raise session.stopped(error, step) from error
        session.finish()


def _is_due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)

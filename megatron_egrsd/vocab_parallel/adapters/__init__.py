"""The loss at the signatures of other projects, each with an `install()` that puts it where the project looks.

megatron_lm, slime, miles, verl, nemo_rl, areal. None of them imports its project: `install()` acts on the project's
modules, when they are imported or if they are already. `docs/guides/reuse.md` has the lines to add to each.
"""

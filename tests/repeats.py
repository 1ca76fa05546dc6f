"""Whether a call by its plan is one by its launcher."""

from cases import fused, run

from tritattn import _library, _replay


def plans(patch):
    """No plans from before; a function that says how many there are now, and why others could not be made."""
    for family in _library._families.values():
        patch.setattr(family, "plans", {})

    def found():
        every = [plan for family in _library._families.values() for plan in family.plans.values()]
        return sum(isinstance(plan, _replay.Plan) for plan in every), [plan for plan in every if isinstance(plan, str)]

    return found


def no_launcher(patch):
    """From now on no launcher runs."""

    def refuse(*args):
        raise AssertionError("a launcher ran")

    for family in _library._families.values():
        patch.setattr(family, "launch", refuse)
        patch.setattr(family, "backward", refuse)


def check_third_call(op, made, activation, patch):
    """The third call of a kind has the bits that its launcher would have given it. made: a seed -> inputs of the kind."""
    others = made(2)
    with _replay.off():
        expected = run(fused, op, made(2), activation)
    found = plans(patch)
    for seed in (3, 1):
        run(fused, op, made(seed), activation)
    count, problems = found()
    assert count and not problems, problems
    with patch.context() as refusing:
        no_launcher(refusing)
        got = run(fused, op, others, activation)
    for name, value in expected.items():
        assert got[name].equal(value) and got[name].stride() == value.stride(), name

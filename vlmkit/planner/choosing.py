"""The choice: a format for each part, with the least damage within a number of bytes.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems,
2004, chapter 11). Part after part, every sum of bytes that can be reached is kept with the least
damage at which it can be, and a sum that costs more bytes and no less damage than another is
dropped. That is exact, and quick, since the layers of a model have few different sizes.
"""


def least_damage(sizes, damages, room):
    """The choice with the least sum of damages whose sizes sum to at most `room`: {part: option}.

    sizes, damages: {part: {option: whole number of bytes}} and {part: {option: number}}. Of equal
    damages the fewer bytes are taken. None if nothing fits.
    """
    least = {part: min(options.values()) for part, options in sizes.items()}
    rest = sum(least.values())
    states = [(0, 0.0, None)]  # bytes, damage, and how it came about: (state before, option)
    for part, options in sizes.items():
        rest -= least[part]
        reached = [
            (state[0] + size, state[1] + damages[part][option], (state, option))
            for state in states
            for option, size in options.items()
            if state[0] + size + rest <= room
        ]
        reached.sort(key=lambda state: state[:2])
        states = []
        for state in reached:
            if not states or state[1] < states[-1][1]:
                states.append(state)
    if not states:
        return None
    chosen, state = [], states[-1]
    while state[2] is not None:
        state, option = state[2]
        chosen.append(option)
    return dict(zip(sizes, reversed(chosen), strict=True))

"""Chapter 05: it runs on another family, and its claims about the recorded results are true.

After a change of pebble's weights, `make benchmark-damage` records again. The tests that then fail
say which claims of the chapter are no longer true.
"""

from itertools import permutations, product

import chapters
import matplotlib
import pandas as pd
import pytest
from chapters import cell

import vlmkit as vk
from vlmkit.evaluation import mcnemar

BENCHMARK = "damage.py"
VISION, PROJECTOR, LANGUAGE = SINGLE = ("vision_encoder", "projector", "language_model")
WHOLE = " + ".join(SINGLE)
KINDS = 19  # of question, in all tasks


class Damage:
    """damage(scope, format): change in points; .p(...): of the exact paired test."""

    def __init__(self, rows):
        self.rows = rows.groupby(["scope", "format"])[["n", "right", "regressions", "fixes"]].sum()

    def __call__(self, scope, format):
        row = self.rows.loc[(scope, format)]
        return 100 * (row["fixes"] - row["regressions"]) / row["n"]

    def changed(self, scope, format):
        return [int(n) for n in self.rows.loc[(scope, format), ["regressions", "fixes"]]]

    def p(self, scope, format):
        return mcnemar(*self.changed(scope, format))

    def by_chance(self, scope, format):
        return self.p(scope, format) >= 0.05


@pytest.fixture(scope="module")
def damage(recorded):
    return Damage(recorded[recorded["seed"] == recorded["seed"].min()])


@pytest.fixture(scope="module")
def fine(recorded):
    """The damage to questions that need fine sight: printed text, and the value of a bar."""
    first = recorded[recorded["seed"] == recorded["seed"].min()]
    return Damage(first[(first["task"] == "ocr") | (first["kind"] == "value")])


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With fewer questions, and with the untrained model's own answers as the right ones."""
    four = "max_new_tokens=4"  # the default would allow more, because the answers are longer
    chapters.replace(
        notebook,
        (
            "few, scopes = questions.select(range(len(questions) // 2))",
            "few, scopes = questions.select(range(6))",
        ),
        ("tried, [scope])", f"tried, [scope], {four})"),
        ("in_activations, scopes)", f"in_activations, scopes, {four})"),
        ("formats, components)", f"formats, components, {four})"),
        ("processor, questions)", f"processor, questions, {four})"),
        ("n=240", "n=120"),
    )
    start = chapters.cell(notebook, "components = ")
    first, last = start.source.split("questions = vk.course.in_its_words", 1)
    start.source = first + (
        f"scores = vk.evaluate(model, processor, questions, {four})"
        '\nanswers = scores.answers["predicted"].tolist()'
        '\nquestions = questions.remove_columns("answer").add_column("answer", answers)\n'
        + last.partition("\n")[2]
    )
    assert "pebble, int2: most is lost by" in chapters.run(notebook, other_family, monkeypatch)


def test_the_record_is_complete(benchmark, recorded):
    scopes = {
        " + ".join([scope] if isinstance(scope, str) else scope)
        for scope in benchmark["scopes_of"](SINGLE)
    }
    assert len(scopes) == 7
    first, *others = benchmark["SEEDS"]
    expected = {(first, s, f) for s in scopes for f in benchmark["FORMATS"]}
    expected |= {(seed, s, f) for seed in others for s in SINGLE for f in benchmark["FEW"]}
    expected |= {(first, str(control), "int2") for control in benchmark["controls"]()}
    cells = recorded.groupby(["seed", "scope", "format"])
    assert set(cells.groups) == expected
    assert set(cells.size()) == {KINDS} and set(cells["n"].sum()) == {1000}
    assert (recorded["right"] <= recorded["n"]).all() and (recorded["kl"] > -1e-4).all()


def test_recorded_bits_and_bytes_are_the_formats(recorded):
    model, _ = vk.load("pebble", "bf16", processor=False)
    for (scope, format), rows in recorded.groupby(["scope", "format"]):
        if scope in SINGLE:
            rounded = vk.sensitivity.quantized(model, scope, format)
            assert set(rows["bytes_saved"]) == {rounded.bytes_saved}
            assert set(rows["bits"]) == {round(rounded.effective_bits, 4)}


def test_claims_about_four_bits(damage, fine, states):
    """In groups, 4 bits cost nothing beyond chance; with one step a weight, the vision encoder."""
    for of in (damage, fine):
        for format in ("int8", "nf4", "int4"):
            assert all(of.by_chance(scope, format) for scope in SINGLE), format
    states(*damage.changed(VISION, "int4-tensor"), f"{damage.p(VISION, 'int4-tensor'):.3f}")
    states(f"{damage(VISION, 'int4-tensor'):.1f}")
    undecided = damage.p(VISION, "fp4")
    states(*damage.changed(VISION, "fp4"), f"{undecided:.2f}", f"{1 / undecided:.0f}")
    lost, won = damage.changed(VISION, "fp4")
    assert vk.sensitivity.paired_interval(lost, won, 1000)[1] < 0  # and still p is above 0.05


def test_claims_about_the_exact_test(states):
    states(f"{mcnemar(5, 0):.4f}", f"{1 / mcnemar(5, 0):.0f}", f"{mcnemar(6, 0):.3f}")


def test_claims_about_fewer_bits(damage, fine, states):
    for change in (damage(VISION, "int3"), fine(VISION, "int3"), damage(LANGUAGE, "int2-asym")):
        states(f"{change:.0f}")  # two, seven, two
    assert damage(VISION, "int2-asym") == pytest.approx(-100 / 6, abs=1)  # a sixth
    assert -50 < fine(VISION, "int2-asym") < -45  # nearly half
    assert damage(LANGUAGE, "int2") == pytest.approx(-25, abs=2)  # a quarter
    assert fine.by_chance(LANGUAGE, "int2-asym")
    assert damage(VISION, "int2") == pytest.approx(-100 * 2 / 3, abs=3)  # two thirds


def test_claims_about_the_rule(damage, fine, states):
    kept = f"{PROJECTOR} + {LANGUAGE}"
    for of in (damage, fine):
        assert all(of.by_chance(scope, "int4") for scope in (WHOLE, kept, LANGUAGE))
    for format in ("int3", "int2-asym"):  # keeping the vision encoder saves four fifths
        assert damage(kept, format) / damage(WHOLE, format) == pytest.approx(0.2, abs=0.05)

    def worth(format):
        """The points that keeping the projector saves."""
        return damage(f"{VISION} + {LANGUAGE}", format) - damage(WHOLE, format)

    assert all(abs(worth(format)) < 1 for format in ("int4", "int3"))
    states(f"{worth('int2-asym'):.0f}", f"{worth('int2'):.0f}", f"{damage(WHOLE, 'int2-asym'):.0f}")
    assert damage(WHOLE, "int2") < -70  # "in ruins"


def test_claims_about_bytes(recorded, damage, states):
    saved = recorded.groupby(["scope", "format"])["bytes_saved"].first() / 1e6
    assert (saved[LANGUAGE] / saved[VISION]).min() > 3
    few = ("int4", "int3", "int2-asym", "int2")
    assert all(damage(LANGUAGE, format) > damage(VISION, format) for format in few)
    states(f"{saved[LANGUAGE, 'int2-asym']:.1f}", f"{saved[VISION, 'int4']:.1f}")
    states(f"{saved[PROJECTOR, 'int3']:.1f}")
    states(f"{saved[VISION, 'int2-asym'] - saved[VISION, 'int4']:.1f}")
    states(f"{damage(VISION, 'int4') - damage(VISION, 'int2-asym'):.0f}")
    assert (saved[LANGUAGE] / saved[PROJECTOR]).between(38, 46).all()  # forty times


def test_claims_about_the_controls(recorded, damage, states):
    def worst_and_best(of, like):
        drawn = [f"{of}, as many as {like}, seed {seed}" for seed in range(5)]
        points = [damage(scope, "int2") for scope in drawn]
        return min(points), max(points)

    whole = damage(PROJECTOR, "int2")
    sizes = recorded.groupby("scope")["parameters"].first()
    states(f"{whole:.0f}")
    assert sizes[PROJECTOR] / sum(sizes[scope] for scope in SINGLE) < 0.02
    low, high = worst_and_best(VISION, PROJECTOR)
    assert low > whole / 2 and (low + high) / 2 == pytest.approx(whole / 6, abs=0.3)  # a sixth
    assert worst_and_best(LANGUAGE, PROJECTOR)[0] > -1
    assert worst_and_best(LANGUAGE, VISION) == pytest.approx((-1, -1), abs=0.4)


def test_claims_about_other_questions(recorded, states):
    bits = recorded.groupby("format")["bits"].first()
    assert bits["int2-asym"] - bits["int2"] < 0.05
    seeds = [Damage(rows) for _, rows in recorded.groupby("seed")]
    for of in seeds:
        assert all(of(scope, "int2-asym") > of(scope, "int2") / 2 for scope in SINGLE)
        for format in ("int3", "int2-asym", "int2"):
            assert min(SINGLE, key=lambda scope: of(scope, format)) == VISION
    assert [of.by_chance(VISION, "int3") for of in seeds] == [False, True, False]
    states(*seeds[1].changed(VISION, "int3"), f"{seeds[1].p(VISION, 'int3'):.2f}")
    states(*(f"{of(VISION, 'int3'):.1f}" for of in seeds))


@pytest.mark.slow
def test_claims_about_the_live_figures(notebook):
    """Figures 3 and 8 again, by the notebook's own cells: two minutes."""
    matplotlib.use("agg")
    scope = {}
    starts = ("import pandas", "name = vk.", "components = ", "formats = ", "few, scopes = ")
    for start in starts:
        exec(cell(notebook, start).source, scope)
    table = scope["table"].set_index(["scope", "format"])
    chance = table["p"] >= 0.05
    assert chance.xs("int4", level="format").all() and chance.xs("int3", level="format").all()
    points = 100 * table["difference"].unstack()
    assert (points[["int2-asym", "int2"]].idxmin() == VISION).all()
    assert not chance[VISION, "int2-asym"]
    assert (points["int2-asym"] - points["int2"] > 5).all()
    lost, won = (int((a & ~b).sum()) for a, b in permutations((scope["before"], scope["after"])))
    counts = table.loc[(PROJECTOR, "int2"), ["regressions", "fixes"]]
    assert tuple(counts) == (lost, won)  # by hand and by `sweep`
    found = scope["with_outliers"].set_index(["scope", "format"])
    chance = found["p"] >= 0.05
    assert chance[VISION].all() and chance[LANGUAGE].all()
    for component in (VISION, LANGUAGE):
        points = 100 * found["difference"][f"{component}, outliers"]
        assert points["int4-row"] < -10 and chance[f"{component}, outliers", "int4-g16"]
    assert 100 * found["difference"][f"{VISION}, outliers", "int8-act-tensor"] < -10
    assert chance[f"{VISION}, outliers", "int8-act-token"]
    assert not chance[f"{VISION}, outliers", "int8-act-tensor"]
    assert not chance[f"{VISION}, outliers", "int4"] and chance[f"{LANGUAGE}, outliers", "int4"]
    changed = found.loc[(f"{LANGUAGE}, outliers", "int8-act-tensor"), ["regressions", "fixes"]]
    assert tuple(changed) == (6, 1)
    assert round(mcnemar(*changed), 3) == 0.125


@pytest.mark.slow
def test_the_benchmark_counts_answers_as_evaluate_does(benchmark, tmp_path, monkeypatch):
    """With few questions and cells."""
    output = tmp_path / "new" / "trial.csv"
    main = benchmark["main"]
    small = {"FORMATS": ("int2",), "FEW": ("int2",), "COMPONENTS": (PROJECTOR,), "DRAWS": range(1)}
    for name, value in small.items():
        monkeypatch.setitem(main.__globals__, name, value)
    main(["--n", "24", "--output", str(output)])
    table = pd.read_csv(output)
    first = table[(table["seed"] == benchmark["SEEDS"][0]) & (table["scope"] == PROJECTOR)]
    model, processor = vk.load("pebble", "bf16")
    questions = vk.tasks.dataset("all", n=24, seed=benchmark["SEEDS"][0])
    before = vk.evaluate(model, processor, questions)
    with vk.sensitivity.quantized(model, PROJECTOR, "int2"):
        after = vk.evaluate(model, processor, questions)
    before, after = (scores.answers["correct"] for scores in (before, after))
    assert first["right"].sum() == after.sum() and first["n"].sum() == 24
    assert first["regressions"].sum() == (before & ~after).sum()
    assert first["fixes"].sum() == (after & ~before).sum()
    assert len(set(table["scope"])) == 4 and set(table["weights"]) == {benchmark["digest"]()}


# --- cobble ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cobble(benchmark):
    """The recorded damage to cobble, which has to be of the weights that are committed."""
    table = pd.read_csv(benchmark["COBBLE"])
    assert set(table["weights"]) == {benchmark["digest"]("cobble-bf16")}
    return table


def test_the_record_of_cobble_is_complete(benchmark, cobble):
    cells = cobble.groupby(["scope", "format"])
    assert set(cells.groups) == {(s, f) for s in SINGLE for f in benchmark["COBBLES"]}
    assert set(cobble["n"]) == {150} and set(cobble["task"]) == {"handwriting", "photographs"}


def test_claims_about_cobbles_matrix(cobble, damage, states):
    """The order is the opposite of pebble's."""
    of = Damage(cobble)
    for format in ("nf4", "int4", "int3"):
        assert min(SINGLE, key=lambda scope: of(scope, format)) == LANGUAGE
        assert not of.by_chance(LANGUAGE, format) and of.by_chance(PROJECTOR, format)
    unchanged = of.rows.xs("int8", level="format")
    assert not unchanged[["regressions", "fixes"]].any(axis=None)
    nf4 = of.rows.loc[(LANGUAGE, "nf4")]
    states(nf4["regressions"], nf4["fixes"], nf4["n"], f"{of(LANGUAGE, 'nf4'):.1f}")
    assert not of.rows.loc[[(LANGUAGE, f) for f in ("int4", "int3")], "right"].any()
    assert all(of.by_chance(VISION, format) for format in ("nf4", "int4", "int3"))
    assert of(VISION, "int2") < -50
    for format in ("int3", "int2-asym", "int2"):
        assert min(SINGLE, key=lambda scope: damage(scope, format)) == VISION


def test_claims_about_names_in_free_text(benchmark, states):
    from vlmkit.models.cobble import recipe

    grid = pd.read_csv(benchmark["DATA"].parent.parent / "benchmarks" / "results" / "recipe.csv")
    trained = grid["trained_vision"].eq("bf16") & grid["trained_language"].eq("bf16")
    grid = grid[trained & grid["question"].eq("name")]
    grid = grid[grid["hidden"].eq(recipe.LANGUAGE_WIDTH)]
    cells = grid.groupby(["asked_vision", "asked_projector", "asked_language"])
    sums = cells[["right", "n"]].sum()
    assert set(cells["seed"].nunique()) == {3} and set(grid["n"]) == {2000}
    share = 100 * sums["right"] / sums["n"]
    whole = share["bf16", "bf16", "bf16"]
    states(f"{whole - share['bf16', 'bf16', 'nf4']:.0f}")
    states(f"{whole - share['bf16', 'bf16', 'int4']:.0f}")
    assert share["bf16", "bf16", "int3"] < 0.1
    assert whole - share["int3", "bf16", "bf16"] == pytest.approx(2, abs=0.5)
    assert whole - share["bf16", "int3", "bf16"] < 0.2


def test_claims_about_outliers(benchmark, states):
    channels = pd.read_csv(benchmark["DATA"] / benchmark["OUTLIERS"])
    names = {name: benchmark["digest"](name) for name in ("cobble-bf16", "pebble")}
    assert dict(zip(channels["model"], channels["weights"], strict=True)) == names
    times = (channels["largest"] / channels["median"]).groupby(
        [channels["model"], channels["layer"], channels["linear"]]
    )
    times = times.max()
    for layer in (11, 28):
        states(f"{times['cobble-bf16', layer, 'mlp.down_proj']:.0f}")
    states(f"{times['pebble'].max():.0f}")
    assert times["pebble"].max() < 24


# --- BLIP-2, published ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip2():
    """{quantizer: CIDEr by the bits of the three components}, arXiv 2601.15287."""
    table = pd.read_csv(chapters.FOLDER / "data" / "05_blip2.csv")
    return {
        name: rows.set_index(list(SINGLE))["cider"] for name, rows in table.groupby("quantizer")
    }


def test_the_published_grid_is_complete(blip2):
    widths = (2, 3, 4, 5, 6, 8, 16)
    assert set(blip2["AWQ"].index) == set(product(widths, repeat=3))
    assert set(blip2["GPTQ"].index) == set(product(widths, widths, widths[1:]))
    assert not any(cider.index.duplicated().any() for cider in blip2.values())


def test_claims_about_the_published_grid(blip2, states):
    errors = {}
    for name, cider in blip2.items():
        whole = cider[16, 16, 16]
        states(f"{whole:.3f}")
        vision, language = ([cider[b, 16, 16] for b in (3, 4)], [cider[16, 16, b] for b in (3, 4)])
        assert max(language) < min(vision)  # the language model is the weak component
        rows = []
        for v, p, t in cider.index:
            if min(v, p, t) >= 3:
                each = (cider[v, 16, 16], cider[16, p, 16], cider[16, 16, t])
                rows.append((sum(whole - one for one in each), whole - cider[v, p, t]))
        losses = pd.DataFrame(rows)
        errors[name] = (losses[0] - losses[1]).abs().mean()
        states(len(losses), f"{losses.corr().loc[0, 1]:.3f}")
    states(f"{errors['AWQ']:.3f}", f"{errors['GPTQ']:.2f}")
    assert errors["GPTQ"] / errors["AWQ"] == pytest.approx(10, abs=1)
    states(f"{100 * blip2['AWQ'][2, 16, 16] / blip2['AWQ'][16, 16, 16]:.0f}")
    assert blip2["GPTQ"][2, 16, 16] < 0.01


def test_claims_about_the_noise_of_the_published_grid(blip2, states):
    spread = {}
    for name, cider in blip2.items():
        whole = pd.Series([score for key, score in cider.items() if min(key) >= 6])
        spread[name] = whole.std()
        above = (whole > cider[16, 16, 16]).mean()
        assert above > 0.5 if name == "GPTQ" else above < 0.1
        states(f"{whole.std():.3f}")
    assert spread["GPTQ"] / spread["AWQ"] == pytest.approx(3, abs=0.2)
    # Errors of four such scores, three in the sum and one in the joint loss: about 0.05
    assert 2 * spread["GPTQ"] * (2 / 3.14159) ** 0.5 == pytest.approx(0.05, abs=0.003)

"""The rules: published guidance on the temperature with its conditions, and ours, which a sample of rows can decide.

They say what is worth a place in a sweep, never which temperature wins: no source predicts that for a language model. The
findings of "A Unified Revisit of Temperature in Classification-Based Knowledge Distillation" (arXiv 2603.02430) are of image
classification; its thresholds are not published, so those here are ours and are called so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dts_hf.advice.measured import MOST_SUPPORT, Estimate, Measured, Situation
from dts_hf.advice.rules import Finding, Judged, Rule, above, below, either, every, fact, judge
from dts_hf.teachers.compact import LEAST_MASS

REVISIT = "arXiv 2603.02430, finding {}"
IMAGES = "image classification only"
PUBLISHED = "published, one paper, direction only"
OURS = "ours, not validated"
ARITHMETIC = "arithmetic"
ANY = "any teacher"
LANGUAGE = "language models"

#: Thresholds, all ours: share of held-out over training cross-entropy, difference of confidence and accuracy, shares of the
#: gradient, nats, classes, epochs, and how far below the logarithm of their number the other classes' entropy must lie.
OVERFITTED, MISCALIBRATED, LEAST_SHARE, NO_GAP, NEAR = 1.5, 0.05, 0.05, 0.05, 0.05
FINE, COARSE, LONG, RELATED = 50, 10, 10.0, 0.9
LARGE_T = 10.0


def advise_on(found: Measured) -> list[Judged]:
    """Every rule, judged on one sample, in the order of ``RULES``."""
    return [judge(rule, found) for rule in RULES]


# ------------------------------------------------------------------------------------------------- where a rule applies


def _heads(situation: Situation) -> str:
    return "" if situation.classifier else "about sets of labels, and a vocabulary is none"


def _language_models(situation: Situation) -> str:
    return "a classifier has few classes" if situation.classifier else ""


def _relational(situation: Situation) -> str:
    return _heads(situation) or ("two classes have no others to relate" if situation.classes < 3 else "")


def _labelled(situation: Situation) -> str:
    return (
        "the labels are the teacher's own answers, of which it is right by definition" if situation.own_answers else ""
    )


def _with_labels(situation: Situation) -> str:
    return "loss.kd_ratio is 0 or 1: one part alone" if situation.kd_ratio in (0.0, 1.0) else ""


def _of_kl(name: str) -> Callable[[Situation], str]:
    return lambda situation: (
        _language_models(situation)
        or ("" if situation.divergence == name else f"loss.divergence is {situation.divergence}")
    )


def _dts(rule: str) -> Callable[[Situation], str]:
    return lambda situation: (
        "" if (situation.policy, situation.rule) == ("dts", rule) else f"the policy is not dts, rule {rule}"
    )


# ------------------------------------------------------------------------------------------------------ the conditions


def _hot(found: Measured) -> float:
    return min(found.situation.hottest, found.situation.grid[-1])


def _overfitted(found: Measured) -> Finding:
    return above("held-out over training cross-entropy of the teacher", found.values["ce_ratio"], OVERFITTED)


def _calibration(found: Measured, sign: int) -> Finding:
    """Whether the teacher is over-confident (1) or under-confident (-1), on training and on held-out rows alike."""
    compare, limit = (above, MISCALIBRATED) if sign > 0 else (below, -MISCALIBRATED)
    sets = (("training", "over_confidence"), ("held-out", "held_out_over_confidence"))
    return every(
        [compare(f"confidence less accuracy ({where} rows)", found.values[name], limit) for where, name in sets]
    )


def _ceiling(found: Measured) -> Finding:
    entropy = found.at("entropy", found.situation.hottest)
    limit = math.log(MOST_SUPPORT * found.situation.classes)
    verdict, _ = above("", entropy, limit)
    share = math.exp(entropy.value) / found.situation.classes
    return verdict, f"at T = {_hot(found):g} the teacher offers {share:.2%} of {found.situation.classes:,} tokens"


def _enough(found: Measured, temperature: float) -> int | None:
    """The smallest measured size with ``LEAST_MASS``; None: there is none."""
    fits = (size for size in found.sizes if found.at(f"mass_{size}", temperature).low >= LEAST_MASS)
    return next(fits, None)


def _most_mass(found: Measured) -> tuple[str, Estimate]:
    """What the largest measured number of tokens holds at the hottest temperature."""
    largest, hot = found.sizes[-1], _hot(found)
    return f"share of the likeliest {largest:,} tokens at T = {hot:g}", found.at(f"mass_{largest}", hot)


def _cache(found: Measured) -> Finding:
    size = _enough(found, _hot(found))
    if size is None:
        return above(*_most_mass(found), LEAST_MASS)
    return fact(True, f"at T = {_hot(found):g} {size:,} tokens have {LEAST_MASS:g}")


def _no_cache(found: Measured) -> Finding:
    return below(*_most_mass(found), LEAST_MASS)


def _share(found: Measured) -> Finding:
    share = found.at("kd_share", found.situation.hottest)
    name = f"the teacher's share of the gradient at T = {_hot(found):g}"
    return either([below(name, share, LEAST_SHARE), above(name, share, 1.0 - LEAST_SHARE)])


def _melted(found: Measured) -> float:
    """The largest temperature of the grid below ``LARGE_T``."""
    return max(t for t in found.situation.grid if t < LARGE_T)


def _related(found: Measured) -> Finding:
    t, limit = _melted(found), RELATED * math.log(max(found.situation.classes - 1, 2))
    return below(f"entropy among the other classes at T = {t:g}, nats", found.at("other", t), limit)


def _large(found: Measured) -> Finding:
    long = fact(found.situation.epochs >= LONG, f"{found.situation.epochs:.3g} epochs, limit {LONG:g}")
    return every([long, _related(found)])


def _uniform(found: Measured) -> Finding:
    t, limit = _melted(found), RELATED * math.log(max(found.situation.classes - 1, 2))
    return above(f"entropy among the other classes at T = {t:g}, nats", found.at("other", t), limit)


def _calibrated_t(found: Measured) -> dict[str, float]:
    """The temperature of the grid at which the teacher's held-out cross-entropy is lowest."""
    curve = found.curves["held_out_teacher_ce"]
    return {"t": found.situation.grid[min(range(len(curve)), key=lambda place: curve[place].value)]}


def _value(name: str) -> Callable[[Measured], dict[str, float]]:
    return lambda found: {"t": found.values[name].value}


def _is(*names: str) -> Callable[[Measured], Finding]:
    return lambda found: fact(found.situation.student in names, f"the student is {found.situation.student}")


def _optimizer(adam: bool) -> Callable[[Measured], Finding]:
    def test(found: Measured) -> Finding:
        name = found.situation.optimizer
        return fact(("adam" in name) if adam else name.startswith("sgd"), f"training.optim is {name}")

    return test


RULES: tuple[Rule, ...] = (
    # ------------------------------------------------------------------------------------ the Unified Revisit, F1 to F6
    Rule(
        "revisit-f1-fixed-temperature",
        "always",
        "Keep a constant temperature, shared by both models, with KL in every sweep: it was the most robust simple "
        "choice, and no method beat it consistently",
        REVISIT.format("F1"), IMAGES, f"{PUBLISHED}; what 'most robust' ranks is not published", (),
        lambda found: fact(True, "no condition"),
    ),
    Rule(
        "revisit-f2-adamw",
        "training.optim is one of the Adam family",
        "Three temperatures are enough: AdamW was flatter in T than SGD. It hardly sees a factor on the gradient, and "
        "whether the learning rate was tuned for each T is not known, so that may be all there is to it",
        REVISIT.format("F2"), IMAGES, PUBLISHED, (), _optimizer(True),
    ),
    Rule(
        "revisit-f2-sgd",
        "training.optim is SGD",
        "Spread the temperatures wide, five values in place of three, and tune the learning rate for each: with SGD a "
        "small T did better early and a large one late. Whether that is about short and long runs, or about T rising "
        "within a run, is not clear: sweep the length of the run beside T, and add a rising schedule (linear)",
        REVISIT.format("F2"), IMAGES, f"{PUBLISHED}, two readings", (), _optimizer(False),
    ),
    Rule(
        "revisit-f3-large-temperature",
        f"{LONG:g} epochs or more, and at the last T below {LARGE_T:g} the entropy among the other classes is still "
        f"below {RELATED:g} log(V - 1) (thresholds ours)",
        f"Give a temperature of {LARGE_T:g} or more a place: they helped where the teacher relates its classes "
        "strongly and training was long",
        REVISIT.format("F3"), IMAGES, f"{PUBLISHED}; 'strong' has no published threshold", ("train",), _large, _relational,
    ),
    Rule(
        "revisit-f4-fine-labels",
        f"{FINE} classes or more (threshold ours)",
        "Sweep higher temperatures as well (4, 8): fine-grained labels went with a higher T",
        REVISIT.format("F4"), IMAGES, f"{PUBLISHED}; other data sets or super-classes, not known which", (),
        lambda found: fact(found.situation.classes >= FINE, f"{found.situation.classes} classes"), _heads,
    ),
    Rule(
        "revisit-f4-coarse-labels",
        f"{COARSE} classes or fewer (threshold ours)",
        "Sweep low temperatures (1, 1.4, 2): coarse labels went with a lower T",
        REVISIT.format("F4"), IMAGES, f"{PUBLISHED}; other data sets or super-classes, not known which", (),
        lambda found: fact(found.situation.classes <= COARSE, f"{found.situation.classes} classes"), _heads,
    ),
    Rule(
        "revisit-f5-heavy-fine-tuning",
        f"the teacher's cross-entropy on held-out rows is above {OVERFITTED:g} times that on training rows (threshold "
        "ours)",
        "Try an earlier checkpoint of the teacher, or one that was fine-tuned lightly: light fine-tuning of a "
        "pretrained teacher helped, heavy fine-tuning hurt",
        REVISIT.format("F5"), IMAGES, f"{PUBLISHED}; lost relations or over-confidence, not known which",
        ("train", "held_out"), _overfitted, _labelled,
    ),
    Rule(
        "revisit-f6-random-student",
        "the student starts from random weights",
        "Give a larger loss.kd_ratio a place (0.9): a student without pretraining had most to gain from its teacher",
        REVISIT.format("F6"), IMAGES, f"{PUBLISHED}; the ratio is ours", (), _is("random"),
    ),
    Rule(
        "revisit-f6-pretrained-student",
        "the student is pretrained, or cut out of a model that is",
        "Keep an arm of labels alone: a pretrained student gained from its teacher too, but less than a random one",
        REVISIT.format("F6"), IMAGES, PUBLISHED, (), _is("cut", "loaded"),
    ),
    # --------------------------------------------------------------------------------------------------- the teacher
    Rule(
        "over-fitted-teacher",
        f"the teacher's cross-entropy on held-out rows is above {OVERFITTED:g} times that on training rows (threshold "
        "ours)",
        "The teacher knows these training rows by heart: train on its own answers (data.responses: teacher) or on "
        "other rows, or give T = {t:.2g} a place, at which its entropy on training rows is what it is on held-out ones "
        "at T = 1",
        "arithmetic; direction of arXiv 2603.02430, finding F5", ANY, OURS, ("train", "held_out"), _overfitted, _labelled,
        _value("matching_t"),
    ),
    Rule(
        "sharp-teacher",
        f"on training and held-out rows the teacher's confidence is above its accuracy by more than {MISCALIBRATED:g} "
        "(threshold ours)",
        "The teacher is sharper than it is right, on all rows alike: sweep higher temperatures, from T = {t:g} on, at "
        "which its held-out cross-entropy is lowest",
        "calibration (Guo et al. 2017, arXiv 1706.04599)", ANY, OURS, ("train", "held_out"),
        lambda found: _calibration(found, 1), _labelled, _calibrated_t,
    ),
    Rule(
        "flat-teacher",
        f"on training and held-out rows the teacher's confidence is below its accuracy by more than {MISCALIBRATED:g} "
        "(threshold ours)",
        "The teacher is flatter than it is right: sweep temperatures of 1 and below (0.5, 0.7, 1); its held-out "
        "cross-entropy is lowest at T = {t:g}",
        "Chandrasegaran et al., ICML 2022: students of label-smoothed teachers fail at high T",
        "vision and translation", OURS, ("train", "held_out"),
        lambda found: _calibration(found, -1), _labelled, _calibrated_t,
    ),
    Rule(
        "teacher-worse",
        "the mean gap, the student's cross-entropy less the teacher's, is below 0",
        "The student knows these labels better than the teacher does: do not distil on them; fine-tune the teacher "
        "first, or train on its own answers",
        ARITHMETIC, ANY, ARITHMETIC, ("train",),
        lambda found: below("mean gap, nats", found.values["gap"], 0.0), _labelled,
    ),
    Rule(
        "no-relations-left",
        f"at the last T below {LARGE_T:g} the entropy among the other classes is above {RELATED:g} log(V - 1) "
        "(threshold ours)",
        "Leave larger temperatures out: the teacher tells its other classes apart no more",
        "chain rule of the entropy", ANY, OURS, ("train",), _uniform,
        lambda situation: "two classes have no others to relate" if situation.classes < 3 else "",
    ),
    # ------------------------------------------------------------------------------------- temperatures and divergences
    Rule(
        "support-ceiling",
        f"at the hottest T of the recipe the teacher offers more than {MOST_SUPPORT:.0%} of the vocabulary, exp(mean "
        "entropy) (threshold ours)",
        "Keep temperatures, t_init and t_max among them, below T = {t:.2g}: above it the target is mostly tail",
        "entropy as what T acts through: arXiv 2603.02430, 2605.20357 (abstracts)", LANGUAGE, OURS, ("train",), _ceiling,
        _language_models, _value("ceiling"),
    ),
    Rule(
        "forward-kl-values",
        "loss.divergence is forward_kl",
        "Sweep T = 1, 1.4, 2 and 2.8, those of them that are below the ceiling: on instruction following forward KL "
        "did worse than reverse KL at T = 1 and better at higher T",
        "arXiv 2606.00306 (abstract); the values are ours", LANGUAGE, PUBLISHED, (),
        lambda found: fact(True, "no further condition"), _of_kl("forward_kl"),
    ),
    Rule(
        "reverse-kl-values",
        "loss.divergence is reverse_kl",
        "Sweep T = 0.6, 0.8 and 1: on instruction following reverse KL did better than forward KL at T = 1; of four "
        "fixed temperatures that another paper tried with it, 0.61 came first",
        "arXiv 2606.00306 (abstract), 2510.11615 (one model pair)", LANGUAGE, "published, one paper each", (),
        lambda found: fact(True, "no further condition"), _of_kl("reverse_kl"),
    ),
    Rule(
        "near-student",
        f"KL(teacher || student) before training is below {NEAR:g} nats per label (threshold ours)",
        "Do not spend the sweep on forward against reverse KL: to second order both are half the variance of the "
        "difference of the logits, and this student is near",
        "second-order expansion", ANY, "derived", ("train",),
        lambda found: below("KL before training, nats", found.values["kl"], NEAR),
    ),
    # --------------------------------------------------------------------------------------------------- moving T
    Rule(
        "fixed-is-enough",
        f"the policy is dts, rule gap, and the mean gap is below {NO_GAP:g} nats (threshold ours)",
        "A fixed temperature is the better choice here: there is no gap for this one to follow",
        ARITHMETIC, ANY, OURS, ("train",), lambda found: below("mean gap, nats", found.values["gap"], NO_GAP), _dts("gap"),
    ),
    Rule(
        "dts-paper-cannot-act",
        "the policy is dts, rule paper, and the mean gap is above -1",
        "A fixed temperature, or cosine, is the better choice here: rule paper acts only below a gap of -1, so this is "
        "a cosine with momentum",
        "Eq. 5 to 8 of DTS", ANY, ARITHMETIC, ("train",), lambda found: above("mean gap, nats", found.values["gap"], -1.0),
        _dts("paper"),
    ),
    Rule(
        "moving-needs-controls",
        "the policy moves T during training",
        "Put a constant beside it: published schedules run in opposite directions (DTS falls, POCL rises), and without a "
        "constant nobody can say what moving did",
        "arXiv 2506.05695; arXiv 2603.02430, finding F2", LANGUAGE, "two papers that disagree", (),
        lambda found: fact(found.situation.moves, f"the policy is {found.situation.policy}"),
    ),
    # --------------------------------------------------------------------------------------------------- weights and caches
    Rule(
        "gradient-share",
        f"at the hottest T of the recipe one of the two parts has less than {LEAST_SHARE:.0%} of the gradient "
        "(threshold ours)",
        "Give loss.kd_ratio = {ratio:.2g} a place, which makes both parts equally large on the logits",
        ARITHMETIC, ANY, ARITHMETIC, ("train",), _share, _with_labels,
        lambda found: {"ratio": found.at("equal_ratio", found.situation.hottest).value},
    ),
    Rule(
        "compact-cache",
        f"some number of tokens, {2**10:,} at most, has {LEAST_MASS:g} of the teacher at the hottest T of the recipe",
        "A compact cache (dts-hf cache-teacher --compact {k:.0f}) keeps enough",
        ARITHMETIC, LANGUAGE, ARITHMETIC, ("train",), _cache, _language_models,
        lambda found: {"k": float(_enough(found, _hot(found)) or 0)},
    ),
    Rule(
        "no-compact-cache",
        f"the likeliest {2**10:,} tokens have less than {LEAST_MASS:g} of the teacher at the hottest T of the recipe",
        "No compact cache at these temperatures: cache the states (dts-hf cache-teacher without --compact)",
        ARITHMETIC, LANGUAGE, ARITHMETIC, ("train",), _no_cache, _language_models,
    ),
)  # fmt: skip

"""Names that people understand for metrics, splits and variants, with one line that explains each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A name on a page, and what it means.

    Args:
        symbol: the name in the literature and in files, where it differs from the label.
        better: 1 if higher values are better, -1 if lower ones are, 0 if neither.
        scale: what a value is multiplied by to be shown: 100 for fractions, 1 for counts and ratings.
    """

    label: str
    explanation: str
    symbol: str = ""
    better: int = 0
    scale: int = 100

    @property
    def direction(self) -> str:
        """Say which values are better; empty if neither."""
        return {1: "higher is better ↑", -1: "lower is better ↓", 0: ""}[self.better]


# By benchmark and key of its results: recall is another one in each.
METRIC_TERMS = {
    "chair.chair_i": Term(
        "Invented objects", "Of all objects that captions name, the share that is not in the picture.", "CHAIR_i", -1
    ),
    "chair.chair_s": Term(
        "Captions that invent",
        "The share of captions that name at least one object that is not in the picture.",
        "CHAIR_s",
        -1,
    ),
    "chair.recall": Term(
        "Objects found", "Of all objects in the pictures, the share that captions name.", "recall", better=1
    ),
    "chair.length": Term("Words", "Mean number of words of a caption.", "length", scale=1),
    "chair.empty": Term("Captions of nothing", "The share of captions that name no object at all."),
    "pope.accuracy": Term(
        "Right answers",
        "The share of yes/no questions, such as “Is there a dog in the image?”, that are answered right (POPE).",
        "accuracy",
        1,
    ),
    "pope.precision": Term("Right among yes", "Of the answers yes, the share that is right.", "precision", 1),
    "pope.recall": Term("Yes where it is there", "Of the objects that are there, the share affirmed.", "recall", 1),
    "pope.f1": Term("F1", "Harmonic mean of precision and recall of the answers yes.", better=1),
    "pope.yes_ratio": Term(
        "Yes ratio", "The share of answers that are yes. Half of the questions ask for an object that is there."
    ),
    "pope.unclear": Term(
        "Unclear", "Answers that the scoring rule reads otherwise than a reader would, or that say neither.", scale=1
    ),
    "shr.shr": Term("Hallucinated sentences", "The share of judged sentences that the judge calls wrong.", "SHR", -1),
    "shr.hal_words_ratio": Term("Words in them", "The share of words in hallucinated sentences.", better=-1),
    "mmhal.score": Term("Rating", "Mean of the judge's ratings from 0 to 6.", "score", 1, 1),
    "mmhal.hallucination_rate": Term("Answers that invent", "The share of answers rated below 3.", better=-1),
    "amber.chair": Term("Invented objects", "Of all objects that texts name, the share that is absent.", "CHAIR", -1),
    "amber.cover": Term("Objects found", "Of the objects in the pictures, the share named.", "Cover", 1),
    "amber.hal": Term("Texts that invent", "The share of texts that name an absent object.", "Hal", -1),
    "amber.cog": Term(
        "Expected inventions",
        "Of the absent objects that people, too, would expect there, the share named.",
        "Cog",
        -1,
    ),
    "amber.accuracy": Term("Right answers", "The share of yes/no questions answered right.", "accuracy", 1),
    "amber.f1": Term("F1 of no", "Harmonic mean of precision and recall of the answers no.", "F1", 1),
    "amber.amber_score": Term("AMBER score", "Mean of 1 − CHAIR and F1.", better=1),
    "objhal.response": Term(
        "Answers that invent", "Of the answers that name an object, the share that names an absent one.", "response", -1
    ),
    "objhal.mention": Term("Invented objects", "Of all objects named, the share that is absent.", "mention", -1),
    "objhal.recall": Term("Objects found", "Of the objects in the pictures, the share named.", "recall", 1),
    "sweep.kl": Term(
        "Divergence",
        "KL(p || q) in nats over the whole vocabulary, of the tuned (p) from the base distribution (q) of an "
        "answer's first token.",
        "KL",
        scale=1,
    ),
}
METRIC_TERMS |= {
    f"re{key}": term for key, term in METRIC_TERMS.items() if key.startswith("pope.")
}  # RePOPE's rates are POPE's
SPLIT_TERMS = {
    "random": Term("random", "Absent objects in the questions are drawn at random."),
    "popular": Term("popular", "Absent objects in the questions are those that pictures show most often."),
    "adversarial": Term(
        "adversarial", "Absent objects in the questions are those that most often stand beside what is there."
    ),
}
STATISTICS = {
    "interval": Term(
        "95 % interval",
        "In brackets: where the value lies for 95 % of 2,000 resamplings of the pictures (bootstrap). A difference "
        "whose interval contains 0 is no clear change; nor is one whose p-value is 0.05 or more.",
    ),
    "p": Term(
        "p",
        "Exact McNemar test: how likely at least so uneven a split of the differing answers is, if both models "
        "are equally good.",
    ),
    "holm": Term("p (Holm)", "Exact McNemar test against the base, corrected by Holm over all rows of a split."),
    "attention": Term(
        "attention",
        "How much of the post decoder's last look at the picture fell on each place, as a mean over its heads, just "
        "before the word.",
    ),
}
VARIANTS = {  # of the demo, by the name of their runs
    "base": Term("Base model", "The model before any tuning."),
    "post_decoder": Term(
        "Post decoder",
        "A small module behind the frozen model that looks at the picture again before each word; trained on "
        "preference pairs (DPO and likelihood).",
    ),
    "nll_control": Term(
        "Post decoder, good texts only",
        "The control: the same module trained on the preferred texts alone, without the preference term.",
    ),
    "no_cross_attention": Term(
        "As many weights, no second look",
        "The control: a module of as many weights in the same place, which cannot look at the picture; the same pairs.",
    ),
    "head": Term("Output layer only", "Only the model's last linear layer (lm_head) is trained."),
    "lora": Term("LoRA", "Low-rank changes to the language model's layers are trained; the usual method."),
}
GLOSSARY = {**METRIC_TERMS, **SPLIT_TERMS, **STATISTICS, **VARIANTS}  # what pages explain, by id


def variant(name: str) -> Term:
    """Return a demo variant's term; an unknown run is called by its own name."""
    return VARIANTS.get(name, Term(name, ""))

"""What a model was trained for, as its card tells it: a task of training says it, and the bundle keeps it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A metric of a model; more is better.

    Attributes:
        words: What people call it.
        task: The Hub's name of its task.
        metric: The Hub's name of its kind.
    """

    name: str
    words: str
    task: str
    metric: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What a run trained a model for.

    Attributes:
        score: By which the run's models are compared.
        text_tower: Whether the run trains one, which stands beside the bundle in open_clip's own form.
    """

    words: str
    score: Score
    text_tower: bool = False


ACCURACY = Score(name="accuracy", words="top-1 accuracy", task="image-classification", metric="accuracy")
KNN_ACCURACY = Score(name="knn_accuracy", words="k-NN accuracy", task="image-classification", metric="accuracy")
ZERO_SHOT_ACCURACY = Score(
    name="zero_shot_accuracy", words="zero-shot accuracy", task="zero-shot-image-classification", metric="accuracy"
)
PATCH_COSINE = Score(
    name="patch_cosine",
    words="patch cosine to the teacher",
    task="image-feature-extraction",
    metric="cosine_similarity",
)

SUPERVISED = Objective(words="classification", score=ACCURACY)
DINOV2 = Objective(words="self-distillation as in DINOv2", score=KNN_ACCURACY)
CONTRASTIVE = Objective(words="matching images with captions as in CLIP", score=ZERO_SHOT_ACCURACY, text_tower=True)
DISTILL = Objective(words="distillation of tokens", score=PATCH_COSINE)

OBJECTIVES = {"Supervised": SUPERVISED, "DinoV2": DINOV2, "Contrastive": CONTRASTIVE, "Distill": DISTILL}
"""By the kind of the task: older runs tell no more."""
SCORES = {score.name: score for score in (ACCURACY, KNN_ACCURACY, ZERO_SHOT_ACCURACY)}
"""Metrics that any model may have; a run tells those that are its own."""

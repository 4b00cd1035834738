"""What each protocol asks, for readers who do not know it: title, meaning, definition."""

from vitreg_hub.evaluation.results import Protocol

_ACCURACY = (
    "Top-1 is the share of the images whose class gets the highest score, top-5 the share whose class is among the "
    "five highest; intervals are Wilson's."
)

WORDS: dict[Protocol, tuple[str, str, str]] = {
    "classify": (
        "The model's own head (classify)",
        "How often the model itself names the class of an image.",
        f"{_ACCURACY} The calibration error is the mean distance between how sure the model is and how often it is "
        "right, over 15 bins.",
    ),
    "knn": (
        "Nearest neighbours (knn)",
        "Whether images of one class lie close together, without training anything.",
        f"{_ACCURACY} The most similar training images vote with their cosine similarity over a temperature, as in "
        "DINO.",
    ),
    "linear": (
        "Linear probes (linear)",
        "How much a linear classifier reads from the frozen features.",
        f"{_ACCURACY} The probe is the best of a grid of learning rates and features, as in DINOv2, but chosen on "
        "training images that were kept back.",
    ),
    "logreg": (
        "Logistic regression (logreg)",
        "How much a linear classifier that is fitted to the end reads from the frozen class token.",
        f"{_ACCURACY} The strength of the regularisation is chosen on training images that were kept back.",
    ),
    "zero-shot": (
        "Zero-shot classification",
        "How often the text of its class is closest to an image.",
        f"{_ACCURACY} The text of a class is the mean over sentences with its name, as in CLIP.",
    ),
    "segmentation": (
        "Segmentation",
        "How much a linear head reads from each patch about what is there.",
        "Intersection over union of predicted and true pixels of a class, over all images together, and its mean over "
        "classes; the ViT is frozen.",
    ),
    "depth": (
        "Depth",
        "How much a linear head reads from each patch about how far away things are.",
        "Root of the mean squared error in metres, relative errors, and the shares of pixels within a factor of 1.25, "
        "its square and its cube of the truth, as means over images; the ViT is frozen.",
    ),
    "discovery": (
        "Object discovery",
        "Whether the similarities of patches single out an object, without any training.",
        "CorLoc: share of the images in which LOST's box overlaps with a true one by at least half of their union.",
    ),
}

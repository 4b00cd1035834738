"""The metadata of a bundle's card, which the Hub shows and searches."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vitreg_hub import licenses
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.model_cards.facts import LOGITS, measured_on, on_the_hub, output, score_of, scores

SOURCE = "vitreg_hub"
"""Source of the results that this package writes into a model-index, by which it recognises them."""
TAGS = ("timm", "transformers", "vision-transformer", "registers", "vitreg")
BASE_MODEL = re.compile(r"hf-hub:([\w.-]+/[\w.-]*\w)")


def metadata(bundle: ModelBundle, repo: str, *, revision: str | None = None) -> dict[str, Any]:
    """The metadata of a bundle's card, in a repository ``org/name`` and its branch, unless that is main."""
    page = f"https://huggingface.co/{repo}" + (f"/tree/{revision}" if revision else "")
    results = _results(bundle, page)
    on_hub = on_the_hub(bundle.provenance.dataset or "")
    tags = [tag for tag in TAGS if tag != "registers" or bundle.num_registers]
    data = ModelCardData(
        base_model=base_model(bundle),
        datasets=[on_hub[0]] if on_hub else None,
        library_name="timm",
        pipeline_tag="image-classification" if output(bundle) == LOGITS else "image-feature-extraction",
        tags=[*tags, bundle.arch],
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **licenses.metadata(bundle.provenance.license),
    )
    return data.to_dict()


def base_model(bundle: ModelBundle) -> str | None:
    """The repository whose weights were converted or trained on, if they came from one."""
    conversion, run = bundle.provenance.conversion, bundle.provenance.run
    texts = [bundle.provenance.origin]  # also names the source of a start
    if conversion:
        texts.insert(0, conversion.source)
    if run and run.facts.start:
        texts.insert(0, run.facts.start)
    for text in texts:
        if found := BASE_MODEL.search(text):
            return found[1]
    return None


def _results(bundle: ModelBundle, page: str) -> list[EvalResult]:
    images = measured_on(bundle)
    if images is None:
        return []
    return [
        EvalResult(
            task_type=score.task,
            dataset_type=images.dataset,
            dataset_name=images.name,
            dataset_split=images.split,
            metric_type=score.metric,
            metric_name=score.words,
            metric_value=value,
            metric_args=_how(bundle, name) or None,
            source_name=SOURCE,
            source_url=page,
        )
        for name, value in scores(bundle)
        if (score := score_of(bundle, name))
    ]


def _how(bundle: ModelBundle, name: str) -> dict[str, Any]:
    """What a score depends on, as far as it is recorded."""
    run = bundle.provenance.run
    if run is None:
        return {}
    told = run.facts
    how = {"num_images": run.evaluated} if run.evaluated else {"max_images": told.eval_images}
    if name == "knn_accuracy":
        how |= {"max_reference_images": told.eval_images, "max_neighbors": told.knn_neighbors}
        how |= {"temperature": told.knn_temperature}
    return {key: value for key, value in how.items() if value is not None}

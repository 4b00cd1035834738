"""`vitreg quickstart`."""

from dataclasses import replace
from typing import Annotated

from vitreg_hub.cli.values import print_doors
from vitreg_hub.console import hide_loading


def run(
    *, out: str = "quickstart", push: Annotated[str | None, "ORG/NAME"] = None, epochs: float | None = None
) -> None:
    """Train a small register ViT on real digits, bundle it, verify it and draw its tokens.

    Args:
        out: new folder for the results
        push: publish to the Hub that HF_ENDPOINT names, and load back
        epochs: train for so many instead of 24
    """
    from vitreg_hub.training.quickstart import quickstart
    from vitreg_hub.training.recipes.named import RECIPES

    hide_loading()
    recipe = RECIPES["supervised_digits"]()
    result = quickstart(out, push_to=push, recipe=recipe if epochs is None else replace(recipe, epochs=epochs))
    print(f"\nheld-out accuracy {result.accuracy:.3f}")
    print(f"model    {result.model}")
    print_doors(result.doors)
    print(f"figure   {result.figure}")
    if result.commit:
        print(f"pushed   {result.commit} (loaded back: equal)")
    print(f"""
next:
  python -c "import timm; print(timm.create_model('local-dir:{result.model}', pretrained=True))"
  python -c "import vitreg_hub; from transformers import AutoModel; print(AutoModel.from_pretrained('{result.model}'))"
  vitreg push {result.model} your-name/vit_nano_reg4.digits""")

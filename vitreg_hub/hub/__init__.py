"""Publishing: bundles to the Hub and back, with their cards."""

from vitreg_hub.hub.listing import PublishedModel, list_models
from vitreg_hub.hub.publish import PlannedFile, Pushed, PushPlan, plan, pull, push, require_token

__all__ = [
    "PlannedFile",
    "PublishedModel",
    "PushPlan",
    "Pushed",
    "list_models",
    "plan",
    "pull",
    "push",
    "require_token",
]

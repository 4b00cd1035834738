"""What "Vision Transformers Need Registers" (Darcet et al., ICLR 2024) measures of artifacts, on any ViT."""

from vitreg_hub.analysis.many import analyze_all
from vitreg_hub.analysis.measures import (
    analyze,
    attention_mass,
    global_information,
    local_information,
    neighbor_redundancy,
    outlier_places,
    patch_norms,
    token_examples,
)
from vitreg_hub.analysis.report.write import draw_attention, write_report
from vitreg_hub.analysis.results import ArtifactReport, load_reports
from vitreg_hub.analysis.telemetry import Telemetry, telemetry

__all__ = [
    "ArtifactReport",
    "Telemetry",
    "analyze",
    "analyze_all",
    "attention_mass",
    "draw_attention",
    "global_information",
    "load_reports",
    "local_information",
    "neighbor_redundancy",
    "outlier_places",
    "patch_norms",
    "telemetry",
    "token_examples",
    "write_report",
]

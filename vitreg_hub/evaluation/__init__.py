"""What "Vision Transformers Need Registers" (Darcet et al., ICLR 2024) scores, on any ViT: section 3 of the paper."""

from vitreg_hub.evaluation.dense.depth_head import DepthHead
from vitreg_hub.evaluation.dense.depth_metrics import DepthScores, depth_scores
from vitreg_hub.evaluation.dense.heads import SegmentationHead
from vitreg_hub.evaluation.dense.scoring import evaluate_depth, evaluate_segmentation
from vitreg_hub.evaluation.dense.segmentation_metrics import SegmentationScores, segmentation_scores
from vitreg_hub.evaluation.dense.training import train_depth, train_segmentation
from vitreg_hub.evaluation.dense_protocols import DenseSettings
from vitreg_hub.evaluation.engine import Settings, evaluate
from vitreg_hub.evaluation.features import Features, extract
from vitreg_hub.evaluation.interventions import RegisterBank, intervened
from vitreg_hub.evaluation.knn import knn_votes
from vitreg_hub.evaluation.linear import LinearSettings
from vitreg_hub.evaluation.lost import LostBox, corloc, lost_box
from vitreg_hub.evaluation.results import EvalReport, load_reports
from vitreg_hub.evaluation.scores import ClassScores, classification_scores
from vitreg_hub.evaluation.zero_shot import open_towers, zero_shot_masks

__all__ = [
    "ClassScores",
    "DenseSettings",
    "DepthHead",
    "DepthScores",
    "EvalReport",
    "Features",
    "LinearSettings",
    "LostBox",
    "RegisterBank",
    "SegmentationHead",
    "SegmentationScores",
    "Settings",
    "classification_scores",
    "corloc",
    "depth_scores",
    "evaluate",
    "evaluate_depth",
    "evaluate_segmentation",
    "extract",
    "intervened",
    "knn_votes",
    "load_reports",
    "lost_box",
    "open_towers",
    "segmentation_scores",
    "train_depth",
    "train_segmentation",
    "zero_shot_masks",
]

"""transformers' own common tests on our classes: they get at least as far as its `Dinov2WithRegistersModel` does.

What only the pipelines' tests need (tiny models on the Hub) and the export tests are not in the source distribution;
test_hf_models.py has tests of its own for both.
"""

import re
import sys
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hf_upstream
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperImageProcessor

from vitreg_hub.hf_models import VitRegBackbone, VitRegConfig, VitRegForImageClassification, VitRegModel

common, backbone, configuration, image_processing = hf_upstream.load(
    "test_modeling_common", "test_backbone_common", "test_configuration_common", "test_image_processing_common"
)

SKIPPED_UPSTREAM = re.compile(
    # a GPU, or a package that is not among ours
    r"flash_attn|deepspeed|kernels_can_load|flex_attention_with_grads|torch_compile_for_training|can_compile_torchvision"
    r"|(cpu|disk)_offload|model_parallelism|device_context_manager|global_device|sdpa_can_(compile_dynamic|dispatch_on)"
    r"|without_torchvision"
    # text, generation, experts, rotary positions, models of several parts, tensor parallelism, parts kept in float32
    r"|inputs_embeds|resize|causal_lm|encoder_decoder|grouped|moe|router|rope|sliding_window|composite_model|subconfig"
    r"|tp_plan|keep_in_fp32"
)
"""Tests that upstream skips for `Dinov2WithRegistersModel` and its image processor too."""

SETTINGS = "its settings are not its own: they are pretrained_cfg in config.json, which timm reads as well"
WRITING = "upstream has disabled its save_pretrained: the model writes config.json"

NOT_APPLICABLE = {
    "test_image_processor_has_attributes": SETTINGS,
    "test_image_processor_from_dict_has_attributes": SETTINGS,
    "test_image_processor_from_dict_with_kwargs_has_attributes": SETTINGS,
    "test_image_processor_to_json_string": SETTINGS,
    "test_image_processor_to_json_file": SETTINGS,
    "test_image_processor_preprocess_arguments": SETTINGS,
    "test_init_without_params": SETTINGS,
    "test_override_instance_attributes_does_not_affect_other_instances": SETTINGS,
    "test_fast_image_processor_explicit_none_preserved": SETTINGS,
    "test_call_numpy_4_channels": SETTINGS,
    "test_image_processor_from_and_save_pretrained": WRITING,
    "test_image_processor_save_load_with_autoimageprocessor": WRITING,
    "test_save_load_backends": WRITING,
    "test_save_load_backends_auto": WRITING,
    "test_call_pytorch": "it takes a batch as one tensor, not as a list of tensors",
}
"""Tests that contradict the form of a bundle, all of them of the image processor, which is upstream's."""

TELLING = re.compile(
    r"test_(save_load|can_init_all_missing|batching_equivalence|attention_outputs|hidden_states_output"
    r"|reverse_loading_mapping|training_gradient_checkpointing|retain_grad|model_forward_default|correct_missing_keys"
    r"|eager_matches_sdpa_inference_(08|24)|can_set_attention_dynamically$|model$|backbone$|for_image_classification$)"
)
"""Tests in which a row with another MLP, or with a norm before the blocks, could differ from the first row."""


class Policed:
    """A test that is skipped for a reason of ours that `NOT_APPLICABLE` does not give has failed."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in NOT_APPLICABLE.keys() & set(dir(cls)):
            setattr(cls, name, unittest.skip(NOT_APPLICABLE[name])(getattr(cls, name)))

    def run(self, result: unittest.TestResult) -> None:
        skip = result.addSkip

        def police(test: unittest.TestCase, reason: str) -> None:
            if SKIPPED_UPSTREAM.search(self._testMethodName) or NOT_APPLICABLE.get(self._testMethodName) == reason:
                return skip(test, reason)
            try:
                self.fail(f"skipped: {reason}")
            except self.failureException:
                return result.addFailure(test, sys.exc_info())

        with mock.patch.object(result, "addSkip", police):
            super().run(result)

    def test_whatever_is_slow_is_skipped_upstream(self):
        for name in dir(self):
            if any(mark.name == "slow" for mark in getattr(getattr(self, name), "pytestmark", ())):
                assert SKIPPED_UPSTREAM.search(name), name


class Tester:
    """What upstream's tests ask of a model's tester."""

    batch_size = 13
    num_channels = 3
    image_size = 20
    patch_size = 4
    is_training = True
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_register_tokens = 4
    type_sequence_label_size = 10
    seq_length = 1 + num_register_tokens + (image_size // patch_size) ** 2

    def __init__(self, arch: str):
        self.arch = arch

    def get_config(self, **kwargs: Any) -> VitRegConfig:
        shape = ("num_channels", "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return VitRegConfig(arch=self.arch, **{name: getattr(self, name) for name in shape} | kwargs)

    def images(self, channels: int = 3) -> Tensor:
        return common.floats_tensor([self.batch_size, channels, self.image_size, self.image_size])

    def prepare_config_and_inputs_for_common(self) -> tuple[VitRegConfig, dict[str, Tensor]]:
        return self.get_config(), {"pixel_values": self.images()}


class VitRegModelTest(Policed, common.ModelTesterMixin, unittest.TestCase):
    """All tests of models, on the DINOv2 family."""

    arch = "vit_nano_reg4"
    all_model_classes = (VitRegModel, VitRegForImageClassification, VitRegBackbone)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # upstream reads the year of a model in its licence header

    def setUp(self):
        self.model_tester = Tester(self.arch)
        for table, model in (
            ("MODEL_MAPPING_NAMES", VitRegModel),
            ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", VitRegForImageClassification),
            ("MODEL_FOR_BACKBONE_MAPPING_NAMES", VitRegBackbone),
        ):  # upstream looks up what a class is for in the tables of its own models
            entry = {TimmWrapperConfig.model_type: model.__name__}
            self.enterContext(mock.patch.dict(getattr(common, table), entry))

    def test_config(self):
        # Not hidden_size=37, as upstream: the input is looked for in config.json, where timm's name for it stands.
        args = VitRegConfig(hidden_size=37).model_args
        configuration.ConfigTester(self, VitRegConfig, has_text_modality=False, model_args=args).run_common_tests()

    def test_model_get_set_embeddings(self):
        # Upstream's expects nn.Embedding; its vision models have this one instead.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), nn.Module)
            assert model.get_output_embeddings() is None

    def test_model_weights_reload_no_missing_tied_weights(self):
        # Upstream leaves a file with integers only, and config.json does not say the dtype: the weights do.
        def save(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
            save_file({name: tensor.float() for name, tensor in tensors.items()}, *args, **kwargs)

        save_file = common.safe_save_file
        with mock.patch.object(common, "safe_save_file", save):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_load_ignoring_mismatched_shapes(self):
        # Upstream looks for the head among a model's children; here it is timm's, one level below.
        def with_head(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
            yield from nn.Module.named_children(model)
            yield "timm_model.head", model.timm_model.head

        with mock.patch.object(VitRegForImageClassification, "named_children", with_head):
            super().test_can_load_ignoring_mismatched_shapes()

    def test_model(self):
        outputs = VitRegModel(self.model_tester.get_config()).eval()(self.model_tester.images())
        assert outputs.last_hidden_state.shape == (13, 30, 32)

    def test_backbone(self):
        config = self.model_tester.get_config(out_indices=[1, 2])
        outputs = VitRegBackbone(config).eval()(self.model_tester.images())
        assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [(13, 32, 5, 5)] * 2
        config.out_features, config.apply_layernorm, config.reshape_hidden_states = None, False, False
        outputs = VitRegBackbone(config).eval()(self.model_tester.images())
        assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [(13, 30, 32)]

    def test_for_image_classification(self):
        for channels in 3, 1:
            config = self.model_tester.get_config(num_labels=10, num_channels=channels)
            model = VitRegForImageClassification(config).eval()
            outputs = model(self.model_tester.images(channels), labels=torch.arange(13) % 10)
            assert outputs.logits.shape == (13, 10)
            assert outputs.loss.shape == ()


def telling_only(case: type[VitRegModelTest]) -> type[VitRegModelTest]:
    """Take the tests away that are not `TELLING`."""
    for name in dir(case):
        if name.startswith("test_") and callable(getattr(case, name)) and not TELLING.match(name):
            setattr(case, name, None)
    return case


@telling_only
class SwigluModelTest(VitRegModelTest):
    arch = "vit_giant_reg4"


@telling_only
class ClipModelTest(VitRegModelTest):
    arch = "vit_base_reg4_clip"


class VitRegBackboneTest(Policed, backbone.BackboneTesterMixin, unittest.TestCase):
    """All tests of backbones."""

    all_model_classes = (VitRegBackbone,)
    config_class = VitRegConfig
    has_attentions = True

    def setUp(self):
        self.model_tester = Tester("vit_nano_reg4")


class ImageProcessorTester(image_processing.ImageProcessingTester):
    """What upstream's tests ask of an image processor's tester."""

    def _get_image_processing_classes(self) -> dict[str, type]:
        config = VitRegConfig(arch="vit_nano_reg4")
        self.settings = {"pretrained_cfg": config.pretrained_cfg, "architecture": config.architecture}
        self.size = dict(height=config.image_size, width=config.image_size)
        with tempfile.TemporaryDirectory() as folder:
            VitRegModel(config).save_pretrained(folder)
            return {
                backend: type(AutoImageProcessor.from_pretrained(folder, backend=backend))
                for backend in ("torchvision", "pil")
            }

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return self.settings


class ImageProcessorTest(Policed, image_processing.ImageProcessingTestMixin, unittest.TestCase):
    """All tests of image processors, on what `AutoImageProcessor` gives for a bundle."""

    image_processor_tester_class = ImageProcessorTester

    def test_class(self):
        assert set(self.image_processing_classes.values()) == {TimmWrapperImageProcessor}


class NotApplicableTest(unittest.TestCase):
    def test_no_entry_is_stale(self):
        assert all(hasattr(ImageProcessorTest, name) for name in NOT_APPLICABLE)
        assert not any(hasattr(VitRegModelTest, name) or hasattr(VitRegBackboneTest, name) for name in NOT_APPLICABLE)

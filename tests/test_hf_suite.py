"""transformers' own common tests on our classes: they get at least as far as its `Dinov2WithRegistersModel` does.

What only the pipelines' tests need (tiny models on the Hub) and the export tests are not in the source distribution;
test_hf_models.py has tests of its own for both.
"""

import re
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hf_upstream
import pytest
import torch
import transformers
import upstream
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperImageProcessor

from vitreg_hub.hf_models import VitRegBackbone, VitRegConfig, VitRegForImageClassification, VitRegModel
from vitreg_hub.tested import Library

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
    r"|tp_plan|keep_in_fp32|bc_cache_name"
)
"""Tests that upstream skips for `Dinov2WithRegistersModel` and its image processor too."""

MUST_RUN = set(
    """
test_all_tensors_are_parameter_or_buffer test_attention_outputs test_backbone_common_attributes
test_backbone_outputs test_backbone_stage_selection test_backends_equivalence test_backends_equivalence_batched
test_base_model_prefix_loads_base_weights test_batching_equivalence test_bc_torch_dtype
test_call_numpy test_call_pil test_can_be_initialized_on_meta test_can_capture_specific_layers_hidden_states
test_can_init_all_missing_weights test_can_load_from_already_mapped_keys test_can_load_ignoring_mismatched_shapes
test_can_set_attention_dynamically test_can_use_safetensors test_cannot_load_with_meta_device_context_manager
test_capture_outputs_decorator test_cast_dtype_device test_channels test_config
test_config_attn_implementation_setter test_config_save_pretrained test_convert_to_rgb_mixed_input_batch
test_correct_missing_keys test_create_from_modified_config test_determinism test_eager_matches_sdpa_inference
test_enable_input_require_grads test_enable_input_require_grads_with_gradient_checkpointing
test_feed_forward_chunking test_format_of_can_record_outputs test_forward_signature
test_from_pretrained_no_checkpoint test_gradient_checkpointing_backward_compatibility
test_gradient_checkpointing_enable_disable test_hidden_states_output test_init_weights_can_init_buffers
test_load_contiguous_weights test_load_save_without_tied_weights test_load_with_mismatched_shapes
test_model_base_model_prefix test_model_forward_default_config_values test_model_get_set_embeddings
test_model_is_small test_model_main_input_name test_model_outputs_equivalence
test_model_weights_reload_no_missing_tied_weights test_num_layers_is_small test_problem_types
test_retain_grad_hidden_states_attentions test_reverse_loading_mapping test_save_load
test_save_load_keys_to_ignore_on_save test_sdpa_can_dispatch_non_composite_models
test_tied_weights_are_sharded_together test_tied_weights_keys test_torch_save_load test_training
test_training_gradient_checkpointing test_training_gradient_checkpointing_use_reentrant_false
test_training_gradient_checkpointing_use_reentrant_true test_valid_kwargs_set
""".split()  # noqa: SIM905  (a hundred quotes and commas are no easier to read)
)
"""Tests that have something to look at in our classes, and passed with the oldest tested transformers.

They may leave with upstream, but may not turn into skips. Of parametrised tests it is the name before the number.
"""

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
    """A test that must run has failed when it is skipped; any other skip that is not known here is reported."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in NOT_APPLICABLE.keys() & set(dir(cls)):
            setattr(cls, name, unittest.skip(NOT_APPLICABLE[name])(getattr(cls, name)))

    @classmethod
    def judge_skip(cls, name: str, reason: str) -> str | None:
        """Why a skip is a failure, if it is one (see skips.py)."""
        if NOT_APPLICABLE.get(name) == reason:
            return None
        if re.sub(r"_\d+(_.*)?$", "", name) in MUST_RUN:
            return f"{name} ran with earlier versions of transformers, and is skipped now: {reason}"
        if not SKIPPED_UPSTREAM.search(name):
            warnings.warn(
                f"transformers {transformers.__version__} skips {cls.__name__}.{name}: {reason}", stacklevel=1
            )
        return None


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


class MustRunTest(unittest.TestCase):
    cases = (VitRegModelTest, VitRegBackboneTest, ImageProcessorTest)

    def test_none_is_lost_that_upstream_still_has(self):
        ours = {re.sub(r"_\d+(_.*)?$", "", name) for case in self.cases for name in dir(case)}
        files = (upstream.source("transformers") / "tests").rglob("*.py")
        theirs = set(re.findall(r"def (test_\w+)\(", "".join(file.read_text() for file in files)))
        assert not MUST_RUN & theirs - ours, "upstream has moved these tests: let our classes inherit them again"
        if gone := MUST_RUN - theirs - ours:
            warnings.warn(
                f"transformers {transformers.__version__} has no longer {', '.join(sorted(gone))}", stacklevel=1
            )

    def test_module_that_upstream_no_longer_ships_skips_them_in_untested_versions_alone(self):
        for tested, outcome in (("<10", ModuleNotFoundError), ("<9", pytest.skip.Exception)):
            library = Library(name="transformers", installed="9.1", tested=SpecifierSet(tested))
            with mock.patch.object(hf_upstream, "libraries", return_value=[library]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with pytest.raises(outcome, match="test_of_nothing"):
                    hf_upstream.load("test_of_nothing")

    def test_one_that_is_skipped_has_failed(self):
        for name in ("test_save_load", "test_eager_matches_sdpa_inference_99_fp8"):
            assert "needs a moon" in VitRegModelTest.judge_skip(name, "needs a moon")

    def test_other_skips_are_reported_unless_they_are_known(self):
        with pytest.warns(UserWarning, match=r"VitRegModelTest\.test_of_tomorrow: needs a moon"):
            assert VitRegModelTest.judge_skip("test_of_tomorrow", "needs a moon") is None
        with warnings.catch_warnings(action="error"):
            assert VitRegModelTest.judge_skip("test_inputs_embeds", "no text") is None
            assert ImageProcessorTest.judge_skip("test_save_load_backends", WRITING) is None
